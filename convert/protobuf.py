"""The wire format of protocol buffers, as far as a tokenizer.model needs it: fields one after another, nothing copied.

A message is a sequence of (number, kind, value); there is no schema here, no recursion, and no memory beyond the
message's own bytes, which is why an untrusted file is read with this and not with a general library.
Source: https://protobuf.dev/programming-guides/encoding/. Imports no torch.
"""

import struct
from collections.abc import Iterator

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_VARINT_BYTES = 10
_MAX_FIELD = (1 << 29) - 1

Value = int | float | memoryview
"""A varint, a 32-bit float, or bytes; fields of 64 bits are skipped."""


def read_fields(message: memoryview) -> Iterator[tuple[int, Value]]:
    """The fields of a message in their order. Raises ValueError where it breaks the format."""
    at, end = 0, len(message)
    while at < end:
        tag, at = _varint(message, at)
        number, kind = tag >> 3, tag & 7
        if not 0 < number <= _MAX_FIELD:
            raise ValueError(f"a field has the number {number}")
        if kind == _VARINT:
            value, at = _varint(message, at)
            yield number, value
        elif kind == _BYTES:
            length, at = _varint(message, at)
            if length > end - at:
                raise ValueError(f"field {number} ends beyond the end")
            yield number, message[at : at + length]
            at += length
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
            if size > end - at:
                raise ValueError(f"field {number} ends beyond the end")
            if kind == _FIXED32:
                yield number, struct.unpack_from("<f", message, at)[0]
            at += size
        else:
            raise ValueError(f"field {number} is of the kind {kind}")


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """The number that begins at a byte, and where it ends."""
    first = message[at] if at < len(message) else 0x80
    if first < 0x80:
        return first, at + 1
    value = 0
    for place, byte in enumerate(message[at : at + _MAX_VARINT_BYTES]):
        value |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return value, at + place + 1
    raise ValueError("a number does not end")
