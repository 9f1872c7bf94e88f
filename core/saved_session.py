"""A conversation on the disk, with its states: what `lmx chat --session NAME` goes on with after any end, kill -9 too.

A session is a folder: `session.jsonl` (see `lmx.core.session_record`), `turn-N.safetensors` with the state at the end
of turn N (of keys and values only the turn's own part, so that nothing is written twice; of a ring or a recurrence the
whole), and `lock`, held by the process that writes. A turn's state is in place before its line is written, and both
are synced: whatever is killed, the turns whose lines are whole can be continued.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Self

from lmx.core.conversation import Conversation, Message, Turn
from lmx.core.errors import ConflictError, InputError, LmxError, NotFoundError
from lmx.core.files import quoted, sync_folder, write_atomically
from lmx.core.session_folders import RECORD, cannot_write, session_folder, take_lock
from lmx.core.session_record import (
    Identity,
    branches_line,
    header_line,
    question_line,
    read_record,
    turn_line,
)

if TYPE_CHECKING:
    from lmx.core.model import AnyState


class OtherModelError(InputError):
    """The session was made with another model, or with the same one in another form."""


class SavedSession:
    """An open session, locked for this process until `close`. Use `create` or `open`."""

    def __init__(self, folder: Path, identity: Identity, lock: int, state_bytes: int | None) -> None:
        self.conversation = Conversation()
        """What was in it when it was opened."""
        self.waiting: tuple[Message, ...] = ()
        """A question in it that was not answered."""
        self.created: str | None = None
        self._folder, self._identity, self._lock = folder, identity, lock
        self._state_bytes = state_bytes
        self.load_state: Callable[[Path], AnyState] | None = None
        """How a state's file is read: `LanguageModel.load_state`."""
        self._known: set[int] = set()  # turns whose lines are written
        self._last_branches = b""
        self._file: BinaryIO | None = None

    @classmethod
    def create(cls, root: Path, name: str, identity: Identity, *, state_bytes: int | None = None) -> Self:
        """A new session. state_bytes: the most bytes of whole states to keep, the oldest being removed; None: all.

        Raises ConflictError where there is one of that name, UsageError for a name that cannot be, ResourceError.
        """
        folder = session_folder(root, name)
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            session = cls(folder, identity, take_lock(folder), state_bytes)
        except OSError as error:
            raise cannot_write(folder, error) from error
        if (folder / RECORD).exists():
            session.close()
            raise ConflictError(f"there is a session {quoted(name)} already", "choose another name, or load that one")
        return session

    @classmethod
    def open(
        cls,
        root: Path,
        name: str,
        identity: Identity,
        *,
        state_bytes: int | None = None,
        reread: bool = False,
    ) -> Self:
        """A saved session. reread: of another model keep the messages alone. state_bytes: as for `create`.

        Raises OtherModelError where the model is not the session's and not `reread`; NotFoundError, ConflictError where
        another process has it, UsageError for a name that cannot be, InputError for a damaged one.
        """
        folder = session_folder(root, name)
        if not (folder / RECORD).exists():
            raise NotFoundError(f"there is no session {quoted(name)}", "`lmx sessions list` shows those there are")
        session = cls(folder, identity, take_lock(folder), state_bytes)
        try:
            session._read(reread)
        except BaseException:
            session.close()
            raise
        return session

    @property
    def name(self) -> str:
        """What the user calls it."""
        return self._folder.name

    def begin(self, conversation: Conversation, state_of: "Callable[[Turn], AnyState | None]") -> None:
        """Write all of a conversation into a new session. Raises ResourceError."""
        for turn in conversation.alive().values():
            self._write_state(turn, state_of(turn))
        self._rewrite(conversation)

    def write_turn(self, turn: Turn, conversation: Conversation, state: "AnyState | None") -> None:
        """Add a turn with the state at its end. Raises ResourceError."""
        self._write_state(turn, state)
        self._append(self._missing(conversation) + branches_line(conversation))
        self._last_branches = branches_line(conversation)

    def write_branches(self, conversation: Conversation) -> None:
        """Note where the branches end now, and remove the states of turns that are gone. Raises ResourceError."""
        line = branches_line(conversation)
        if line != self._last_branches:
            self._append(self._missing(conversation) + line)
            self._last_branches = line
            self._sweep(conversation)

    def write_question(self, messages: tuple[Message, ...]) -> None:
        """Note what is being answered. Raises ResourceError."""
        self._append(question_line(messages))
        self._last_branches = b""

    def has_state(self, turn: Turn) -> bool:
        """Whether the turn's state is on the disk."""
        return turn.number in self._known and self._state_path(turn.number).exists()

    def read_state(self, turn: Turn) -> "AnyState | None":
        """The state; None where it is not there, or is not this turn's or this model's any more."""
        if self.load_state is None or not self.has_state(turn):
            return None
        try:
            return self.load_state(self._state_path(turn.number))
        except LmxError:
            return None

    def close(self) -> None:
        """Free the session for other processes; one in which nothing was said is removed. Safe to call twice."""
        if self._lock < 0:
            return
        if self._file is not None:
            self._file.close()
        if not self._known and not self.waiting and self._file is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        os.close(self._lock)
        self._lock, self._file = -1, None

    def _read(self, reread: bool) -> None:
        record = read_record(self._folder / RECORD)
        differences = record.identity.differences(self._identity)
        if differences and not reread:
            raise OtherModelError(
                f"the session {quoted(self.name)} cannot be continued as it is: this is {' and '.join(differences)}",
                "run it as it was made, or let this model read the messages again with --reread",
            )
        self.created, self.waiting = record.created, record.question
        self.conversation = _unread(record.conversation) if differences else record.conversation
        if differences or not record.whole:
            self._rewrite(self.conversation)
        else:
            self._known = set(self.conversation.alive())
            self._last_branches = branches_line(self.conversation) if not self.waiting else b""
        self._sweep(self.conversation, all_states=bool(differences))

    def _rewrite(self, conversation: Conversation) -> None:
        """The whole record anew, without what was taken back."""
        self._known = set()
        lines = [header_line(self._identity, self.created), self._missing(conversation), branches_line(conversation)]
        if self.waiting:
            lines.append(question_line(self.waiting))
        if self._file is not None:
            self._file.close()
            self._file = None
        write_atomically(self._folder / RECORD, b"".join(lines))
        self._open_file()
        self._last_branches = branches_line(conversation) if not self.waiting else b""

    def _missing(self, conversation: Conversation) -> bytes:
        """Lines for the turns that have none yet, parents first."""
        new = [turn for number, turn in sorted(conversation.alive().items()) if number not in self._known]
        self._known.update(turn.number for turn in new)
        return b"".join(map(turn_line, new))

    def _append(self, lines: bytes) -> None:
        try:
            file = self._open_file()
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
        except OSError as error:
            raise cannot_write(self._folder, error) from error

    def _open_file(self) -> BinaryIO:
        if self._file is None:
            self._file = (self._folder / RECORD).open("ab")
            sync_folder(self._folder)
        return self._file

    def _write_state(self, turn: Turn, state: "AnyState | None") -> None:
        if state is None or not state.length:
            return
        state.save(self._state_path(turn.number))
        if not state.rewinds and self._state_bytes is not None:
            self._trim(self._state_bytes, turn.number)

    def _trim(self, limit: int, newest: int) -> None:
        """Remove the oldest whole states past the limit, never the newest."""
        files = sorted(self._state_files(), reverse=True)
        for number, path in files:
            limit -= path.stat().st_size
            if limit < 0 and number != newest:
                path.unlink(missing_ok=True)

    def _sweep(self, conversation: Conversation, *, all_states: bool = False) -> None:
        """Remove the states of turns that are gone, and what a killed process left half written."""
        alive = {} if all_states else conversation.alive()
        for number, path in self._state_files():
            if number not in alive:
                path.unlink(missing_ok=True)
        for path in self._folder.glob(".*.partial"):
            path.unlink(missing_ok=True)

    def _state_files(self) -> list[tuple[int, Path]]:
        found = ((path.stem.removeprefix("turn-"), path) for path in self._folder.glob("turn-*.safetensors"))
        return [(int(number), path) for number, path in found if number.isascii() and number.isdigit()]

    def _state_path(self, number: int) -> Path:
        return self._folder / f"turn-{number}.safetensors"


def _unread(conversation: Conversation) -> Conversation:
    """The same turns without tokens and states."""
    turns: dict[int, Turn] = {}
    for number, turn in sorted(conversation.alive().items()):
        parent = None if turn.parent is None else turns[turn.parent.number]
        turns[number] = Turn(number, parent, turn.messages, turn.system)
    heads = [None if head is None else turns[head.number] for head in conversation.heads]
    return Conversation(heads, conversation.current, conversation.next_number)
