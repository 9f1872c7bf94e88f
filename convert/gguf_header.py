"""The header of a GGUF file, read with limits and written: key-value pairs and the table of tensors.

Layout: the magic "GGUF", a version, two counts, typed key-value pairs, one entry a tensor (name, dimensions with the
fastest first, type, offset), and padding up to the tensors' bytes. All numbers are little-endian.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.

The reader is our own, not the `gguf` package's: that one believes every count and length, loops as often as they say,
and makes an array of each element. Imports no torch.
"""

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TypeAlias

from lmx.core.errors import InputError
from lmx.core.files import quoted, read_range

Value: TypeAlias = "int | float | bool | str | list[int] | list[float] | list[bool] | list[str]"

MAGIC = b"GGUF"
VERSION = 3
DEFAULT_ALIGNMENT = 32
ALIGNMENT_KEY = "general.alignment"

# The largest vocabularies have 262,144 tokens and twice as many merges, in 20 MB; the most tensors one published model
# has are some 3,000. What is over these limits is no model of ours.
MAX_HEADER_BYTES = 128 << 20
MAX_PAIRS = 4096
MAX_TENSORS = 65_536
MAX_KEY_BYTES = 65_535  # the format's own limit
MAX_NAME_BYTES = 63  # ggml's own limit (GGML_MAX_NAME)
MAX_TEXT_BYTES = 4 << 20
MAX_ITEMS = 4 << 20  # of all arrays together
MAX_DIMENSIONS = 4
MAX_ELEMENTS = 2**48

