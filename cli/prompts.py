"""Reading what a user gives to answer: prompts, token ids, conversations. All of it can be malformed."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from lmx.core.errors import InputError, UsageError
from lmx.core.files import quoted, read_bounded
from lmx.core.jsonfile import JSON, parse_json, parse_value
from lmx.core.text.types import Message

MAX_INPUT_BYTES = 64 << 20
_NUL_HINT = "give plain text in UTF-8"


@dataclass(frozen=True)
class Prompt:
    """A prompt as text, or as token ids."""

    text: str | None = None
    ids: tuple[int, ...] | None = None


def text_prompt(text: str, where: str) -> Prompt:
    """A prompt of some text. Raises InputError if there is none."""
    if not text:
        raise InputError(f"{where} is empty", "give the text to continue")
    return Prompt(text=text)


def parse_ids(text: str) -> Prompt:
    """`1,2,3` as token ids. Raises UsageError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts):
        raise UsageError(f"--prompt-ids: {quoted(text)} is no list of token ids", "write it like 1,2,3")
    return Prompt(ids=tuple(map(int, parts)))


def read_stdin() -> str:
    """All of stdin as text, without the newline that `echo` adds. Raises InputError."""
    data = sys.stdin.buffer.read(MAX_INPUT_BYTES + 1)
    if len(data) > MAX_INPUT_BYTES:
        raise InputError(f"stdin holds more than {MAX_INPUT_BYTES >> 20} MB", "give less text at once")
    return _utf8(data, "stdin").removesuffix("\n").removesuffix("\r")


def read_text(path: Path, where: str) -> str:
    """A text file, without a last newline. Raises InputError, NotFoundError."""
    return _utf8(read_bounded(path, MAX_INPUT_BYTES), f"{where} {quoted(str(path))}").removesuffix("\n")


def read_prompts(path: Path) -> list[Prompt]:
    """A file of prompts: one a line, or in a `.jsonl` one object a line. Raises InputError, NotFoundError."""
    # Not splitlines: a prompt may well hold U+2028 and its like.
    lines = _utf8(read_bounded(path, MAX_INPUT_BYTES), f"--file {quoted(str(path))}").removesuffix("\n").split("\n")
    read = _json_prompt if path.suffix == ".jsonl" else text_prompt
    return [read(line.removesuffix("\r"), f"{quoted(str(path))}, line {i}") for i, line in enumerate(lines, start=1)]


def parse_messages(data: bytes, where: str) -> list[Message]:
    """A JSON list of `{"role", "content"}`. Raises InputError."""
    value = parse_value(data, where)
    if not isinstance(value, list) or not value:
        raise InputError(f"{where} holds no list of messages", _MESSAGE_HINT)
    return [_message(item, f"{where}, message {number}") for number, item in enumerate(value, start=1)]


_MESSAGE_HINT = 'write it like [{"role": "user", "content": "Hello"}]'


def read_messages(file: str) -> list[Message]:
    """A conversation from a file, `-` for stdin. Raises InputError, NotFoundError."""
    if file == "-":
        return parse_messages(read_stdin().encode(), "stdin")
    return parse_messages(read_bounded(Path(file), MAX_INPUT_BYTES), f"--messages {quoted(file)}")


def _message(item: JSON, where: str) -> Message:
    if isinstance(item, dict) and set(item) == {"role", "content"}:
        role, content = item["role"], item["content"]
        if isinstance(role, str) and isinstance(content, str):
            return Message(role=role, content=content)
    raise InputError(f"{where} is not made of a role and a content, both texts", _MESSAGE_HINT)


def _json_prompt(line: str, where: str) -> Prompt:
    value = parse_json(line.encode(), where)
    text, ids = value.get("prompt"), value.get("prompt_ids")
    if isinstance(text, str) and ids is None:
        return text_prompt(text, where)
    if isinstance(ids, list) and text is None and ids:
        whole = [i for i in ids if isinstance(i, int) and not isinstance(i, bool) and i >= 0]
        if len(whole) == len(ids):
            return Prompt(ids=tuple(whole))
    raise InputError(
        f"{where}: neither a prompt nor prompt_ids", 'write {"prompt": "text"} or {"prompt_ids": [1, 2, 3]}'
    )


def _utf8(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8 text (byte {error.start:,})", _NUL_HINT) from error


def as_json_line(text: str) -> str:
    """A text on one line of its own: line breaks, tabs and backslashes as JSON writes them, without the quotes."""
    return json.dumps(text, ensure_ascii=False)[1:-1].replace('\\"', '"')
