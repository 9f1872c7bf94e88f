"""A conversation over kept states: each turn computes only the tokens that are new, on whatever branch it is said.

Example, a ChatML model. Upper line: the session's `ids` after a turn; the state holds all but the last of them, because
a stop token is never fed. Lower line: the next turn, of which the state lacks what stands after the bar:

    <|im_start|>user Hi<|im_end|> <|im_start|>assistant Hel lo<|im_end|>
    <|im_start|>user Hi<|im_end|> <|im_start|>assistant Hel lo | <|im_end|> <|im_start|>user Bye<|im_end|> ...

"Hel", "lo" are the tokens that the model produced. Rendered again, the conversation may well have "Hello" there, and a
state that went through "Hel", "lo" would have to be recomputed; so what follows the reply is appended to what is kept
(`lmx.core.turn_encoder` says when that may be done).
"""

import threading
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING

from lmx.core.answer import Event
from lmx.core.conversation import Conversation, Message, Turn, as_turns, path_of
from lmx.core.errors import LmxError, UsageError
from lmx.core.sampling import Sampling
from lmx.core.turn_runner import OnFull, Options, Question, TurnRunner

if TYPE_CHECKING:
    from lmx.core.model import LanguageModel
    from lmx.core.saved_session import SavedSession
    from lmx.core.text.types import TextCodec

__all__ = ["ChatSession", "Message", "OnFull"]

_NEARLY_FULL = 8  # a warning is due when less than an eighth of the context is left


