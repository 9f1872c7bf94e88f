"""What a saved session says: one JSON object a line, appended as things happen, so that a kill costs the last line.

    {"lmx_session": 1, "identity": {...}, "created": ...}               the first line
    {"turn": 0, "parent": null, "messages": [...], "ids": [...], ...}   an answered turn
    {"branches": [0], "current": 0}                                     each branch's last turn
    {"question": [...]}                                                 what is being answered now

A line that the process was killed in has no end, and is passed over. Everything else that is odd is an InputError.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeGuard, cast

from lmx.core.conversation import Conversation, Message, Turn
from lmx.core.errors import InputError
from lmx.core.files import quoted, read_bounded
from lmx.core.jsonfile import JSON, parse_json

MAX_RECORD_BYTES = 1 << 30
_VERSION = 1
_MAX_NUMBER = 2**31


@dataclass(frozen=True)
class Identity:
    """What must be the same for a saved state to be continued.

    model: what the user called it; revision: a digest of its config and weights; scheme: how its weights are held;
    template: a digest of chat template and tokenizer.
    """

    model: str
    revision: str
    scheme: str
    template: str

    def differences(self, other: "Identity") -> list[str]:
        """In what another one differs, in words. Names alone do not count: a folder may have been moved."""
        found = []
        if self.revision != other.revision:
            same = self.model == other.model
            found.append("another revision of its weights" if same else f"the model {other.model}, not {self.model}")
        if self.scheme != other.scheme:
            found.append(f"{other.scheme} weights, not {self.scheme}")
        if self.template != other.template:
            found.append("another chat template or tokenizer")
        return found


@dataclass(frozen=True)
class SessionRecord:
    """A session as its file tells it. question: messages that were not answered yet. whole: nothing to tidy up."""

    identity: Identity
    created: str
    conversation: Conversation
    question: tuple[Message, ...]
    whole: bool


def read_record(path: Path) -> SessionRecord:
    """Read a session's file. Raises NotFoundError, InputError."""
    data = read_bounded(path, MAX_RECORD_BYTES)
    *lines, rest = data.split(b"\n")
    reader = _Reader(path)
    for number, line in enumerate(lines, start=1):
        reader.take(parse_json(line, f"{quoted(str(path))}, line {number}"), number)
    return reader.record(whole=not rest)


def header_line(identity: Identity, created: str | None = None) -> bytes:
    """The first line of a new session."""
    return _line({"lmx_session": _VERSION, "identity": asdict(identity), "created": created or now()})


def turn_line(turn: Turn) -> bytes:
    """A turn."""
    about: dict[str, object] = {
        "turn": turn.number,
        "parent": None if turn.parent is None else turn.parent.number,
        "time": now(),
        "messages": [asdict(message) for message in turn.messages],
        "system": turn.system,
        "text": turn.text,
        "ids": list(turn.ids),
    }
    return _line(about | {name: getattr(turn, name) for name in _COUNTS})


_COUNTS = ("left_out", "start", "prompt_length", "held", "text_start")


def branches_line(conversation: Conversation) -> bytes:
    """Where the branches end; what was asked before is answered or taken back."""
    heads = [None if head is None else head.number for head in conversation.heads]
    return _line({"branches": heads, "current": conversation.current})


def question_line(messages: Iterable[Message]) -> bytes:
    """What is being answered."""
    return _line({"question": [asdict(message) for message in messages]})


