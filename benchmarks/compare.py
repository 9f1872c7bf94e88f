"""lmx, llama.cpp and transformers side by side on this machine: the same threads, published sizes, random weights.

    python benchmarks/compare.py --folder /somewhere/with/9GB

lmx and one other program are loaded at once and take turns at the same test, a few tokens each; before and after each
turn of lmx the memory's bandwidth is measured. Where others share the memory, what it gives may change from second to
second by more than two programs differ: in turns both meet the same. Medians over the turns, ratios of turns, apart for
turns that met slower and faster memory where it changed by more than a third, and for those in which a virtual
machine's neighbours had more than a tenth of the cores while lmx ran. NF4 in blocks of 64 stands against llama.cpp's
Q4_0.

Needs the extra `compare`: llama-cpp-python (compiled on this machine), gguf, transformers and bitsandbytes
(`pip install -e '.[compare]'`, with CMAKE_ARGS=-DGGML_NATIVE=ON), and 20 GB of memory; --without leaves one out.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peers import rounds, turns
from peers.turns import Program, Turn

from lmx.presets import preset

LLAMA_CPP, TRANSFORMERS, SHALLOW = "llama.cpp Q4_0", "transformers + bitsandbytes NF4", "lmx, depth 0"
DEEP = 3968
_COLUMNS = ("model", "test", "beside", *turns.CELLS)


@dataclass(frozen=True)
class Test:
    """`kind` (tg or pp) of some tokens in each turn, behind `depth` others, beside another program if any."""

    kind: str
    peer: str | None = None
    depth: int = 0
    tokens: int = 4
    turns: int = 40

    @property
    def name(self) -> str:
        """As lmx bench and llama-bench have it."""
        kind = f"{self.kind}{self.tokens}" if self.kind == "pp" else self.kind
        return f"{kind}@{self.depth}" if self.depth else kind


@dataclass(frozen=True)
class Model:
    """One model: its hub name, how lmx runs it and its head, and what is timed."""

    hub: str
    scheme: str
    head: str
    tests: tuple[Test, ...]


def _prompt(peer: str | None = None) -> Test:
    return Test("pp", peer, tokens=512, turns=3)


MODELS = {
    "olmoe": Model(
        "allenai/OLMoE-1B-7B-0924",
        "nf4",
        "nf4",
        (
            Test("tg", LLAMA_CPP, turns=100),
            Test("tg", TRANSFORMERS, turns=45),
            Test("tg", LLAMA_CPP, DEEP, turns=30),
            _prompt(LLAMA_CPP),
        ),
    ),
    "falcon_mamba": Model(
        "tiiuae/falcon-mamba-7b",
        "nf4",
        "nf4",
        (
            Test("tg", LLAMA_CPP),
            Test("tg", TRANSFORMERS, turns=30),
            Test("tg", SHALLOW, DEEP, turns=40),
            _prompt(LLAMA_CPP),
        ),
    ),
    "recurrent_gemma": Model(
        "google/recurrentgemma-2b", "nf4", "nf4", (Test("tg"), Test("tg", SHALLOW, DEEP, turns=40), _prompt())
    ),
    "olmoe-int8": Model("allenai/OLMoE-1B-7B-0924", "int8", "int8", (Test("tg"), _prompt())),
    "falcon_mamba-int8": Model("tiiuae/falcon-mamba-7b", "int8", "int8", (Test("tg", turns=24),)),
}


def main() -> None:
    """Run all tests; print a row for each, or more where the machine changed."""
    options = _options()
    torch.set_num_threads(options.threads)
    _print(_COLUMNS)
    _print(["---"] * len(_COLUMNS))
    for name in options.models:
        peak, model = 0.0, MODELS[name]
        for test in _chosen(model, options):
            rounds.say(f"{name}: {test.name} beside {test.peer or 'nothing'}")
            taken = _take_turns(name, model, test, options)
            peak = max(peak, *(turn.peak_memory for turn in taken))
            for some in turns.by_machine(taken):
                _print([name, test.name, test.peer or "", *turns.cells(some)])
        rounds.say(f"{name}: lmx's peak of memory was {peak / 1e9:.2f} GB")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", type=Path, default=Path(), help="where the GGUF files are or will be written")
    parser.add_argument("--llama-python", default=sys.executable, help="the Python that has llama-cpp-python")
    parser.add_argument("--shallow", action="store_true", help=f"leave out depth {DEEP}, which takes most of the time")
    parser.add_argument("--without", nargs="*", choices=("llama.cpp", "transformers"), default=[])
    options = parser.parse_args()
    if "llama.cpp" not in options.without and shutil.which(options.llama_python) is None:
        parser.error(f"there is no {options.llama_python}: name the Python that has llama-cpp-python, or --without it")
    return options


def _chosen(model: Model, options: argparse.Namespace) -> list[Test]:
    """The tests, lmx alone where its peer is left out; the same test alone but once."""
    chosen: dict[object, Test] = {}
    for test in model.tests:
        if options.shallow and test.depth:
            continue
        left_out = test.peer is not None and test.peer.startswith(tuple(options.without))
        chosen.setdefault(test.name if left_out else test, replace(test, peer=None) if left_out else test)
    return list(chosen.values())


def _take_turns(name: str, model: Model, test: Test, options: argparse.Namespace) -> list[Turn]:
    with ExitStack() as stack:
        theirs = stack.enter_context(_peer(name, model, test, options)) if test.peer else None
        ours = stack.enter_context(_lmx(model, test.depth, options.threads))
        return turns.take_turns(ours, theirs, test.kind, test.tokens, test.turns)


def _lmx(model: Model, depth: int, threads: int) -> Program:
    shape = (model.hub, model.scheme, model.head, str(depth), str(threads))
    return Program([sys.executable, str(rounds.PEERS / "lmx_turns.py"), *shape])


@contextmanager
def _peer(name: str, model: Model, test: Test, options: argparse.Namespace) -> Iterator[Program]:
    threads = str(options.threads)
    if test.peer == SHALLOW:
        with _lmx(model, 0, options.threads) as program:
            yield program
    elif test.peer == LLAMA_CPP:
        path = rounds.random_gguf(name, options.folder, options.llama_python)
        room = test.turns * (test.tokens + 1)
        script = [options.llama_python, str(rounds.PEERS / "llama_cpp_turns.py"), str(path)]
        with Program([*script, str(test.depth), threads, str(room)]) as program:
            yield program
    else:
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump(preset(model.hub), file)
            file.flush()
            script = [sys.executable, str(rounds.PEERS / "transformers_turns.py")]
            with Program([*script, file.name, threads]) as program:
                yield program


def _print(row: "list[str] | tuple[str, ...]") -> None:
    sys.stdout.write(f"| {' | '.join(row)} |\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