class ChatSession:
    """Talks with a model, turn by turn.

    `sampling`, `max_new_tokens` (None: what is left of the context), `stop_strings` and `on_full` may be changed
    between turns. With a seed, the first answer draws with it, the next with seed + 1, and so on.
    """

    def __init__(
        self,
        model: "LanguageModel",
        text_engine: "TextCodec",
        sampling: Sampling,
        *,
        stop_ids: frozenset[int] = frozenset(),
        system: str | None = None,
        max_new_tokens: int | None = None,
        stop_strings: Sequence[str] = (),
        on_full: OnFull = "stop",
        snapshot_bytes: int | None = None,
    ) -> None:
        """stop_ids: beside the text engine's own end-of-turn tokens, which always end an answer.

        snapshot_bytes: the most memory for copies of the state to go back to; past it the oldest are forgotten, and
        what they held is read again if it is needed. None: 2 GiB, or an eighth of the machine's memory.
        """
        self.sampling = sampling
        self.max_new_tokens = max_new_tokens
        self.stop_strings = tuple(stop_strings)
        self.on_full: OnFull = on_full
        self.save_error: LmxError | None = None
        """Why the last turn could not be saved, if so; the conversation then goes on without being saved."""
        self._model = model
        self._runner = TurnRunner(model, text_engine, stop_ids, snapshot_bytes)
        self._keeper = self._runner.keeper
        self._conversation = Conversation()
        self._system = system
        self._waiting: tuple[Message, ...] = ()  # loaded messages behind the last answer
        self._answering = False
        self._saved: SavedSession | None = None

    @property
    def messages(self) -> list[Message]:
        """The conversation so far on this branch, the system's message first if there is one."""
        own = [Message("system", self._system)] if self._system is not None else []
        head = self._conversation.head
        return [*own, *(head.all_messages() if head else ()), *self._waiting]

    @property
    def turns(self) -> list[Turn]:
        """The answered turns of this branch."""
        return path_of(self._conversation.head)

    @property
    def branches(self) -> list[Turn | None]:
        """Each branch's last turn; None for one where nothing was said yet."""
        return list(self._conversation.heads)

    @property
    def branch(self) -> int:
        """Which of the branches is talked on, counted from 0."""
        return self._conversation.current

    @property
    def ids(self) -> list[int]:
        """All tokens of the conversation as the model saw or produced them; during an answer, those of it so far."""
        return list(self._runner.ids)

    @property
    def prompt_ids(self) -> list[int]:
        """The tokens that the last answer followed."""
        return self._runner.prompt_ids

    @property
    def system(self) -> str | None:
        """The system's message."""
        return self._system

    @property
    def system_merged(self) -> bool:
        """Whether the last turn's template had no system role, so that its text went into the first user message."""
        return self._runner.system_merged

    @property
    def waiting(self) -> list[Message]:
        """Messages behind the last answer, which `answer` answers: of loaded ones, or of a session that was killed."""
        return list(self._waiting)

    @property
    def left_out(self) -> int:
        """How many of the oldest messages the model does not read any more (`on_full` "drop")."""
        head = self._conversation.head
        return 0 if head is None else head.left_out

    @property
    def context_used(self) -> int:
        """Tokens of the conversation so far."""
        return len(self._runner.ids)

    @property
    def context_length(self) -> int | None:
        """Tokens that the model was made for; None where it has no such limit."""
        return self._model.context_length

    @property
    def is_nearly_full(self) -> bool:
        """Whether the conversation will soon reach the end of the context."""
        length = self.context_length
        return length is not None and (length - self.context_used) * _NEARLY_FULL < length

    @property
    def snapshot_bytes(self) -> int:
        """Memory that the copies of states take now."""
        return self._keeper.snapshots.nbytes

    @property
    def state_bytes(self) -> int:
        """Memory that the state takes now."""
        return 0 if self._keeper.live is None else self._keeper.live.nbytes

    @property
    def saved(self) -> "SavedSession | None":
        """Where the conversation is saved, turn by turn."""
        return self._saved

    def ask(self, text: str, cancel: threading.Event | None = None) -> Generator[Event, None, None]:
        """Say `text` and yield the events of the answer.

        An answer that is cancelled, by `cancel` or by closing the iterator, stays in the conversation as far as it
        came. Raises what `encode_chat` and `generate` raise, at the first event or later; the session is then as it
        was before the turn.
        """
        return self._answer((Message("user", text),), cancel)

    def answer(self, cancel: threading.Event | None = None) -> Generator[Event, None, None]:
        """Answer the user's message that a loaded conversation ends with; as `ask`."""
        return self._answer((), cancel)

    def regenerate(self, cancel: threading.Event | None = None) -> Generator[Event, None, None]:
        """Answer the last message once more, on a new branch; the first answer stays on its own. Else as `ask`."""
        return self._ask_again(self._last_turn().messages[:-1], cancel)

    def edit(self, text: str, cancel: threading.Event | None = None) -> Generator[Event, None, None]:
        """Say `text` instead of the last message, on a new branch; the old one stays. Else as `ask`."""
        return self._ask_again((*self._last_turn().messages[:-2], Message("user", text)), cancel)

    def undo(self, count: int = 1) -> None:
        """Take the last turns back. What no other branch has of them is forgotten. Raises UsageError.

        Messages that wait for an answer count as a turn.
        """
        self._check_idle()
        if self._waiting:
            self._waiting, count = (), count - 1
            self._moved()
        if not count:
            return
        turn = self._conversation.turns_back(count)
        self._conversation.heads[self.branch] = turn
        self._moved()

    def fork(self, turns: int | None = None) -> None:
        """Begin a branch behind the first `turns` turns of this one, None for all, and go there. Raises UsageError."""
        self._check_idle()
        path = self.turns
        count = len(path) if turns is None else turns
        if not 0 <= count <= len(path):
            raise UsageError(f"there is no turn {count}", f"this branch has {len(path)} turns")
        self._conversation.fork(path[count - 1] if count else None)
        self._waiting = ()
        self._moved()

    def switch(self, branch: int) -> None:
        """Go on with another branch, counted from 0. Raises UsageError."""
        self._check_idle()
        self._conversation.switch(branch)
        self._waiting = ()
        self._moved()

    def load_messages(self, messages: Sequence[Message]) -> None:
        """Replace the conversation and its branches. A system message among `messages` replaces the session's own.

        What the state has in common with the new conversation is used.
        """
        self._check_idle()
        if messages and messages[0].role == "system":
            self._system, messages = messages[0].content, messages[1:]
        number = self._conversation.next_number
        head, self._waiting = as_turns(messages, number)
        self._conversation = Conversation([head], next_number=number if head is None else head.number + 1)
        self._moved()

    def set_system(self, text: str | None) -> None:
        """Replace the system's message, None for none. The next turn reads the conversation again."""
        self._check_idle()
        self._system = text

    def clear(self) -> None:
        """Forget the conversation but for the system's message, and free the states. What is saved stays saved."""
        self._check_idle()
        self.detach()
        self._conversation, self._waiting = Conversation(), ()
        self._runner.go_to(None)
        self._keeper.clear()

    def save_to(self, saved: "SavedSession") -> None:
        """Save the conversation in a new session, and from now on each turn. Raises ResourceError, ConflictError."""
        self._check_idle()
        saved.begin(self._conversation, self._keeper.state_of)
        self.detach()
        saved.load_state = self._model.load_state
        self._saved = self._keeper.stored = saved
        self.save_error = None

    def resume(self, saved: "SavedSession") -> None:
        """Go on with a saved conversation; each turn is saved there. Nothing of it is computed again."""
        self.clear()
        self._conversation, self._waiting = saved.conversation, saved.waiting
        head = self._conversation.head
        if head is not None:
            self._system = head.system
        saved.load_state = self._model.load_state
        self._saved = self._keeper.stored = saved
        self._moved()

    def detach(self) -> None:
        """Save no more; the session on the disk is free for others."""
        if self._saved is not None:
            self._saved.close()
        self._saved = self._keeper.stored = None

    def _last_turn(self) -> Turn:
        self._check_idle()
        head = self._conversation.head
        if self._waiting or head is None or [m.role for m in head.messages[-2:]] != ["user", "assistant"]:
            raise UsageError("there is no answered message", "say something first")
        return head

    def _moved(self) -> None:
        """The head is another turn: drop what belongs to no branch any more, and say so on the disk."""
        self._runner.go_to(self._conversation.head)
        self._keeper.snapshots.keep_only(self._conversation.alive())
        self._save(lambda saved: saved.write_branches(self._conversation))

    def _check_idle(self) -> None:
        if self._answering:
            raise UsageError("an answer is still being generated", "read its events to the end, or close the iterator")

    def _ask_again(self, added: tuple[Message, ...], cancel: threading.Event | None) -> Generator[Event, None, None]:
        """Answer on a branch of its own, which goes away again if it comes to nothing."""
        before, head = self.branch, self._last_turn()
        self._conversation.fork(head.parent)
        self._runner.go_to(head.parent)
        try:
            yield from self._answer(added, cancel)
        finally:
            if self._conversation.head is head.parent:
                self._conversation.remove_branch(self.branch)
                self._conversation.switch(before)
                self._runner.go_to(head)

    def _answer(self, added: tuple[Message, ...], cancel: threading.Event | None) -> Generator[Event, None, None]:
        self._check_idle()
        added = (*self._waiting, *added)
        conversation = self._conversation
        question = Question(conversation.next_number, conversation.head, added, self._system, conversation.alive())
        options = Options(self.sampling, self.max_new_tokens, self.stop_strings, self.on_full)
        draft = self._runner.begin(question, options)
        self._save(lambda saved: saved.write_question(added))
        self._answering = True
        try:
            yield from self._runner.events(draft, cancel, self._add)
        finally:
            self._answering = False

    def _add(self, turn: Turn) -> None:
        """An answer is over: its turn is the branch's last one."""
        self._conversation.add(turn)
        self._waiting = ()
        self._save(lambda saved: saved.write_turn(turn, self._conversation, self._keeper.state_of(turn)))

    def _save(self, write: "Callable[[SavedSession], None]") -> None:
        """Write to the saved session, if there is one. What goes wrong there does not end the conversation."""
        if self._saved is None:
            return
        try:
            write(self._saved)
        except LmxError as error:
            self.save_error = error
            self.detach()