def now() -> str:
    """The time, in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _line(entry: Mapping[str, object]) -> bytes:
    return json.dumps(entry).encode("ascii") + b"\n"


class _Reader:
    """Replays a file line by line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._identity: Identity | None = None
        self._created = ""
        self._turns: dict[int, Turn] = {}
        self._heads: list[Turn | None] = [None]
        self._current = 0
        self._question: tuple[Message, ...] = ()
        self._number = 0

    def take(self, entry: dict[str, JSON], number: int) -> None:
        """One line. Raises InputError."""
        self._number = number
        if self._identity is None:
            self._identity, self._created = self._header(entry), str(entry.get("created", ""))
        elif "turn" in entry:
            turn = self._turn(entry)
            self._turns[turn.number] = turn
        elif "branches" in entry:
            self._heads, self._current = self._branches(entry)
            self._question = ()
        elif "question" in entry:
            self._question = self._messages(entry["question"])
        else:
            raise self._error("says nothing that is known")

    def record(self, *, whole: bool) -> SessionRecord:
        """All that was read."""
        if self._identity is None:
            raise self._error("is not the beginning of a session")
        conversation = Conversation(self._heads, self._current, max(self._turns, default=-1) + 1)
        whole = whole and len(conversation.alive()) == len(self._turns)
        return SessionRecord(self._identity, self._created, conversation, self._question, whole)

    def _header(self, entry: dict[str, JSON]) -> Identity:
        identity = entry.get("identity")
        if entry.get("lmx_session") != _VERSION or not isinstance(identity, dict):
            raise self._error("is not the beginning of a session of this version of lmx")
        values = [identity.get(name) for name in ("model", "revision", "scheme", "template")]
        if not all(isinstance(value, str) for value in values):
            raise self._error("does not say which model the session is of")
        return Identity(*map(str, values))

    def _turn(self, entry: dict[str, JSON]) -> Turn:
        number, parent, ids, text = (entry.get(key) for key in ("turn", "parent", "ids", "text"))
        system = entry.get("system")
        counts = [entry.get(name) for name in _COUNTS]
        if not _is_count(number) or number in self._turns or not all(_is_count(count) for count in counts):
            raise self._error("has no number, or one that is taken, or a wrong count")
        if not (parent is None or (_is_count(parent) and parent in self._turns)) or not isinstance(text, str):
            raise self._error("follows a turn that does not exist, or has no text")
        if not isinstance(ids, list) or not all(_is_count(token) for token in ids):
            raise self._error("has no list of token ids")
        if system is not None and not isinstance(system, str):
            raise self._error("has a system's message that is no text")
        before = None if parent is None else self._turns[parent]
        left_out, start, prompt_length, held, text_start = (cast(int, count) for count in counts)
        turn = Turn(
            number=number,
            parent=before,
            messages=self._messages(entry.get("messages")),
            system=system,
            left_out=left_out,
            start=start,
            ids=tuple(cast("list[int]", ids)),
            prompt_length=prompt_length,
            held=held,
            text_start=text_start,
            text=text,
        )
        self._check(turn)
        return turn

    def _check(self, turn: Turn) -> None:
        """The counts must lie within what there is."""
        before = (0, 0) if turn.parent is None else (turn.parent.length, turn.parent.text_length)
        if turn.start > before[0] or turn.text_start > before[1]:
            raise self._error("shares more with the turn before than that has")
        if turn.ids and not turn.start <= turn.prompt_length <= turn.length:
            raise self._error("has an answer outside of its tokens")
        if turn.held > turn.length or not turn.messages:
            raise self._error("holds more tokens than there are, or says nothing")

    def _branches(self, entry: dict[str, JSON]) -> tuple[list[Turn | None], int]:
        heads, current = entry.get("branches"), entry.get("current")
        if not isinstance(heads, list) or not _is_count(current) or not current < len(heads):
            raise self._error("has no list of branches, or no current one")
        if not all(head is None or (_is_count(head) and head in self._turns) for head in heads):
            raise self._error("names a branch of a turn that does not exist")
        return [None if head is None else self._turns[cast(int, head)] for head in heads], current

    def _messages(self, value: JSON) -> tuple[Message, ...]:
        messages = []
        for item in value if isinstance(value, list) else [None]:
            role, content = (item.get("role"), item.get("content")) if isinstance(item, dict) else (None, None)
            if not isinstance(role, str) or not isinstance(content, str):
                raise self._error("has a message without a role or a text")
            messages.append(Message(role, content))
        return tuple(messages)

    def _error(self, what: str) -> InputError:
        hint = "the file was damaged or edited; `lmx sessions rm` removes the session"
        return InputError(f"{quoted(str(self._path))}: line {max(1, self._number)} {what}", hint)


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MAX_NUMBER
