"""What tensors the pickles of torch archives name and where their bytes lie, as a limited child process reads them.

Nothing of a pickle is believed but this table, and of the table only what fits the archive's own directory. The child
(`pickle_child`) unpickles with `weights_only`, knows neither network nor tokens of ours by its environment, and ends
by itself when it takes too long; what it answers is JSON. Imports no torch.
"""

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import IO, Self, TypeGuard, cast

from lmx.convert.zip_entries import Entry, damaged
from lmx.core.errors import InputError
from lmx.core.files import quoted
from lmx.core.jsonfile import JSON, parse_json
from lmx.core.mapped import ITEM_SIZES
from lmx.core.safetensors_file import MAX_DIMENSIONS, MAX_ELEMENTS, MAX_TENSORS
from lmx.core.text.child import SAFE_ENVIRONMENT, import_root

PICKLE = "data.pkl"
# 135 bytes a tensor: 30,000 of them in a file. An empty list takes one byte of a pickle and 60 of memory
PICKLE_LIMIT_BYTES = 4 << 20
_START_SECONDS = 60.0  # torch is imported; on a slow disk that takes long
_SECONDS = 5.0  # a file; 12,000 tensors take 1 s on a busy machine
_ANSWER_LIMIT_BYTES = 128 << 20
_SINGLE_THREADED = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "CUDA_VISIBLE_DEVICES": ""}
_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "bool": "BOOL", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8",
}  # fmt: skip
_HOSTILE = "do not use it: a file of weights needs no such thing; get safetensors from the model's publisher"


@dataclass(frozen=True, slots=True)
class StridedTensor:
    """A tensor as torch saves it: a strided view of a storage that lies in the file.

    offset: of its first element, in bytes of the file; span: the elements from the first to the last, gaps included.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    span: int

    @property
    def nbytes(self) -> int:
        """Its bytes without gaps."""
        return prod(self.shape) * ITEM_SIZES[self.dtype]

    @property
    def is_contiguous(self) -> bool:
        """Whether its elements lie in the file as they do in a dense tensor."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != expected:
                return not self.nbytes
            expected *= size
        return True


@dataclass(frozen=True)
class Archive:
    """An open archive: its path, a descriptor for the child, and the checked directory (`read_entries`)."""

    path: Path
    descriptor: int
    entries: Mapping[str, Entry]

    @cached_property
    def storages(self) -> dict[int, Entry]:
        """The entries that hold storages, by their offset in the file."""
        return {entry.offset: entry for entry in self.entries.values() if entry.name.startswith("data/")}


def read_tables(archives: Sequence[Archive]) -> Iterator[list[StridedTensor]]:
    """The tensors of each archive, by one child for all.

    Raises InputError for a pickle that holds anything but tensors, asks for code, takes too much memory or time, or
    describes what does not lie in the archive.
    """
    for archive in archives:
        _check_pickle(archive)
    with _Child([archive.descriptor for archive in archives]) as child:
        child.start(archives[0].path)
        for archive in archives:
            yield [_tensor(row, archive) for row in child.rows(archive.path)]


def _check_pickle(archive: Archive) -> None:
    pickle, order = archive.entries.get(PICKLE), archive.entries.get("byteorder")
    if pickle is None or "constants.pkl" in archive.entries:
        raise InputError(f"{quoted(str(archive.path))} is no archive of weights", "give a file that torch.save wrote")
    if pickle.nbytes > PICKLE_LIMIT_BYTES:
        raise damaged(archive.path, f"its pickle has {pickle.nbytes:,} bytes, more than any table of tensors needs")
    if order is not None and os.pread(archive.descriptor, 6, order.offset)[: order.nbytes] != b"little":
        raise InputError(f"{quoted(str(archive.path))} is not little-endian", "save it again on a usual machine")


