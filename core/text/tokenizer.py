"""The tokenizer of a checkpoint in this process. For files of unknown origin use `lmx.core.text.engine`."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Self

import tokenizers
from tokenizers import Encoding

from lmx.core.errors import InputError
from lmx.core.text.chat import ChatEncoder
from lmx.core.text.controls import ControlTokens
from lmx.core.text.files import AddedToken, TokenizerFiles, read_tokenizer_files
from lmx.core.text.stream import TextStream
from lmx.core.text.template import ChatTemplate
from lmx.core.text.types import EncodedChat, Message, TemplateError, TextInfo
from lmx.core.text.vocabulary import Vocabulary, byte_token_ids, known_ids, read_vocabulary, rename

_DOWNLOAD_AGAIN = "Download the checkpoint again, or ask its author."


class Tokenizer:
    """Encoding, decoding and the chat template of one checkpoint folder.

    Raises `InputError` for what the files or the given text are to blame for; a template that loops for ever does so
    here, too: that is what the engine's process is for.
    """

    def __init__(self, files: TokenizerFiles) -> None:
        self._files = files
        vocabulary = read_vocabulary(files)
        path = files.folder / "tokenizer.json"
        source = _dump(vocabulary.document) if vocabulary.changed else files.tokenizer_json
        self._plain = _load(source, path)
        for token in files.added:
            _check_id(self._plain, token, path)
        self._added = vocabulary.added
        self._facts = _facts(self._plain, vocabulary, files)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The tokenizer of `folder`. Raises `InputError`, `NotFoundError`."""
        return cls(read_tokenizer_files(folder))

    @cached_property
    def info(self) -> TextInfo:
        """See `TextCodec`. A template that cannot be run adds no stop id here; `encode_chat` then says why."""
        return self._facts.with_stop(self.end_of_turn_id())

    @property
    def facts(self) -> TextInfo:
        """`info` as far as it can be known without running the template."""
        return self._facts

    def end_of_turn_id(self) -> int | None:
        """The token that the template writes after an assistant's words."""
        if self._files.chat_template is None:
            return None
        try:
            return self._chat.end_of_turn_id()
        except TemplateError:
            return None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """See `TextCodec`."""
        with _blame("the text cannot be encoded"):
            return self._plain.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> EncodedChat:
        """See `TextCodec`. No second BOS: the template's own is the only one (so does transformers)."""
        return self._chat.encode(messages, add_generation_prompt)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """See `TextCodec`."""
        with _blame("the token ids cannot be decoded"):
            return self._plain.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_to_id(self, token: str) -> int | None:
        """See `TextCodec`."""
        with _blame("the token cannot be looked up"):
            return self._plain.token_to_id(token)

    def stream(self, context_ids: Sequence[int] = ()) -> TextStream:
        """See `TextCodec`."""
        hidden, byte = self._facts.hidden_ids, self._facts.byte_ids
        return TextStream(self.decode, context_ids, byte_ids=byte, hidden_ids=hidden)

    def prepare_chat(self) -> None:
        """Build the second copy of the tokenizer that conversations need now rather than at the first one."""
        if self._files.chat_template is not None:
            self._sealed_copy  # noqa: B018  (made when first looked at)

    def close(self) -> None:
        """Nothing to release."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @cached_property
    def _controls(self) -> ControlTokens:
        """Special tokens, and others that the template writes (some checkpoints flag <|im_start|> as no special)."""
        template = self._files.chat_template or ""
        return ControlTokens([t for t in self._added if t.content.strip() and (t.special or t.content in template)])

    @cached_property
    def _sealed_copy(self) -> tuple[tokenizers.Tokenizer, dict[int, int]]:
        """The copy with the sealed names, and its ids that differ from the plain tokenizer's (most often none)."""
        names = self._controls.sealed
        path = self._files.folder / "tokenizer.json"
        sealed = _load(_dump(rename(read_vocabulary(self._files), names)), path)
        own = {
            sealed.token_to_id(names.get(t.content, t.content)): self._plain.token_to_id(t.content) for t in self._added
        }
        return sealed, {a: b for a, b in own.items() if a is not None and b is not None and a != b}

    @cached_property
    def _chat(self) -> ChatEncoder:
        source = self._files.chat_template
        if source is None:
            raise InputError(
                f"{self._files.folder} has no chat template", "It is no chat model: use `lmx generate` for raw text."
            )
        variables = {**self._files.named, "additional_special_tokens": list(self._files.extra_special)}
        return ChatEncoder(ChatTemplate(source, variables), self._controls, self._encode_sealed)

    def _encode_sealed(self, text: str) -> tuple[Encoding, list[int]]:
        sealed, own_ids = self._sealed_copy
        with _blame("the conversation cannot be encoded"):
            encoding = sealed.encode(text, add_special_tokens=False)
        return encoding, [own_ids.get(i, i) for i in encoding.ids] if own_ids else encoding.ids


def _facts(plain: tokenizers.Tokenizer, vocabulary: Vocabulary, files: TokenizerFiles) -> TextInfo:
    named = {key: plain.token_to_id(text) for key, text in files.named.items()}
    tokens = [(plain.token_to_id(token.content), token) for token in vocabulary.added]
    special = {i for i, token in tokens if token.special and i is not None}
    known = known_ids(vocabulary.document, vocabulary.added) | {i for i, _ in tokens if i is not None}
    size = max(known, default=-1) + 1
    gaps = set(range(size)) - known if size < 1 << 24 else set()
    return TextInfo(
        vocab_size=size,
        bos_id=named.get("bos_token"),
        eos_id=named.get("eos_token"),
        pad_id=named.get("pad_token"),
        unk_id=named.get("unk_token"),
        special_ids=tuple(sorted(special)),
        hidden_ids=frozenset(special | gaps),
        byte_ids=byte_token_ids(vocabulary.document),
        chat_template=files.chat_template,
    )


def _load(source: bytes, path: Path) -> tokenizers.Tokenizer:
    with _blame(f"{path} cannot be used"):
        tokenizer: tokenizers.Tokenizer = tokenizers.Tokenizer.from_buffer(source)
        # Some files keep the settings of their author's training run
        tokenizer.no_truncation()
        tokenizer.no_padding()
    return tokenizer


def _dump(document: dict[str, object]) -> bytes:
    return json.dumps(document).encode()


def _check_id(plain: tokenizers.Tokenizer, token: AddedToken, path: Path) -> None:
    if (found := plain.token_to_id(token.content)) != token.id:
        raise InputError(
            f"{path} gives the token {token.content[:40]!r} the id {found}, tokenizer_config.json {token.id}",
            _DOWNLOAD_AGAIN,
        )


@contextmanager
def _blame(what: str) -> Iterator[None]:
    """Turn whatever the tokenizers library raises, a Rust panic too, into an `InputError` that begins with `what`."""
    try:
        yield
    except BaseException as error:
        # A panic is no Exception, and its class cannot be imported
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error)[:300].split()) or type(error).__name__
        raise InputError(f"{what}: {reason}", _DOWNLOAD_AGAIN) from error
