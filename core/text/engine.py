"""The tokenizer of a checkpoint in a process of its own: what a hostile checkpoint can reach ends there.

The child (`lmx.core.text.worker`) loads no torch and has limits of memory and files; each call has a deadline, past
which the child is killed and the call raises `InputError`. The next call starts a new child.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from threading import RLock
from typing import Self

from lmx.core.errors import InputError, LmxError
from lmx.core.text.child import Child, ChildError
from lmx.core.text.files import tokenizer_path
from lmx.core.text.stream import TextStream
from lmx.core.text.types import EncodedChat, Message, TextInfo

LOAD_SECONDS = 30.0
CALL_SECONDS = 2.0
_UNITS_PER_SECOND = 50_000  # characters or tokens: a tenth of what the slowest real tokenizer does on a slow core


class TextEngine:
    """A `TextCodec` whose work is done by a child process, kept for the whole chat. Safe to call from any thread."""

    def __init__(self, folder: Path, *, chat: bool = False, keep: object = None, label: str | None = None) -> None:
        """See `open`."""
        try:
            tokenizer_path(folder)
        except InputError as error:
            if label is None or label == str(folder):
                raise
            raise InputError(f"{label} holds no vocabulary", "Give a file or folder that has one.") from error
        self._keep = keep
        self._folder = folder.resolve()
        self._label = label or str(self._folder)
        self._chat = chat
        self._lock = RLock()
        self._closed = False
        self._facts: TextInfo | None = None
        self._child = self._start()

    @classmethod
    def open(cls, folder: Path, *, chat: bool = False, keep: object = None, label: str | None = None) -> Self:
        """Start the child for `folder` without waiting for it, so that it loads while the caller imports torch.

        `chat`: also prepare for `encode_chat` (a second copy of the vocabulary) meanwhile. `keep`: what must live as
        long as the engine, such as the owner of a temporary folder; `label`: what errors call the model, where that is
        not the folder. Raises `InputError` if `tokenizer.json` is missing; what is wrong inside the files shows at the
        first call.
        """
        return cls(folder, chat=chat, keep=keep, label=label)

    @cached_property
    def info(self) -> TextInfo:
        """See `TextCodec`. A template that cannot be run adds no stop id here; `encode_chat` then says why."""
        facts = self._loaded_facts()
        if not facts.has_chat_template:
            return facts.with_stop(None)
        try:
            end_of_turn_id = self._ask("end_of_turn_id")
        except InputError:
            end_of_turn_id = None
        return facts.with_stop(end_of_turn_id if isinstance(end_of_turn_id, int) else None)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """See `TextCodec`."""
        return _ids(self._ask("encode", text, add_special_tokens, size=len(text)))

    def encode_chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> EncodedChat:
        """See `TextCodec`."""
        with self._lock:
            if not self._chat:
                self._ask("prepare_chat", seconds=LOAD_SECONDS)
                self._chat = True  # a child that has to be started anew does it at once
            size = sum(len(str(message)) for message in messages)
            value = self._ask("encode_chat", list(messages), add_generation_prompt, size=size)
        if not isinstance(value, dict):
            raise TypeError("the text process gave no conversation")
        return EncodedChat(**{**value, "ids": _ids(value["ids"])})

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """See `TextCodec`."""
        return str(self._ask("decode", list(ids), skip_special_tokens, size=len(ids)))

    def token_to_id(self, token: str) -> int | None:
        """See `TextCodec`."""
        value = self._ask("token_to_id", token)
        return value if isinstance(value, int) else None

    def stream(self, context_ids: Sequence[int] = ()) -> TextStream:
        """See `TextCodec`. Each token costs about one call to the child."""
        facts = self._loaded_facts()
        return TextStream(self.decode, context_ids, byte_ids=facts.byte_ids, hidden_ids=facts.hidden_ids)

    def close(self) -> None:
        """End the child; safe to call twice."""
        with self._lock:
            self._closed = True
            self._child.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _start(self) -> Child:
        child = Child(self._folder)
        with self._watched():
            child.send("facts", [self._chat], LOAD_SECONDS)
        return child

    def _loaded_facts(self) -> TextInfo:
        with self._lock:
            return self._ready()[1]

    def _ready(self) -> tuple[Child, TextInfo]:
        """The child once it has loaded the files; started anew if the last one was killed."""
        if self._closed:
            raise RuntimeError("the text engine is closed")
        if self._child.dead:
            self._child = self._start()
        if self._facts is None or not self._child.ready:
            with self._watched():
                self._facts = _facts(self._child.receive())
            self._child.ready = True
        return self._child, self._facts

    def _ask(self, call: str, *arguments: object, size: int = 0, seconds: float = CALL_SECONDS) -> object:
        with self._lock:
            child, _ = self._ready()
            with self._watched():
                child.send(call, list(arguments), seconds + size / _UNITS_PER_SECOND)
                return child.receive()

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """The death of the child becomes an `InputError`; errors name the folder that the user knows."""
        try:
            yield
        except LmxError as error:
            error.message = error.message.replace(str(self._folder), self._label)
            error.args = (error.message,)
            raise
        except ChildError as error:
            hint = "Its tokenizer or chat template is broken or hostile: download it again, or do not trust it."
            raise InputError(f"{self._label}: {error}", hint) from error


def _facts(value: object) -> TextInfo:
    if not isinstance(value, dict):
        raise TypeError("the text process gave no facts")
    sets = {key: frozenset(_ids(value[key])) for key in ("hidden_ids", "byte_ids")}
    tuples = {key: tuple(_ids(value[key])) for key in ("special_ids", "end_of_turn_ids")}
    return TextInfo(**{**value, **sets, **tuples})


def _ids(value: object) -> list[int]:
    if not isinstance(value, list):
        raise TypeError("the text process gave no ids")
    return value