class _Child:
    """The process, and the line from it."""

    def __init__(self, descriptors: Sequence[int]) -> None:
        spec = find_spec("lmx.convert.pickle_child")
        if spec is None or spec.origin is None:
            raise InputError("this installation of lmx is incomplete", "install it again: pip install lmx")
        task = {"files": list(descriptors), "seconds": _SECONDS, "roots": [import_root("torch")]}
        self._process = subprocess.Popen(
            [sys.executable, "-I", spec.origin, json.dumps(task)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pass_fds=descriptors,
            cwd="/",
            env={**{key: os.environ[key] for key in SAFE_ENVIRONMENT if key in os.environ}, **_SINGLE_THREADED},
            process_group=0,
        )
        self._buffer = b""
        self._received = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.wait()
        self._pipe.close()

    @property
    def _pipe(self) -> IO[bytes]:
        if self._process.stdout is None:
            raise TypeError("the child was started with a pipe")
        return self._process.stdout

    def start(self, path: Path) -> None:
        """Wait until torch is imported there."""
        if "ready" not in self._line(path, time.monotonic() + _START_SECONDS):
            raise InputError(f"{quoted(str(path))} could not be read: its process did not start", "install torch again")

    def rows(self, path: Path) -> list[JSON]:
        """The rows of the next file."""
        found: list[JSON] = []
        deadline = time.monotonic() + _SECONDS
        while True:
            line = self._line(path, deadline)
            if "error" in line:
                raise InputError(f"{quoted(str(path))} is refused: {_said(str(line['error']))}", _HOSTILE)
            if "end" in line:
                return found
            found.append(line.get("tensor"))
            if len(found) > MAX_TENSORS:
                raise damaged(path, f"it names more than {MAX_TENSORS:,} tensors")

    def _line(self, path: Path, deadline: float) -> dict[str, JSON]:
        while b"\n" not in self._buffer:
            readable, _, _ = select.select([self._pipe], [], [], max(deadline - time.monotonic(), 0.001))
            if not readable:
                raise damaged(path, "its pickle took too long to read, and was stopped")
            chunk = os.read(self._pipe.fileno(), 1 << 16)
            self._received += len(chunk)
            if not chunk or self._received > _ANSWER_LIMIT_BYTES:
                raise damaged(path, "the process that read its pickle died")
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return parse_json(line, f"the table of {quoted(str(path))}")


def _said(error: str) -> str:
    """Torch's reason, without its advice to trust the file."""
    reason = error.partition("WeightsUnpickler error:")[2] or error
    for advice in ("Please use", "was not an allowed", "This is an internal", "Check the documentation"):
        reason = reason.partition(advice)[0]
    return quoted(" ".join(reason.split()))


def _tensor(row: JSON, archive: Archive) -> StridedTensor:
    """One row, checked against the directory: the storage is an entry, and the tensor lies within it."""
    if not isinstance(row, list) or len(row) != 7 or not isinstance(row[0], str):
        raise damaged(archive.path, "a row of its table is broken")
    name, dtype, shape, strides, *numbers = row
    what = f"tensor {quoted(str(name))}"
    if dtype not in _DTYPES:
        raise damaged(archive.path, f"{what} has the dtype {quoted(str(dtype))}, which lmx does not read")
    if not (_is_naturals(shape) and _is_naturals(strides) and _is_naturals(numbers)):
        raise damaged(archive.path, f"{what} has a negative shape, stride or offset")
    if len(shape) != len(strides) or len(shape) > MAX_DIMENSIONS or prod(n or 1 for n in shape) > MAX_ELEMENTS:
        raise damaged(archive.path, f"{what} has an impossible shape")
    first, storage, storage_bytes = numbers
    span = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) if prod(shape) else 0
    item = ITEM_SIZES[_DTYPES[str(dtype)]]
    tensor = StridedTensor(
        str(name), _DTYPES[str(dtype)], tuple(shape), tuple(strides), storage + first * item if span else 0, span
    )
    if span:
        _check_place(tensor, (first + span) * item, storage, storage_bytes, archive)
    return tensor


def _check_place(tensor: StridedTensor, end: int, storage: int, storage_bytes: int, archive: Archive) -> None:
    what = f"tensor {quoted(tensor.name)}"
    entry = archive.storages.get(storage)
    if entry is None or entry.nbytes != storage_bytes:
        raise damaged(archive.path, f"the storage of {what} is not in the archive, or of another size there")
    if end > storage_bytes or tensor.nbytes > storage_bytes:
        raise damaged(archive.path, f"{what} needs more than the {storage_bytes:,} bytes of its storage")


def _is_naturals(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in cast("list[object]", value))
