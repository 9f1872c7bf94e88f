"""Two programs, both loaded at once, a little of a test each in turn, the memory's bandwidth measured around lmx's.

Where others share the memory, what it gives may change between two runs by more than two programs differ: in turns,
both meet the same memory, and each turn's share is of what was measured beside it.
"""

import json
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from types import TracebackType

import torch
from peers.neighbours import Stolen

from lmx.core.ceilings import bandwidth_beside

SETTLE_SECONDS = 0.02
"""After each turn: threads that wait for more work would take the cores from the next program."""

DISTURBED = 0.1
"""Of the cores' time: where other machines had more of it, a turn stands apart. All threads wait for the one without a
core, and the measurement of bandwidth, the best of several reads, does not show it."""


class Program:
    """A program that is asked for tests, as `tg 4` or `pp 512`, and answers each with a line of JSON.

    It has read `depth` tokens before the first. Raises SystemExit, with the last that it said, where it ends by itself.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self._said = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115, open as long as the program is
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True
        )
        self._line()

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._said.close()

    def run(self, test: str) -> dict[str, float]:
        """What it says of one test, its `seconds` above all."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{test}\n")
        self._process.stdin.flush()
        answer: dict[str, float] = json.loads(self._line())
        time.sleep(SETTLE_SECONDS)
        return answer

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._said.seek(0)
            raise SystemExit(f"this ended before its time: {' '.join(self._command)}\n{self._said.read()[-2000:]}")
        return line


CELLS = ("turns", "stolen", "memory, GB/s", "lmx", "other", "lmx / other", "of the ceiling")


@dataclass(frozen=True)
class Turn:
    """Tokens a second of lmx and of the other program, if there is one; bytes of memory that a token of lmx reads and
    that could be read a second beside; lmx's peak of memory; the share of the cores' time that went to other machines
    while lmx ran.
    """

    lmx: float
    peer: float | None
    bytes_per_token: float
    bandwidth: float
    peak_memory: float
    stolen: float

    @property
    def share(self) -> float:
        """Of the bandwidth, that lmx reached."""
        return self.bytes_per_token * self.lmx / self.bandwidth


def take_turns(ours: Program, theirs: Program | None, kind: str, tokens: int, turns: int) -> list[Turn]:
    """So many turns of so many tokens, each program first in every other one."""
    return [_take_turn(ours, theirs, kind, tokens, bool(number % 2)) for number in range(turns)]


def _take_turn(ours: Program, theirs: Program | None, kind: str, tokens: int, ours_last: bool) -> Turn:
    device, test = torch.device("cpu"), f"{kind} {tokens}"
    speed = tokens / theirs.run(test)["seconds"] if theirs is not None and ours_last else None
    # Around lmx's turn and nothing else: what the memory gives changes within the second that another program takes.
    before = bandwidth_beside(device)
    time.sleep(SETTLE_SECONDS)
    neighbours = Stolen()
    answer = ours.run(test)
    stolen = neighbours.share()
    bandwidth = (before + bandwidth_beside(device)) / 2
    if theirs is not None and not ours_last:
        time.sleep(SETTLE_SECONDS)
        speed = tokens / theirs.run(test)["seconds"]
    return Turn(tokens / answer["seconds"], speed, answer["bytes"], bandwidth, answer["peak_memory"], stolen)


def by_machine(turns: Sequence[Turn]) -> list[list[Turn]]:
    """Turns apart in which the machine was not the same: others had more of the cores, or memory was slower."""
    disturbed = [[turn for turn in turns if (turn.stolen > DISTURBED) == much] for much in (True, False)]
    return [some for part in disturbed if part for some in _by_memory(part)]


def _by_memory(turns: Sequence[Turn]) -> list[list[Turn]]:
    """Turns with slower and with faster memory, or all of them where it was much the same."""
    bandwidths = sorted(turn.bandwidth for turn in turns)
    middle = (bandwidths[0] + bandwidths[-1]) / 2
    if bandwidths[-1] < 4 / 3 * bandwidths[0]:
        return [list(turns)]
    return [[turn for turn in turns if (turn.bandwidth > middle) == fast] for fast in (False, True)]


def cells(turns: Sequence[Turn]) -> list[str]:
    """Of a table's row what stands below `CELLS`; memory in GB/s, programs in tokens a second.

    Medians, the ratio of the turns' ratios. A prompt's share is not told: memory is not what limits it.
    """
    memory = median(turn.bandwidth for turn in turns) / 1e9
    stolen = median(turn.stolen for turn in turns)
    out = [str(len(turns)), f"{stolen:.0%}", f"{memory:.1f}", f"{median(turn.lmx for turn in turns):.2f}"]
    pairs = [(turn.lmx, turn.peer) for turn in turns if turn.peer is not None]
    if pairs:
        out += [f"{median(two for _, two in pairs):.2f}", f"{median(one / two for one, two in pairs):.2f}"]
    else:
        out += ["", ""]
    return [*out, f"{median(turn.share for turn in turns):.0%}" if turns[0].bytes_per_token else ""]
