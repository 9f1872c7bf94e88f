"""The safetensors format: its header, checked before anything of it is believed.

A file is 8 bytes of header length (little-endian), the header (a JSON object: tensor name -> dtype, shape and
data_offsets; `__metadata__` -> strings), and the tensors' bytes, which leave no hole and do not overlap.
Source: https://github.com/huggingface/safetensors#format. Imports no torch.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TypeGuard, cast

from lmx.core.errors import InputError
from lmx.core.files import open_regular, quoted, read_range
from lmx.core.jsonfile import JSON, parse_json
from lmx.core.mapped import ITEM_SIZES, FileMap

MAX_HEADER_BYTES = 100_000_000  # the reference reader's own limit
# A hostile header of 100 MB could become gigabytes of Python objects, so its structure is counted before it is parsed.
# The largest file of our families holds some 20,000 tensors.
MAX_TENSORS = 100_000
_MARKS_PER_TENSOR = {b"{": 1, b"[": 2, b":": 8, b",": 16}
MAX_DIMENSIONS = 64
MAX_ELEMENTS = 2**63 - 1

_METADATA = "__metadata__"
_FIELDS = {"dtype", "shape", "data_offsets"}
_POINTER = b"version https://git-lfs"
_DAMAGED = "the file is damaged or incomplete: download it again"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a checkpoint: what it is and where its bytes lie.

    `dtype` is spelled as safetensors does ("BF16"); `offset` counts from the start of `file`; `nbytes` is its length.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    @property
    def parameters(self) -> int:
        """How many elements it has."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class SafetensorsFile:
    """An open file: its tensors in the order of their bytes, its metadata, and the map that views are made of."""

    path: Path
    size: int
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    data: FileMap


def open_safetensors(path: Path) -> SafetensorsFile:
    """Read and check a file's header and map the file; no tensor is read.

    Raises:
        NotFoundError: there is no such file, or we may not read it.
        InputError: it is no regular file, or breaks the format in any way; the message names file and tensor.
        ResourceError: the file cannot be mapped.

    """
    with open_regular(path) as fd:
        size = os.fstat(fd).st_size
        header = _read_header(fd, size, path)
        entries = _parse_header(header, path)
        metadata = _metadata(entries.pop(_METADATA, None), path)
        tensors = _tensor_infos(entries, 8 + len(header), size, path)
        return SafetensorsFile(path, size, tensors, metadata, FileMap(fd, size, path))


def _error(path: Path, what: str) -> InputError:
    return InputError(f"{quoted(str(path))}: {what}", _DAMAGED)


def _read_header(fd: int, size: int, path: Path) -> bytes:
    if size < 8:
        raise _error(path, f"{size} bytes are too few for a safetensors file")
    head = read_range(fd, min(size, len(_POINTER)), 0, path)
    if head == _POINTER:
        raise InputError(f"{quoted(str(path))} is a Git LFS pointer, not the weights", "run git lfs pull")
    length = int.from_bytes(head[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise _error(path, f"its header claims {length:,} bytes; {MAX_HEADER_BYTES:,} is the format's limit")
    if length > size - 8:
        raise _error(path, f"its header claims {length:,} bytes, but only {size - 8:,} follow")
    return read_range(fd, length, 8, path) if length else b""


def _parse_header(header: bytes, path: Path) -> dict[str, JSON]:
    if not header.startswith(b"{"):
        raise _error(path, "its header does not begin with '{'")
    for mark, per_tensor in _MARKS_PER_TENSOR.items():
        if header.count(mark) > per_tensor * MAX_TENSORS:
            raise _error(path, f"its header holds more {mark.decode()!r} than {MAX_TENSORS:,} tensors need")
    return parse_json(header, f"the header of {quoted(str(path))}")


def _metadata(entry: JSON, path: Path) -> dict[str, str]:
    """`__metadata__` may be absent or null, as the reference reader has it; else it maps strings to strings."""
    if entry is None:
        return {}
    if not isinstance(entry, dict):
        raise _error(path, f"{_METADATA} is no object")
    metadata: dict[str, str] = {}
    for key, value in entry.items():
        if not isinstance(value, str):
            raise _error(path, f"{_METADATA} holds something other than a string under {quoted(key)}")
        metadata[key] = value
    return metadata


def _tensor_infos(entries: dict[str, JSON], data_start: int, size: int, path: Path) -> dict[str, TensorInfo]:
    """Check every entry, then that together they cover the data section exactly, without hole or overlap."""
    infos = [_tensor_info(name, entry, data_start, path) for name, entry in entries.items()]
    infos.sort(key=lambda info: (info.offset, info.nbytes))
    end = data_start
    for info in infos:
        if info.offset != end:
            relation = "overlaps the tensor before it" if info.offset < end else "leaves a hole before it"
            raise _error(path, f"tensor {quoted(info.name)} {relation}")
        end += info.nbytes
    if end > size:
        raise _error(path, f"it is truncated: its header describes {end:,} bytes, the file has {size:,}")
    if end < size:
        raise _error(path, f"{size - end:,} bytes at its end belong to no tensor")
    return {info.name: info for info in infos}


def _tensor_info(name: str, entry: JSON, data_start: int, path: Path) -> TensorInfo:
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        # A field we do not know could change what the bytes mean, so it is not skipped.
        raise _error(path, f"tensor {quoted(name)} is not described by exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise _error(path, f"tensor {quoted(name)} has the unknown dtype {quoted(str(dtype))}")
    if not _is_natural_list(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _error(path, f"tensor {quoted(name)} has impossible data_offsets")
    if not _is_natural_list(shape) or not _is_countable(shape):
        raise _error(path, f"tensor {quoted(name)} has an impossible shape")
    nbytes = offsets[1] - offsets[0]
    expected = prod(shape) * ITEM_SIZES[dtype]
    if nbytes != expected:
        raise _error(
            path, f"tensor {quoted(name)}, {dtype} {shape}, needs {expected:,} bytes; its offsets span {nbytes:,}"
        )
    return TensorInfo(name, dtype, tuple(shape), path, data_start + offsets[0], nbytes)


def _is_natural_list(value: JSON) -> TypeGuard[list[int]]:
    """A list of integers >= 0 (True is an int to Python, but not to us)."""
    if not isinstance(value, list) or not set(map(type, value)) <= {int}:
        return False
    return min(cast("list[int]", value), default=0) >= 0


def _is_countable(shape: list[int]) -> bool:
    """Whether elements and strides fit in 64 bits; a dimension of 0 does not excuse the others."""
    return len(shape) <= MAX_DIMENSIONS and (
        0 < prod(shape) <= MAX_ELEMENTS or prod(n or 1 for n in shape) <= MAX_ELEMENTS
    )
