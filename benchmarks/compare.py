"""lmx, llama.cpp and transformers side by side on this machine: the same threads, published sizes, random weights.

    python benchmarks/compare.py --folder /somewhere/with/9GB

Each runs in a process of its own and in turn, round after round, since three of these models do not fit memory
together; figures are medians over the rounds, ratios are medians of the rounds' ratios. NF4 in blocks of 64 stands
against llama.cpp's Q4_0. Needs the extra `compare`: llama-cpp-python (compiled on this machine), gguf, transformers
and bitsandbytes (`pip install -e '.[compare]'`, with CMAKE_ARGS=-DGGML_NATIVE=ON); --without leaves one out.
"""

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from peers import rounds

from lmx.presets import preset

DEEP = "tg64@3968"


@dataclass(frozen=True)
class Model:
    """One model: its hub name, how lmx runs it and its head, and what each program is timed on."""

    hub: str
    head: str
    lmx: tuple[str, ...]
    llama_cpp: tuple[str, ...] = ()
    transformers: tuple[str, ...] = ()
    scheme: str = "4bit"


# transformers takes seconds a token on OLMoE, so that a few tokens tell its speed.
MODELS = {
    "olmoe": Model("allenai/OLMoE-1B-7B-0924", "nf4", ("pp512", "tg128", DEEP), ("pp512", "tg128", DEEP), ("tg16",)),
    "falcon_mamba": Model("tiiuae/falcon-mamba-7b", "nf4", ("pp512", "tg64", DEEP), ("pp512", "tg64"), ("tg16",)),
    "recurrent_gemma": Model("google/recurrentgemma-2b", "nf4", ("pp512", "tg64", DEEP)),
    "olmoe-int8": Model("allenai/OLMoE-1B-7B-0924", "int8", ("pp512", "tg128"), scheme="8bit"),
    "falcon_mamba-int8": Model("tiiuae/falcon-mamba-7b", "int8", ("tg64",), scheme="8bit"),
}


def main() -> None:
    """Run the rounds; print a table after each model."""
    options = _options()
    for name in options.models:
        figures = rounds.Figures()
        for number in range(options.rounds):
            rounds.say(f"{name}: round {number + 1} of {options.rounds}")
            _round(name, MODELS[name], options, figures)
        chosen = MODELS[name]
        title = f"{chosen.hub}, lmx --{chosen.scheme} --head {chosen.head}"
        table = "\n".join(figures.table(title))
        sys.stdout.write(f"{table}\n\n")
        sys.stdout.flush()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", type=Path, default=Path(), help="where the GGUF files are or will be written")
    parser.add_argument("--llama-python", default=sys.executable, help="the Python that has llama-cpp-python")
    parser.add_argument("--shallow", action="store_true", help=f"leave out {DEEP}, which takes most of the time")
    parser.add_argument("--without", nargs="*", choices=("llama.cpp", "transformers"), default=[])
    return parser.parse_args()


def _round(name: str, model: Model, options: argparse.Namespace, figures: rounds.Figures) -> None:
    for test in _chosen(model.lmx, options):
        _time_lmx(model, test, options.threads, figures)
    if model.llama_cpp and "llama.cpp" not in options.without:
        path = rounds.random_gguf(name, options.folder, options.llama_python)
        answer = rounds.run(
            [options.llama_python, str(rounds.PEERS / "llama_cpp_runner.py"), str(path), str(options.threads)],
            ",".join(_chosen(model.llama_cpp, options)),
        )
        for test, speed in answer.items():
            figures.add("llama.cpp Q4_0", test, speed)
    if model.transformers and "transformers" not in options.without:
        answer = rounds.time_transformers(preset(model.hub), model.transformers, options.threads)
        for test, speed in answer.items():
            figures.add(rounds.TRANSFORMERS, test, speed)


def _chosen(tests: tuple[str, ...], options: argparse.Namespace) -> list[str]:
    return [test for test in tests if not (options.shallow and test == DEEP)]


def _time_lmx(model: Model, test: str, threads: int, figures: rounds.Figures) -> None:
    options = [f"--{model.scheme}", "--head", model.head, "--threads", str(threads)]
    figures.add_lmx(test, rounds.time_lmx(model.hub, test, options))


if __name__ == "__main__":
    main()
