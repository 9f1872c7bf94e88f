"""Copies of a state to go back to, within a bound of bytes, and how the longest beginning of a prompt is had from them.

A state that rewinds (full keys and values) is cut by its length; what is cut off is kept for the branch that it belongs
to. Any other (a ring, a recurrence) is gone back to from whole copies, taken at a turn's end and before an answer.
"""

import os
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lmx.core.conversation import Turn, path_of

if TYPE_CHECKING:
    from lmx.core.model import AnyState

DEFAULT_BYTES = 2 << 30
"""At most so much memory goes to copies; on a small machine an eighth of what it has."""

Place = Literal["end", "question"]
"""Of what a copy is: of a turn's end (of its own part alone, if the state rewinds), or of its prompt but one token."""


def default_bytes() -> int:
    """The bound where none is given."""
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return DEFAULT_BYTES
    return min(DEFAULT_BYTES, memory // 8)


class Snapshots:
    """Copies by turn and place; past the bound, those that were not used for longest are forgotten first."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.nbytes = 0
        """Bytes of all copies."""
        self._copies: OrderedDict[tuple[int, Place], tuple[AnyState, int]] = OrderedDict()

    def has(self, turn: int, place: Place) -> bool:
        """Whether there is such a copy."""
        return (turn, place) in self._copies

    def put(self, turn: int, place: Place, state: "AnyState") -> None:
        """Take a copy over. One that is larger than the bound is not kept."""
        self._drop((turn, place))
        self._copies[turn, place] = state, state.nbytes
        self.nbytes += state.nbytes
        while self.nbytes > self.limit_bytes:
            self._drop(next(iter(self._copies)))

    def get(self, turn: int, place: Place) -> "AnyState | None":
        """The copy, which stays the store's own; None where there is none, or none any more."""
        if (turn, place) not in self._copies:
            return None
        self._copies.move_to_end((turn, place))
        return self._copies[turn, place][0]

    def forget(self, turn: int) -> None:
        """Drop the copies of a turn."""
        self._drop((turn, "end"))
        self._drop((turn, "question"))

    def keep_only(self, turns: Collection[int]) -> None:
        """Drop the copies of all other turns."""
        for key in [key for key in self._copies if key[0] not in turns]:
            self._drop(key)

    def clear(self) -> None:
        """Drop all copies."""
        self._copies.clear()
        self.nbytes = 0

    def _drop(self, key: tuple[int, Place]) -> None:
        _, nbytes = self._copies.pop(key, (None, 0))
        self.nbytes -= nbytes


@dataclass(frozen=True)
class Reach:
    """How much of a prompt some turn's state may hold: `tokens`, from the beginning, are the prompt's own."""

    turn: Turn
    tokens: int


def reaches(head: Turn | None, start: int, prompt_length: int) -> list[Reach]:
    """For a prompt that shares `start` tokens with `head`: how far each turn of the path agrees with it, first to last.

    One token less than the prompt at most: the last one has to be fed, for its logits.
    """
    bound = min(start, prompt_length - 1)
    found: list[Reach] = []
    for turn in reversed(path_of(head)):
        found.append(Reach(turn, bound))
        bound = min(bound, turn.start)
    return found[::-1]


def rebuild(state: "AnyState", path: Sequence[Reach], part_of: "Callable[[Turn], AnyState | None]") -> None:
    """Extend a state that rewinds, and holds a beginning of the prompt, with the parts that are kept of the turns."""
    for reach in path:
        end = min(reach.turn.held, reach.tokens)
        if end > state.length >= reach.turn.base:
            part = part_of(reach.turn)
            if part is None or part.length != reach.turn.held - reach.turn.base:
                return
            state.extend(part.part(state.length - reach.turn.base, end - reach.turn.base))


def copies_within(
    path: Sequence[Reach], siblings: Sequence[Turn], ids: Sequence[int], start: int
) -> list[tuple[int, Turn, Place]]:
    """The copies of a state that does not rewind which a prompt could go on from, (tokens, turn, place), best first.

    siblings: other turns behind the same one; start: as in `reaches`.
    """
    found: list[tuple[int, Turn, Place]] = []
    for reach in path:
        if reach.turn.held <= reach.tokens:
            found.append((reach.turn.held, reach.turn, "end"))
        if reach.turn.prompt_length - 1 <= reach.tokens:
            found.append((reach.turn.prompt_length - 1, reach.turn, "question"))
    for turn in siblings:
        question = list(turn.ids[: turn.prompt_length - turn.start])
        if turn.start <= start and list(ids[turn.start : turn.prompt_length]) == question:
            found.append((turn.prompt_length - 1, turn, "question"))
    return sorted((item for item in found if item[0] > 0), key=lambda item: item[0], reverse=True)
