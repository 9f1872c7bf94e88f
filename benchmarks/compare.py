"""lmx, llama.cpp and transformers side by side on this machine: the same threads, published sizes, random weights.

    python benchmarks/compare.py --folder /somewhere/with/9GB

Each runs in a process of its own and in turn, round after round, since three of these models do not fit memory
together; figures are medians over the rounds, ratios are medians of the rounds' ratios. NF4 in blocks of 64 stands
against llama.cpp's Q4_0. Needs the extra `compare`: llama-cpp-python (compiled on this machine), gguf, transformers
and bitsandbytes (`pip install -e '.[compare]'`, with CMAKE_ARGS=-DGGML_NATIVE=ON); --without leaves one out.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from lmx.presets import preset

PEERS = Path(__file__).parent / "peers"
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
    "falcon_mamba": Model("tiiuae/falcon-mamba-7b", "int8", ("pp512", "tg64", DEEP), ("pp512", "tg64"), ("tg16",)),
    "recurrent_gemma": Model("google/recurrentgemma-2b", "nf4", ("pp512", "tg64", DEEP)),
    "olmoe-int8": Model("allenai/OLMoE-1B-7B-0924", "int8", ("pp512", "tg128"), scheme="8bit"),
    "falcon_mamba-int8": Model("tiiuae/falcon-mamba-7b", "int8", ("tg64",), scheme="8bit"),
}


@dataclass
class Figures:
    """Tokens a second by (program, test), one a round; and what lmx said of its share of the ceilings."""

    speeds: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    shares: dict[str, list[float]] = field(default_factory=dict)
    bytes_per_token: dict[str, float] = field(default_factory=dict)
    peak_memory: list[float] = field(default_factory=list)

    def add(self, program: str, test: str, speed: float) -> None:
        """One round's figure; what a slow program generates less of stands beside what lmx generates at that depth."""
        kind, _, depth = test.partition("@")
        same = (
            known
            for name, known in self.speeds
            if name == "lmx" and (known[:2], known.partition("@")[2]) == (kind[:2], depth)
        )
        named = test if program == "lmx" else next(same, test)
        self.speeds.setdefault((program, named), []).append(speed)
        _say(f"  {program} {test}: {speed:.2f} tokens/s")


def main() -> None:
    """Run the rounds; print a table after each model."""
    options = _options()
    for name in options.models:
        figures = Figures()
        for number in range(options.rounds):
            _say(f"{name}: round {number + 1} of {options.rounds}")
            _round(name, MODELS[name], options, figures)
        table = "\n".join(_table(name, figures))
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


def _round(name: str, model: Model, options: argparse.Namespace, figures: Figures) -> None:
    for test in _chosen(model.lmx, options):
        _time_lmx(model, test, options.threads, figures)
    if model.llama_cpp and "llama.cpp" not in options.without:
        path = _gguf(name, options)
        answer = _run(
            [options.llama_python, str(PEERS / "llama_cpp_runner.py"), str(path), str(options.threads)],
            ",".join(_chosen(model.llama_cpp, options)),
        )
        for test, speed in answer.items():
            figures.add("llama.cpp Q4_0", test, speed)
    if model.transformers and "transformers" not in options.without:
        with tempfile.NamedTemporaryFile("w", suffix=".json") as config:
            json.dump(preset(model.hub), config)
            config.flush()
            runner = [sys.executable, str(PEERS / "transformers_runner.py"), config.name, str(options.threads)]
            answer = _run(runner, ",".join(model.transformers))
        for test, speed in answer.items():
            figures.add("transformers + bitsandbytes NF4", test, speed)


def _chosen(tests: tuple[str, ...], options: argparse.Namespace) -> list[str]:
    return [test for test in tests if not (options.shallow and test == DEEP)]


def _time_lmx(model: Model, test: str, threads: int, figures: Figures) -> None:
    kind, _, depth = test.partition("@")
    prompt, generated = (kind[2:], "0") if kind.startswith("pp") else ("0", kind[2:])
    command = [
        sys.executable,
        "-m",
        "lmx",
        "bench",
        model.hub,
        "--dummy",
        f"--{model.scheme}",
        "--head",
        model.head,
        "-q",
    ]
    command += ["--threads", str(threads), "-p", prompt, "-n", generated, "-d", depth or "0", "-r", "1", "-o", "jsonl"]
    result = _run(command)
    figures.add("lmx", test, result["tokens_per_second_mean"])
    share = result["flops_utilization"] if kind.startswith("pp") else result["bandwidth_utilization"]
    figures.shares.setdefault(test, []).append(share)
    if result["bytes_per_token"] is not None:  # a prompt's is not told
        figures.bytes_per_token[test] = result["bytes_per_token"]
    figures.peak_memory.append(result["peak_memory_bytes"])


def _gguf(name: str, options: argparse.Namespace) -> Path:
    path: Path = options.folder / f"{name}-q4_0.gguf"
    if not path.exists():
        _say(f"writing {path}")
        subprocess.run(
            [options.llama_python, str(PEERS / "random_gguf.py"), name, str(path)],
            check=True,
            stderr=subprocess.DEVNULL,
        )
    return path


def _run(command: list[str], *more: str) -> Any:
    result = subprocess.run([*command, *more], capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)}\n{result.stderr[-2000:]}")
    return json.loads(result.stdout.strip().splitlines()[-1])


def _table(name: str, figures: Figures) -> Iterator[str]:
    yield f"### {MODELS[name].hub}, lmx --{MODELS[name].scheme} --head {MODELS[name].head}"
    yield ""
    yield "| test | program | tokens/s | lmx is faster by | of lmx's ceiling |"
    yield "|---|---|---|---|---|"
    tests = dict.fromkeys(test for program, test in figures.speeds if program == "lmx")
    for test in tests:
        ours = figures.speeds["lmx", test]
        share = f"{median(figures.shares[test]):.0%}"
        yield f"| {test} | lmx | {median(ours):.2f} | | {share} |"
        for (program, other), speeds in figures.speeds.items():
            if other == test and program != "lmx":
                ratio = median(one / two for one, two in zip(ours, speeds, strict=True))
                yield f"| {test} | {program} | {median(speeds):.2f} | {ratio:.2f} | |"
    yield ""
    read = ", ".join(f"{test} {value / 1e6:.0f} MB" for test, value in figures.bytes_per_token.items())
    yield f"Bytes a token: {read}. Peak memory of lmx: {max(figures.peak_memory) / 1e9:.2f} GB."


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


if __name__ == "__main__":
    main()
