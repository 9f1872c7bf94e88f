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
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from lmx.core.answer import Event, Finished, StopStrings, Token
from lmx.core.context_end import first_kept
from lmx.core.conversation import Conversation, Message, Turn, as_turns, path_of
from lmx.core.errors import InputError, LmxError, UsageError
from lmx.core.generate import check_prompt, generate
from lmx.core.sampling import Sampling
from lmx.core.snapshots import default_bytes
from lmx.core.state_keeper import StateKeeper
from lmx.core.turn_encoder import Prompt, TurnEncoder

if TYPE_CHECKING:
    from lmx.core.model import LanguageModel
    from lmx.core.saved_session import SavedSession
    from lmx.core.text.types import TextCodec

__all__ = ["ChatSession", "Message", "OnFull"]

OnFull = Literal["stop", "drop"]
"""Where the context is full: end there, or leave out the oldest turns and read the others again."""

_NEARLY_FULL = 8  # a warning is due when less than an eighth of the context is left


@dataclass(frozen=True)
class _Draft:
    """A turn that is being answered."""

    number: int
    head: Turn | None
    added: tuple[Message, ...]
    prompt: Prompt
    left_out: int


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
        self._text_engine = text_engine
        self._stop_ids = stop_ids | frozenset(text_engine.info.end_of_turn_ids)
        self._encoder = TurnEncoder(text_engine, self._stop_ids)
        self._keeper = StateKeeper(model, default_bytes() if snapshot_bytes is None else snapshot_bytes)
        self._conversation = Conversation()
        self._system = system
        self._waiting: tuple[Message, ...] = ()  # loaded messages behind the last answer
        self._ids: list[int] = []
        self._prompt_length = 0
        self._system_merged = False
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
        return list(self._ids)

    @property
    def prompt_ids(self) -> list[int]:
        """The tokens that the last answer followed."""
        return self._ids[: self._prompt_length]

    @property
    def system(self) -> str | None:
        """The system's message."""
        return self._system

    @property
    def system_merged(self) -> bool:
        """Whether the last turn's template had no system role, so that its text went into the first user message."""
        return self._system_merged

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
        return len(self._ids)

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
        self._ids, self._prompt_length = [], 0
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
        head = self._conversation.head
        self._ids = [] if head is None else head.all_ids()
        self._prompt_length = 0 if head is None else head.prompt_length
        alive = self._conversation.alive()
        self._keeper.snapshots.keep_only(alive)
        self._save(lambda saved: saved.write_branches(self._conversation))

    def _check_idle(self) -> None:
        if self._answering:
            raise UsageError("an answer is still being generated", "read its events to the end, or close the iterator")

    def _ask_again(self, added: tuple[Message, ...], cancel: threading.Event | None) -> Generator[Event, None, None]:
        """Answer on a branch of its own, which goes away again if it comes to nothing."""
        before, head = self.branch, self._last_turn()
        ids, length = self._ids, self._prompt_length
        self._conversation.fork(head.parent)
        self._ids = [] if head.parent is None else head.parent.all_ids()
        try:
            yield from self._answer(added, cancel)
        finally:
            if self._conversation.head is head.parent:
                self._conversation.remove_branch(self.branch)
                self._conversation.switch(before)
                self._ids, self._prompt_length = ids, length

    def _answer(self, added: tuple[Message, ...], cancel: threading.Event | None) -> Generator[Event, None, None]:
        self._check_idle()
        before = self._ids, self._prompt_length
        draft = self._begin(added)
        self._answering = True
        try:
            yield from self._events(draft, cancel)
        except GeneratorExit:
            if self._conversation.next_number == draft.number:
                self._end(draft)
            raise
        except BaseException:
            # The model may have been stopped between two layers: only a copy from before it ran is sure to be whole.
            self._ids, self._prompt_length = before
            self._keeper.lose()
            self._keeper.snapshots.forget(draft.number)
            raise
        finally:
            self._answering = False

    def _begin(self, added: tuple[Message, ...]) -> _Draft:
        """Bring ids and state to where the answer begins; whatever can be wrong with the messages is raised first."""
        conversation = self._conversation
        head, added = conversation.head, (*self._waiting, *added)
        if not added or added[-1].role != "user":
            raise InputError("the conversation does not end with a user's message", "add a message with the role user")
        prompt, left_out = self._encode(head, added)
        check_prompt(self._model, prompt.ids, prompt.start)
        alive = conversation.alive()
        siblings = [turn for turn in alive.values() if turn.parent is head and turn.was_read]
        self._ids = list(prompt.ids)
        self._prompt_length = len(prompt.ids)
        self._keeper.bring(self._ids, prompt.start, head, siblings, alive)
        self._system_merged = prompt.system_merged
        self._save(lambda saved: saved.write_question(added))
        return _Draft(conversation.next_number, head, added, prompt, left_out)

    def _encode(self, head: Turn | None, added: tuple[Message, ...]) -> tuple[Prompt, int]:
        """The prompt, and how many messages are left out of it: as before, or more if they no longer fit."""
        left_out = 0 if head is None else head.left_out
        prompt = self._encoder.encode(head, self._ids, self._system, left_out, added)
        length = self.context_length
        if self.on_full == "stop" or length is None or len(prompt.ids) + self._room(length) <= length:
            return prompt, left_out
        for more in first_kept(self.turns, left_out, added, len(prompt.ids), length // 2):
            prompt, left_out = self._encoder.encode(head, self._ids, self._system, more, added), more
            if len(prompt.ids) + self._room(length) <= length:
                break
        return prompt, left_out

    def _room(self, context_length: int) -> int:
        """Tokens that should be left for an answer."""
        most = context_length // 4
        return most if self.max_new_tokens is None else min(most, self.max_new_tokens)

    def _events(self, draft: _Draft, cancel: threading.Event | None) -> Generator[Event, None, None]:
        """Generate, keeping `ids` in step with the state."""
        state = self._keeper.live
        for event in generate(
            self._model,
            self._text_engine,
            self.prompt_ids,
            sampling=self._seeded(draft.number),
            max_new_tokens=self.max_new_tokens,
            stop_strings=self.stop_strings,
            stop_ids=self._stop_ids,
            state=state,
            cancel=cancel,
            before_last=None if state is None or state.rewinds else self._keeper.keep_question(draft.number),
        ):
            if isinstance(event, Token):
                self._ids.append(event.id)
            if isinstance(event, Finished):
                self._end(draft)
            yield event

    def _seeded(self, number: int) -> Sampling:
        if self.sampling.seed is None:
            return self.sampling
        return replace(self.sampling, seed=(self.sampling.seed + number) % 2**63)

    def _end(self, draft: _Draft) -> None:
        """Put the answer, as far as it came, into the conversation."""
        reply = self._ids[self._prompt_length :]
        by_token = bool(reply) and reply[-1] in self._stop_ids
        stops = StopStrings(self.stop_strings)
        content = stops.push(self._text_engine.decode(reply[:-1] if by_token else reply)) + stops.finish()
        prompt = draft.prompt
        turn = Turn(
            draft.number,
            draft.head,
            (*draft.added, Message("assistant", content)),
            self._system,
            draft.left_out,
            prompt.start,
            tuple(self._ids[prompt.start :]),
            self._prompt_length,
            0 if self._keeper.live is None else self._keeper.live.length,
            prompt.text_start,
            prompt.text,
        )
        self._conversation.add(turn)
        self._waiting = ()
        self._keeper.settle(turn)
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
