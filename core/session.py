"""A conversation over one kept state: each turn computes only the tokens that are new.

Example, a ChatML model. Upper line: the session's `ids` after a turn; the state holds all but the last of them, because
a stop token is never fed. Lower line: the next turn, of which the state lacks what stands after the bar:

    <|im_start|>user Hi<|im_end|> <|im_start|>assistant Hel lo<|im_end|>
    <|im_start|>user Hi<|im_end|> <|im_start|>assistant Hel lo | <|im_end|> <|im_start|>user Bye<|im_end|> ...

"Hel", "lo" are the tokens that the model produced. Rendered again, the conversation may well have "Hello" there, and a
state that went through "Hel", "lo" would have to be recomputed; so what follows the reply is appended to what is kept.
"""

import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lmx.core.answer import Event, Finished, StopStrings, Token
from lmx.core.errors import InputError, UsageError
from lmx.core.generate import check_prompt, generate
from lmx.core.sampling import Sampling
from lmx.core.state import StateError

if TYPE_CHECKING:
    from lmx.core.model import AnyState, LanguageModel
    from lmx.core.text.types import EncodedChat, TextCodec


@dataclass(frozen=True)
class Message:
    """One message of a conversation; role: system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class _Turn:
    """What must be known of the last answered turn to continue after it.

    text: the rendered conversation up to the reply; ended_by_token: the kept ids end with a stop token;
    as_shown: the reply's tokens say what its message says (a stop string is cut from the message alone).
    """

    text: str
    ended_by_token: bool
    as_shown: bool


@dataclass(frozen=True)
class _Kept:
    """A session's memory between turns, to go back to when a turn fails."""

    messages: tuple[Message, ...] = ()
    ids: tuple[int, ...] = ()
    prompt_length: int = 0
    turn: _Turn | None = None


