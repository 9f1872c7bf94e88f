"""A conversation as a tree of turns, and the branches of it that are kept. Knows nothing of models.

Example: after three turns, /regen and /fork 1 the tree and its branches are

    1 - 2 - 3      branch 1: its last turn is 3
          - 4      branch 2: its last turn is 4, another answer to what turn 3 was asked
                   branch 3: its last turn is 1; what is said there next is a child of 1, like 2
"""

from collections.abc import Sequence
from dataclasses import dataclass

from lmx.core.errors import UsageError


@dataclass(frozen=True)
class Message:
    """One message of a conversation; role: system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True, eq=False)
class Turn:
    """What a person said and what was answered, behind the turns before it.

    messages: those that it adds. system: the system's message that it was read with. left_out: messages from the
    beginning of the conversation that it was read without, because the context was full.
    start, ids: its conversation's tokens are the first `start` of the parent's and then `ids`; no ids where it was
    never read. prompt_length: tokens before the answer. held: how many of the tokens the state had taken in at its
    end. text_start, text: the rendering that the answer follows, in the same way.
    """

    number: int
    parent: "Turn | None"
    messages: tuple[Message, ...]
    system: str | None = None
    left_out: int = 0
    start: int = 0
    ids: tuple[int, ...] = ()
    prompt_length: int = 0
    held: int = 0
    text_start: int = 0
    text: str = ""

    @property
    def depth(self) -> int:
        """How many turns the conversation has with this one."""
        return len(self.path())

    @property
    def was_read(self) -> bool:
        """Whether its tokens are known: those of loaded messages are not, until the next turn reads them."""
        return bool(self.ids)

    @property
    def length(self) -> int:
        """Tokens of the conversation up to here."""
        return self.start + len(self.ids)

    @property
    def base(self) -> int:
        """Where its own part of a state begins: the parent's tokens up to there are in the parent's part."""
        return 0 if self.parent is None else min(self.parent.held, self.start)

    @property
    def text_length(self) -> int:
        """Characters of the rendering."""
        return self.text_start + len(self.text)

    def path(self) -> "list[Turn]":
        """The turns from the first one to this one."""
        turns: list[Turn] = []
        turn: Turn | None = self
        while turn is not None:
            turns.append(turn)
            turn = turn.parent
        return turns[::-1]

    def all_ids(self) -> list[int]:
        """All tokens of the conversation up to here."""
        ids: list[int] = []
        for turn in self.path():
            del ids[turn.start :]
            ids += turn.ids
        return ids

    def all_text(self) -> str:
        """The rendering that its answer follows."""
        pieces: list[str] = []
        length = 0
        for turn in self.path():
            if turn.text_start < length:
                pieces = ["".join(pieces)[: turn.text_start]]
            pieces.append(turn.text)
            length = turn.text_length
        return "".join(pieces)

    def all_messages(self) -> list[Message]:
        """All messages up to here but the system's."""
        return [message for turn in self.path() for message in turn.messages]


def path_of(turn: Turn | None) -> list[Turn]:
    """The turns up to `turn`; none for the beginning."""
    return [] if turn is None else turn.path()


class Conversation:
    """The tree and its branches; one branch is the current one."""

    def __init__(self, heads: Sequence[Turn | None] = (None,), current: int = 0, next_number: int = 0) -> None:
        """heads: each branch's last turn, None for one where nothing was said yet."""
        self.heads = list(heads)
        self.current = current
        self.next_number = next_number

    @property
    def head(self) -> Turn | None:
        """The current branch's last turn."""
        return self.heads[self.current]

    def add(self, turn: Turn) -> None:
        """Make a turn whose parent is the head the new head."""
        self.heads[self.current] = turn
        self.next_number = max(self.next_number, turn.number + 1)

    def fork(self, turn: Turn | None) -> None:
        """Begin a branch behind `turn`, and go there."""
        self.heads.append(turn)
        self.current = len(self.heads) - 1

    def switch(self, branch: int) -> None:
        """Go to another branch, counted from 0. Raises UsageError."""
        if not 0 <= branch < len(self.heads):
            raise UsageError(f"there is no branch {branch + 1}", f"the branches are 1 to {len(self.heads)}")
        self.current = branch

    def remove_branch(self, branch: int) -> None:
        """Forget a branch; its turns stay as far as others have them."""
        self.heads.pop(branch)
        self.current -= self.current > branch or self.current == len(self.heads)

    def turns_back(self, count: int) -> Turn | None:
        """The turn that would be the last one without `count` turns. Raises UsageError where there are fewer."""
        path = path_of(self.head)
        if not 1 <= count <= len(path):
            there = {0: "nothing was said yet", 1: "there is one turn"}.get(len(path), f"there are {len(path)} turns")
            raise UsageError(f"{count} turns cannot be taken back", there)
        return path[-count].parent

    def alive(self) -> dict[int, Turn]:
        """Every turn of some branch, by its number."""
        found: dict[int, Turn] = {}
        for head in self.heads:
            turn = head
            while turn is not None and turn.number not in found:
                found[turn.number] = turn
                turn = turn.parent
        return found


def as_turns(messages: Sequence[Message], first_number: int) -> tuple[Turn | None, tuple[Message, ...]]:
    """Loaded messages as turns that were never read, each ending with an answer; and those behind the last answer."""
    head: Turn | None = None
    waiting: list[Message] = []
    for message in messages:
        waiting.append(message)
        if message.role == "assistant":
            head = Turn(first_number if head is None else head.number + 1, head, tuple(waiting))
            waiting = []
    return head, tuple(waiting)