_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_READ_BYTES = 1 << 20
_POINTER = b"vers"
DAMAGED = "the file is damaged or incomplete: download it again"


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor as the header lists it: shape with the slowest dimension first, type by number, offset in the data."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    """What stands before the tensors; `data_start` is where their bytes begin."""

    metadata: Mapping[str, Value]
    tensors: tuple[TensorEntry, ...]
    alignment: int
    data_start: int


def read_header(fd: int, path: Path) -> Header:
    """Read and check the header of an open file. Raises InputError for anything that breaks the format or a limit."""
    cursor = _Cursor(fd, path)
    magic = cursor.take(4)
    if magic != MAGIC:
        what = "a Git LFS pointer, not the model" if magic == _POINTER else "no GGUF file"
        raise InputError(f"{quoted(str(path))} is {what}", "run git lfs pull" if magic == _POINTER else DAMAGED)
    version = cursor.number("I")
    if version not in (2, VERSION):
        raise cursor.error(f"its version is {version}; lmx reads 2 and 3, little-endian")
    tensor_count = cursor.count("Q", MAX_TENSORS, "tensors")
    pair_count = cursor.count("Q", MAX_PAIRS, "keys")
    metadata = _read_pairs(cursor, pair_count)
    tensors = tuple(_read_entry(cursor) for _ in range(tensor_count))
    if len({entry.name for entry in tensors}) != len(tensors):
        raise cursor.error("a tensor's name stands twice")
    alignment = metadata.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not 1 <= alignment <= 1 << 16 or alignment & (alignment - 1):
        raise cursor.error(f"{ALIGNMENT_KEY} is {alignment!r:.40}, no power of two up to 65,536")
    return Header(metadata, tensors, alignment, aligned(cursor.position, alignment))


def write_header(metadata: Mapping[str, Value], tensors: tuple[TensorEntry, ...], alignment: int) -> bytes:
    """The bytes before the tensors. Whole numbers become uint32 (int32 in lists or below zero), floats float32."""
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    parts += [_text(key) + _value(value) for key, value in metadata.items()]
    parts += [_entry(entry) for entry in tensors]
    header = b"".join(parts)
    return header + bytes(aligned(len(header), alignment) - len(header))


def aligned(position: int, alignment: int) -> int:
    """The next multiple of `alignment`, or `position` itself."""
    return -(-position // alignment) * alignment


class _Cursor:
    """Reads a header front to back, no more of the file than it needs, and never past the limits."""

    def __init__(self, fd: int, path: Path) -> None:
        self._fd, self._path = fd, path
        self._limit = min(os.fstat(fd).st_size, MAX_HEADER_BYTES)
        self._buffer = b""
        self._start = 0  # where in the file the buffer begins
        self.position = 0
        self.items_left = MAX_ITEMS

    def error(self, what: str) -> InputError:
        """The error for a header that says something impossible."""
        return InputError(f"{quoted(str(self._path))}: {what}", DAMAGED)

    def take(self, size: int) -> bytes:
        """The next bytes."""
        if size > self._limit - self.position:
            raise self.error("its GGUF header is longer than the file, or than any model needs")
        if self.position + size > self._start + len(self._buffer):
            wanted = min(max(size, _READ_BYTES), self._limit - self.position)
            self._buffer = read_range(self._fd, wanted, self.position, self._path)
            self._start = self.position
        first = self.position - self._start
        self.position += size
        return self._buffer[first : first + size]

    def number(self, code: str) -> int:
        """One whole number."""
        value = struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]
        return int(value)

    def count(self, code: str, most: int, what: str) -> int:
        """A number of things that follow."""
        value = self.number(code)
        if value > most:
            raise self.error(f"it claims {value:,} {what}; the limit is {most:,}")
        return value

    def text(self, most: int) -> str:
        """A string with its length before it."""
        data = self.take(self.count("Q", most, "bytes of a text"))
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise self.error("a text is not UTF-8") from error


def _read_pairs(cursor: _Cursor, count: int) -> dict[str, Value]:
    pairs: dict[str, Value] = {}
    for _ in range(count):
        key = cursor.text(MAX_KEY_BYTES)
        if key in pairs:
            raise cursor.error(f"the key {quoted(key)} stands twice")
        pairs[key] = _read_value(cursor, cursor.number("I"), key)
    return pairs


def _read_value(cursor: _Cursor, kind: int, key: str) -> Value:
    if kind == _TEXT:
        return cursor.text(MAX_TEXT_BYTES)
    if kind == _ARRAY:
        return _read_array(cursor, cursor.number("I"), key)
    return _numbers(cursor, kind, 1, key)[0]


def _read_array(cursor: _Cursor, kind: int, key: str) -> Value:
    length = cursor.count("Q", cursor.items_left, f"items of {quoted(key)}")
    cursor.items_left -= length
    if kind == _TEXT:
        return [cursor.text(MAX_TEXT_BYTES) for _ in range(length)]
    return _numbers(cursor, kind, length, key)


def _numbers(cursor: _Cursor, kind: int, length: int, key: str) -> list[int]:
    code = _CODES.get(kind)
    if code is None:
        raise cursor.error(f"{quoted(key)} has the unknown type {kind}")
    data = cursor.take(length * struct.calcsize(f"<{code}"))
    if code == "?" and data.strip(b"\0\1"):
        raise cursor.error(f"{quoted(key)} is neither true nor false")
    return list(struct.unpack(f"<{length}{code}", data))


def _read_entry(cursor: _Cursor) -> TensorEntry:
    name = cursor.text(MAX_NAME_BYTES)
    rank = cursor.count("I", MAX_DIMENSIONS, f"dimensions of tensor {quoted(name)}")
    shape = tuple(cursor.number("Q") for _ in range(rank))[::-1]
    # A product of huge factors would cost time, so each is looked at first
    if not shape or not all(0 < size <= MAX_ELEMENTS for size in shape) or prod(shape) > MAX_ELEMENTS:
        raise cursor.error(f"tensor {quoted(name)} has the shape {list(shape)!s:.80}")
    return TensorEntry(name, shape, cursor.number("I"), cursor.number("Q"))


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Value) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", _TEXT) + _text(value)
    if isinstance(value, list):
        kind = _kind(value[0], 5) if value else 5
        start = struct.pack("<IIQ", _ARRAY, kind, len(value))
        if kind == _TEXT:
            return start + b"".join(_text(str(item)) for item in value)
        return start + struct.pack(f"<{len(value)}{_CODES[kind]}", *value)
    kind = _kind(value, 5 if isinstance(value, int) and value < 0 else 4)
    return struct.pack(f"<I{_CODES[kind]}", kind, value)


def _kind(value: object, whole: int) -> int:
    if isinstance(value, str):
        return _TEXT
    if isinstance(value, bool):
        return 7
    return whole if isinstance(value, int) else 6


def _entry(entry: TensorEntry) -> bytes:
    shape = entry.shape[::-1]
    numbers = struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, entry.type_id, entry.offset)
    return _text(entry.name) + numbers
