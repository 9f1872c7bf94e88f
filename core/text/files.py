"""The tokenizer's files of a checkpoint folder, read with limits: whoever made them may mean harm.

`tokenizer.json` is the vocabulary; `tokenizer_config.json` (and older `special_tokens_map.json`) names the special
tokens and may add some; the chat template is `chat_template.jinja`, or stands in the config as one text or as a
named list (https://huggingface.co/docs/transformers/chat_templating).
"""

import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lmx.core.errors import InputError, NotFoundError

MAX_TOKENIZER_BYTES = 256 << 20  # the largest published one (262,144 tokens) has 33 MB
MAX_CONFIG_BYTES = 16 << 20
MAX_TEMPLATE_BYTES = 1 << 20
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_DOWNLOAD_AGAIN = "Download the checkpoint again, or ask its author."


@dataclass(frozen=True)
class AddedToken:
    """A token that is cut out of the text before the model of the tokenizer sees it."""

    id: int
    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    special: bool = False


@dataclass(frozen=True)
class TokenizerFiles:
    """What the files say. `named` maps `bos_token` and its like to the token's text."""

    folder: Path
    tokenizer_json: bytes
    named: Mapping[str, str]
    extra_special: tuple[str, ...]
    added: tuple[AddedToken, ...]
    chat_template: str | None


def tokenizer_path(folder: Path) -> Path:
    """`folder/tokenizer.json`. Raises `InputError` if there is none, `NotFoundError` if there is no folder."""
    if not folder.is_dir():
        raise NotFoundError(f"{folder} is no folder", "Give the path of a checkpoint's folder.")
    path = folder / "tokenizer.json"
    if not path.exists():
        raise InputError(
            f"{path} is missing",
            "lmx needs the fast tokenizer's file: take it from the model's page, or from its base model.",
        )
    return path


def read_tokenizer_files(folder: Path) -> TokenizerFiles:
    """Read everything that belongs to the tokenizer of `folder`. Raises `InputError`, `NotFoundError`."""
    tokenizer_json = read_bounded(tokenizer_path(folder), MAX_TOKENIZER_BYTES)
    config_path = folder / "tokenizer_config.json"
    config = _read_optional_object(config_path)
    older = _read_optional_object(folder / "special_tokens_map.json")
    named = {key: _token_text(config.get(key) or older.get(key), key, config_path) for key in _NAMED}
    extra = [config.get(key) for key in ("additional_special_tokens", "extra_special_tokens")]
    return TokenizerFiles(
        folder=folder,
        tokenizer_json=tokenizer_json,
        named={key: text for key, text in named.items() if text},
        extra_special=tuple(text for tokens in extra for text in _token_texts(tokens, config_path)),
        added=_added_tokens(config.get("added_tokens_decoder"), config_path),
        chat_template=_chat_template(folder, config),
    )


def read_config_tokens(folder: Path) -> tuple[AddedToken, ...]:
    """The tokens that `tokenizer_config.json` adds, by their ids; none without one. Raises `InputError`."""
    path = folder / "tokenizer_config.json"
    return _added_tokens(_read_optional_object(path).get("added_tokens_decoder"), path)


def read_bounded(path: Path, limit: int) -> bytes:
    """The bytes of a regular file of at most `limit` bytes. Raises `InputError` for anything else."""
    try:
        # O_NONBLOCK: opening a named pipe would wait for its writer for ever
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise InputError(f"{path} is no regular file", _DOWNLOAD_AGAIN)
            data = file.read(limit + 1) if status.st_size <= limit else b""
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}", "Check the file and its permissions.") from error
    if status.st_size > limit or len(data) > limit:
        raise InputError(f"{path} has more than {limit >> 20} MB", _DOWNLOAD_AGAIN)
    return data


def parse_object(data: bytes, path: Path) -> dict[str, object]:
    """A JSON object. Raises `InputError` if `data` is none, or is nested too deeply."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        raise InputError(f"{path} is no valid JSON: {reason}", _DOWNLOAD_AGAIN) from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no JSON object", _DOWNLOAD_AGAIN)
    return value


def parse_added_token(value: object, token_id: object, path: Path) -> AddedToken:
    """One entry of `added_tokens` or `added_tokens_decoder`. Raises `InputError`."""
    if not isinstance(value, dict) or not isinstance(value.get("content"), str) or not isinstance(token_id, int):
        raise InputError(f"{path}: an added token needs a text and an id", _DOWNLOAD_AGAIN)
    flags = {key: value.get(key) is True for key in ("single_word", "lstrip", "rstrip", "special")}
    # The library's own default: special tokens are matched before the text is normalized
    normalized = value.get("normalized", not flags["special"]) is True
    return AddedToken(token_id, value["content"], normalized=normalized, **flags)


def _read_optional_object(path: Path) -> dict[str, object]:
    return parse_object(read_bounded(path, MAX_CONFIG_BYTES), path) if path.exists() else {}


def _token_text(value: object, key: str, path: Path) -> str | None:
    """A special token's text, given as a string or as `{"content": ...}`."""
    if isinstance(value, dict):
        value = value.get("content")
    if value is None or isinstance(value, str):
        return value
    raise InputError(f"{path}: {key} is neither a text nor a token", _DOWNLOAD_AGAIN)


def _token_texts(value: object, path: Path) -> list[str]:
    tokens = list(value.values()) if isinstance(value, dict) else value
    if tokens is None:
        return []
    if not isinstance(tokens, list):
        raise InputError(f"{path}: the additional special tokens are no list", _DOWNLOAD_AGAIN)
    texts = [_token_text(token, "an additional special token", path) for token in tokens]
    return [text for text in texts if text]


def _added_tokens(value: object, path: Path) -> tuple[AddedToken, ...]:
    if value is None:
        return ()
    if not isinstance(value, dict):
        raise InputError(f"{path}: added_tokens_decoder is no object", _DOWNLOAD_AGAIN)
    tokens = [parse_added_token(token, _as_id(key, path), path) for key, token in value.items()]
    return tuple(sorted(tokens, key=lambda token: token.id))


def _as_id(key: str, path: Path) -> int:
    if not (key.isascii() and key.isdigit() and len(key) < 10):
        raise InputError(f"{path}: added_tokens_decoder has the id {key[:20]!r}", _DOWNLOAD_AGAIN)
    return int(key)


def _chat_template(folder: Path, config: Mapping[str, object]) -> str | None:
    """The file wins over the config, as in transformers; of a named list the entry `default`, or the only one."""
    path = folder / "chat_template.jinja"
    if path.exists():
        return read_bounded(path, MAX_TEMPLATE_BYTES).decode("utf-8", errors="replace")
    value = config.get("chat_template")
    if isinstance(value, list):
        entries = [entry for entry in value if isinstance(entry, dict)]
        chosen = [entry for entry in entries if entry.get("name") == "default"] or entries
        value = chosen[0].get("template") if len(chosen) == 1 else None
    if value is not None and not isinstance(value, str):
        raise InputError(f"{folder / 'tokenizer_config.json'}: chat_template is no text", _DOWNLOAD_AGAIN)
    return value
