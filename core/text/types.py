"""What the text side exchanges with its callers: facts about a tokenizer, an encoded chat, and the one protocol."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, Self, TypedDict

from lmx.core.errors import InputError
from lmx.core.text.stream import TextStream


class TemplateError(InputError):
    """The chat template could not be run. `refusal` is its own message if it refused the conversation on purpose."""

    def __init__(self, message: str, hint: str, refusal: str | None = None) -> None:
        super().__init__(message, hint)
        self.refusal = refusal


class Message(TypedDict):
    """One turn of a conversation, as the hub's chat templates take it."""

    role: str
    content: str


@dataclass(frozen=True)
class TextInfo:
    """What a checkpoint's tokenizer files say, read once.

    `vocab_size` is one more than the largest token id. `special_ids` are the control tokens that a decoded text does
    not show. `hidden_ids` adds the ids below `vocab_size` that stand for nothing (DBRX leaves a gap before its chat
    tokens). `byte_ids` are the byte-fallback tokens `<0x00>` to `<0xFF>`. `end_of_turn_ids` are stop ids: the control
    token that the template writes after an assistant's words, and the tokenizer's own eos.
    """

    vocab_size: int
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    unk_id: int | None = None
    special_ids: tuple[int, ...] = ()
    hidden_ids: frozenset[int] = field(default=frozenset(), repr=False)
    byte_ids: frozenset[int] = field(default=frozenset(), repr=False)
    end_of_turn_ids: tuple[int, ...] = ()
    chat_template: str | None = field(default=None, repr=False)

    @property
    def has_chat_template(self) -> bool:
        """Whether the checkpoint brings a chat template."""
        return self.chat_template is not None

    def with_stop(self, end_of_turn_id: int | None) -> "TextInfo":
        """The same facts with the stop ids that follow from the template's end-of-turn token."""
        stop = {i for i in (end_of_turn_id, self.eos_id) if i is not None}
        return replace(self, end_of_turn_ids=tuple(sorted(stop)))


@dataclass(frozen=True)
class EncodedChat:
    """A conversation as the model reads it.

    `text` is the rendered conversation and `ids` its tokens. `ids[reply_end:]` is what the template puts after the
    last assistant message's words, `text[reply_end_char:]` in the text: a session that keeps the tokens the model
    really produced appends only these. Both are None where there is no such message, where a token straddles the end of
    its words, or where the template rewrites them. `system_merged`: the template takes no system role, so that text now
    opens the first user turn.
    """

    text: str
    ids: list[int]
    reply_end: int | None
    reply_end_char: int | None
    system_merged: bool


class TextCodec(Protocol):
    """Text in and out: the in-process `Tokenizer` and the `TextEngine` beside it both offer this.

    Every method raises `InputError` for what the checkpoint's files or the given text are to blame for.
    """

    @property
    def info(self) -> TextInfo:
        """The facts of this tokenizer."""
        ...

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Raw text to ids: control tokens written in it count; BOS as the tokenizer's post-processor adds it."""
        ...

    def encode_chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> EncodedChat:
        """A conversation to ids through the chat template; nothing in a message becomes a control token."""
        ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Ids to text. Ids that stand for nothing are left out."""
        ...

    def token_to_id(self, token: str) -> int | None:
        """The id of a token by its exact name in the vocabulary."""
        ...

    def stream(self, context_ids: Sequence[int] = ()) -> TextStream:
        """An incremental decoder for what follows `context_ids`."""
        ...

    def close(self) -> None:
        """Release what the codec holds; safe to call twice."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...