class ChatSession:
    """Talks with a model, turn by turn.

    At every event and between turns the state holds the first tokens of `ids`, the conversation as the model saw it.
    `sampling`, `max_new_tokens` (None: what is left of the context) and `stop_strings` may be changed between turns.
    With a seed, the first answer draws with it, the next with seed + 1, and so on.
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
    ) -> None:
        """stop_ids: beside the text engine's own end-of-turn tokens, which always end an answer."""
        self.sampling = sampling
        self.max_new_tokens = max_new_tokens
        self.stop_strings = tuple(stop_strings)
        self._model = model
        self._text_engine = text_engine
        self._stop_ids = stop_ids | frozenset(text_engine.info.end_of_turn_ids)
        self._kept = _Kept()
        self._ids: list[int] = []
        self._state: AnyState | None = None
        self._snapshot: AnyState | None = None  # of the last turn's start, where a state cannot be cut back to it
        self._system_merged = False
        self._answering = False
        self.set_system(system)

    @property
    def messages(self) -> list[Message]:
        """The conversation so far, the system's message first if there is one."""
        return list(self._kept.messages)

    @property
    def ids(self) -> list[int]:
        """All tokens of the conversation as the model saw or produced them; during an answer, those of it so far."""
        return list(self._ids)

    @property
    def prompt_ids(self) -> list[int]:
        """The tokens that the last answer followed."""
        return self._ids[: self._kept.prompt_length]

    @property
    def system(self) -> str | None:
        """The system's message."""
        first = self._kept.messages[:1]
        return first[0].content if first and first[0].role == "system" else None

    @property
    def system_merged(self) -> bool:
        """Whether the last turn's template had no system role, so that its text went into the first user message."""
        return self._system_merged

    @property
    def context_used(self) -> int:
        """Tokens of the conversation so far."""
        return len(self._ids)

    @property
    def context_length(self) -> int | None:
        """Tokens that the model was made for; None where it has no such limit."""
        return self._model.context_length

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

    def load_messages(self, messages: Sequence[Message]) -> None:
        """Replace the conversation. A system message among `messages` replaces the session's own.

        What the state has in common with the new conversation is used.
        """
        self._check_idle()
        own = [Message("system", self.system)] if self.system is not None else []
        if messages and messages[0].role == "system":
            own = []
        self._kept = replace(self._kept, messages=(*own, *messages), turn=None)

    def set_system(self, text: str | None) -> None:
        """Replace the system's message, None for none. The next turn reads the conversation again."""
        self._check_idle()
        others = self._kept.messages if self.system is None else self._kept.messages[1:]
        own = () if text is None else (Message("system", text),)
        self._kept = replace(self._kept, messages=(*own, *others), turn=None)

    def clear(self) -> None:
        """Forget the conversation but for the system's message, and free the state."""
        self._check_idle()
        system = self.system
        self._kept, self._ids, self._state, self._snapshot = _Kept(), [], None, None
        self.set_system(system)

    def _check_idle(self) -> None:
        if self._answering:
            raise UsageError("an answer is still being generated", "read its events to the end, or close the iterator")

    def _answer(self, added: tuple[Message, ...], cancel: threading.Event | None) -> Generator[Event, None, None]:
        self._check_idle()
        before = self._kept
        encoded = self._begin((*before.messages, *added))
        self._answering = True
        try:
            yield from self._events(encoded, cancel)
        except GeneratorExit:
            if self._kept.turn is None:
                self._end(encoded)
            raise
        except BaseException:
            # The model may have been stopped between two layers: only a copy from before it ran is sure to be whole.
            self._kept, self._ids = before, list(before.ids)
            self._state, self._snapshot = self._snapshot, None
            raise
        finally:
            self._answering = False

    def _begin(self, messages: tuple[Message, ...]) -> "EncodedChat":
        """Bring ids and state to where the answer begins; whatever can be wrong with the messages is raised first."""
        if not messages or messages[-1].role != "user":
            raise InputError("the conversation does not end with a user's message", "add a message with the role user")
        encoded = self._text_engine.encode_chat([{"role": m.role, "content": m.content} for m in messages])
        ids = self._next_ids(encoded)
        check_prompt(self._model, ids)
        self._state = state = self._rewound(ids)
        self._snapshot = state.clone() if state.length and not state.rewinds else None
        self._ids = list(ids)
        self._kept = _Kept(messages, tuple(ids), len(ids), None)
        self._system_merged = encoded.system_merged
        return encoded

    def _next_ids(self, encoded: "EncodedChat") -> list[int]:
        """The tokens of the next prompt: what is kept and the new ones, or if that cannot be, all as rendered."""
        turn = self._kept.turn
        if turn is None or encoded.ids[: len(self._ids)] == self._ids:
            return encoded.ids
        if not turn.as_shown or encoded.reply_end is None or not encoded.text.startswith(turn.text):
            return encoded.ids
        # The stop token was never fed. The template says whether it stands after the reply.
        kept = self._ids[:-1] if turn.ended_by_token else self._ids
        return kept + encoded.ids[encoded.reply_end :]

    def _rewound(self, ids: list[int]) -> "AnyState":
        """The state that already holds the most of the beginning of `ids`, at least one token short of all."""
        state, self._state = self._state, None
        if state is None:
            return self._model.make_state(1)
        shared = min(_common_prefix(self._ids[: state.length], ids), len(ids) - 1)
        try:
            state.truncate(shared)
        except StateError:  # it may be cut in some layers now, and is not used again
            earlier = self._snapshot
            return earlier if earlier is not None and earlier.length <= shared else self._model.make_state(1)
        return state

    def _events(self, encoded: "EncodedChat", cancel: threading.Event | None) -> Generator[Event, None, None]:
        """Generate, keeping `ids` in step with the state."""
        for event in generate(
            self._model,
            self._text_engine,
            self.prompt_ids,
            sampling=self._seeded(),
            max_new_tokens=self.max_new_tokens,
            stop_strings=self.stop_strings,
            stop_ids=self._stop_ids,
            state=self._state,
            cancel=cancel,
        ):
            if isinstance(event, Token):
                self._ids.append(event.id)
            if isinstance(event, Finished):
                self._end(encoded)
            yield event

    def _seeded(self) -> Sampling:
        if self.sampling.seed is None:
            return self.sampling
        answers = sum(message.role == "assistant" for message in self._kept.messages)
        return replace(self.sampling, seed=(self.sampling.seed + answers) % 2**63)

    def _end(self, encoded: "EncodedChat") -> None:
        """Put the answer, as far as it came, into the conversation."""
        reply = self._ids[self._kept.prompt_length :]
        by_token = bool(reply) and reply[-1] in self._stop_ids
        stops = StopStrings(self.stop_strings)
        content = stops.push(self._text_engine.decode(reply[:-1] if by_token else reply)) + stops.finish()
        self._kept = replace(
            self._kept,
            messages=(*self._kept.messages, Message("assistant", content)),
            ids=tuple(self._ids),
            turn=_Turn(encoded.text, ended_by_token=by_token, as_shown=not stops.found),
        )


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
