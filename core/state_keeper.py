"""The state of a conversation that has branches: brought to where a prompt goes on, from whatever is kept of it."""

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Protocol

from lmx.core.conversation import Turn, path_of
from lmx.core.snapshots import Snapshots, copies_within, reaches, rebuild
from lmx.core.turn_encoder import common_prefix

if TYPE_CHECKING:
    from lmx.core.model import AnyState, LanguageModel


class StoredStates(Protocol):
    """States of turns on a disk, as a `SavedSession` has them."""

    def has_state(self, turn: Turn) -> bool:
        """Whether the turn's state is there."""
        ...

    def read_state(self, turn: Turn) -> "AnyState | None":
        """The state; None where it is not there, or not any more what was written."""
        ...


class StateKeeper:
    """Owns the one live state and the copies to go back to.

    At every event of an answer and between turns the live state holds the first tokens of the list that was given to
    `bring`, which the caller goes on extending.
    """

    def __init__(self, model: "LanguageModel", limit_bytes: int) -> None:
        self.snapshots = Snapshots(limit_bytes)
        self.stored: StoredStates | None = None
        self.live: AnyState | None = None
        self._model = model
        self._ids: Sequence[int] = ()
        self._turn: Turn | None = None  # whose end the live state is at; none while it answers

    def bring(
        self, ids: Sequence[int], start: int, head: Turn | None, siblings: Sequence[Turn], alive: Collection[int]
    ) -> "AnyState":
        """Make the live state hold as much of the beginning of `ids` as can be had, at least one token short of all.

        start: how many of the tokens are those of `head`. siblings: turns behind `head`. alive: the numbers of the
        turns whose states are worth keeping when they have to be left.
        """
        shared = self._shared(ids, start, head)
        self._stow(shared, alive)
        state, self.live, self._turn = self.live, None, None
        if state is None:
            state = self._model.make_state(1)
        if state.rewinds:
            state.truncate(shared)
            rebuild(state, reaches(head, start, len(ids)), self._end_of)
        elif not 0 < state.length == shared:
            state = self._copy(ids, start, head, siblings) or self._model.make_state(1)
        self.live, self._ids = state, ids
        return state

    def settle(self, turn: Turn) -> None:
        """The answer is over: the live state is the turn's."""
        self._turn = turn

    def lose(self) -> None:
        """Forget the live state: it may be half written."""
        self.live, self._ids, self._turn = None, (), None

    def clear(self) -> None:
        """Forget everything."""
        self.lose()
        self.snapshots.clear()

    def keep_question(self, number: int) -> Callable[[], None]:
        """For `generate`'s before_last: take the copy from which turn `number` can be answered again."""

        def keep() -> None:
            if self.live is not None:
                self.snapshots.put(number, "question", self.live.clone())

        return keep

    def state_of(self, turn: Turn) -> "AnyState | None":
        """The state of a turn's end (of its own part alone, if it rewinds) from memory; not to be written to."""
        found = self.snapshots.get(turn.number, "end")
        if found is not None or self.live is None or self._turn is None:
            return found
        if self.live.rewinds:
            return self.live.part(turn.base, turn.held) if self._live_has(turn) else None
        return self.live if self._turn is turn and self.live.length == turn.held else None

    def _shared(self, ids: Sequence[int], start: int, head: Turn | None) -> int:
        """How many tokens of the live state are the prompt's."""
        if self.live is None:
            return 0
        if self._turn is not None and self._turn is head and self.live.length <= start:
            return min(self.live.length, len(ids) - 1)
        return min(common_prefix(self._ids[: self.live.length], ids), len(ids) - 1)

    def _stow(self, shared: int, alive: Collection[int]) -> None:
        """Keep what the live state is about to lose, for the turns that it belongs to."""
        if self.live is None or self._turn is None:
            return
        if not self.live.rewinds:
            if self.live.length == self._turn.held > 0 and self._turn.number in alive:
                goes_on = shared == self.live.length
                self.snapshots.put(self._turn.number, "end", self.live.clone() if goes_on else self.live)
            return
        if shared < self.live.length:
            for turn in path_of(self._turn):
                if turn.held > shared and turn.number in alive and not self._is_kept(turn) and self._live_has(turn):
                    self.snapshots.put(turn.number, "end", self.live.part(turn.base, turn.held))

    def _is_kept(self, turn: Turn) -> bool:
        return self.snapshots.has(turn.number, "end") or (self.stored is not None and self.stored.has_state(turn))

    def _live_has(self, turn: Turn) -> bool:
        """Whether the live state still has all of a turn's part: a later turn may have taken some of it back."""
        if self.live is None or not turn.base < turn.held <= self.live.length:
            return False
        ids = self._ids[turn.start : turn.held]
        return turn in path_of(self._turn) and list(ids) == list(turn.ids[: turn.held - turn.start])

    def _end_of(self, turn: Turn) -> "AnyState | None":
        found = self.snapshots.get(turn.number, "end")
        return self.stored.read_state(turn) if found is None and self.stored is not None else found

    def _copy(self, ids: Sequence[int], start: int, head: Turn | None, siblings: Sequence[Turn]) -> "AnyState | None":
        for tokens, turn, place in copies_within(reaches(head, start, len(ids)), siblings, ids, start):
            found = self.snapshots.get(turn.number, place)
            if found is not None and found.length == tokens:
                return found.clone()
            stored = self._end_of(turn) if place == "end" else None
            if stored is not None and stored.length == tokens:
                return stored
        return None
