"""lmx and llama.cpp generating a few tokens each in turn, both loaded at once, the memory's bandwidth measured between.

    python benchmarks/turns.py --folder /somewhere/with/9GB [--models olmoe falcon_mamba] [--turns 40]

Where others share the memory, what it gives may change between two runs of `compare.py` by more than the programs
differ: here both meet the same memory, and each turn's share is of what was measured beside it. Medians over the turns,
apart for turns that met slower and faster memory if it changed by more than a third. Models that llama.cpp does not run
are timed alone. It needs what `compare.py` needs, but transformers.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from compare import MODELS, Model
from peers import rounds

from lmx.core.ceilings import bandwidth_beside

SETTLE_SECONDS = 0.02
"""After each turn: threads that wait for more work would take the cores from the next program."""


class Program:
    """A program that generates when asked to."""

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if self._line() != "ready":
            raise SystemExit(f"{' '.join(command)} did not start")

    def generate(self, tokens: int) -> dict[str, float]:
        """What it says of so many tokens."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{tokens}\n")
        self._process.stdin.flush()
        answer: dict[str, float] = json.loads(self._line())
        time.sleep(SETTLE_SECONDS)
        return answer

    def end(self) -> None:
        """Let it go."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("a program ended while it was asked to generate")
        return line.strip()


@dataclass(frozen=True)
class Turn:
    """Tokens a second of each program, lmx's bytes a token, and bytes of memory read a second beside them."""

    lmx: float
    llama_cpp: float | None
    bytes_per_token: float
    bandwidth: float

    @property
    def share(self) -> float:
        """Of the bandwidth, that lmx reached."""
        return self.bytes_per_token * self.lmx / self.bandwidth


def main() -> None:
    """Take turns with each model; print a line for each."""
    options = _options()
    torch.set_num_threads(options.threads)
    sys.stdout.write(
        "| model | depth | turns | memory, GB/s | lmx | llama.cpp Q4_0 | lmx / llama.cpp | of the ceiling |\n"
    )
    sys.stdout.write("|---|---|---|---|---|---|---|---|\n")
    for name in options.models:
        turns = _take_turns(name, MODELS[name], options)
        for some in _by_memory(turns):
            sys.stdout.write(_row(name, options.depth, some) + "\n")
        sys.stdout.flush()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=4, help="that each program generates in a turn")
    parser.add_argument("--depth", type=int, default=0, help="tokens before")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", type=Path, default=Path(), help="where the GGUF files are or will be written")
    parser.add_argument("--llama-python", default=sys.executable, help="the Python that has llama-cpp-python")
    parser.add_argument("--alone", action="store_true", help="without llama.cpp")
    return parser.parse_args()


def _take_turns(name: str, model: Model, options: argparse.Namespace) -> list[Turn]:
    scheme = {"4bit": "nf4", "8bit": "int8"}[model.scheme]
    shape = [model.hub, scheme, model.head, str(options.depth), str(options.threads)]
    ours = Program([sys.executable, str(rounds.PEERS / "lmx_turns.py"), *shape])
    theirs = None
    if model.llama_cpp and not options.alone:
        path = rounds.random_gguf(name, options.folder, options.llama_python)
        room = (options.turns + 1) * options.tokens
        numbers = [str(options.depth), str(options.threads), str(room)]
        theirs = Program([options.llama_python, str(rounds.PEERS / "llama_cpp_turns.py"), str(path), *numbers])
    turns = [_take_turn(ours, theirs, options.tokens, bool(number % 2)) for number in range(options.turns)]
    for program in (ours, theirs):
        if program is not None:
            program.end()
    return turns


def _take_turn(ours: Program, theirs: Program | None, tokens: int, ours_last: bool) -> Turn:
    device = torch.device("cpu")
    before = bandwidth_beside(device)
    time.sleep(SETTLE_SECONDS)
    speed = None
    if theirs is not None and ours_last:
        speed = tokens / theirs.generate(tokens)["seconds"]
    answer = ours.generate(tokens)
    if theirs is not None and not ours_last:
        speed = tokens / theirs.generate(tokens)["seconds"]
    return Turn(tokens / answer["seconds"], speed, answer["bytes"], (before + bandwidth_beside(device)) / 2)


def _by_memory(turns: list[Turn]) -> list[list[Turn]]:
    """Turns with slower and with faster memory, or all of them where it was much the same."""
    bandwidths = sorted(turn.bandwidth for turn in turns)
    middle = (bandwidths[0] + bandwidths[-1]) / 2
    if bandwidths[-1] < 4 / 3 * bandwidths[0]:
        return [turns]
    return [[turn for turn in turns if (turn.bandwidth > middle) == fast] for fast in (False, True)]


def _row(name: str, depth: int, turns: list[Turn]) -> str:
    memory = median(turn.bandwidth for turn in turns) / 1e9
    ours, share = median(turn.lmx for turn in turns), median(turn.share for turn in turns)
    cells = [name, str(depth), str(len(turns)), f"{memory:.1f}", f"{ours:.2f}"]
    pairs = [(turn.lmx, turn.llama_cpp) for turn in turns if turn.llama_cpp is not None]
    if pairs:
        cells += [f"{median(two for _, two in pairs):.2f}", f"{median(one / two for one, two in pairs):.2f}"]
    else:
        cells += ["", ""]
    return f"| {' | '.join([*cells, f'{share:.0%}'])} |"


if __name__ == "__main__":
    main()
