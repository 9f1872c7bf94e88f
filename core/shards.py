"""Safetensors shards whose every byte has its place before the first tensor is made.

Sizes are known from a plan, so headers and index are fixed in advance; tensors may then be written in any order, one
at a time, each where it belongs. In a shard, every tensor starts at a multiple of 64 bytes: a cache line, and the
widest vector, so that kernels can work on the mapped file. The format leaves no room between tensors; so those whose
size is no multiple of 64 stand at the end, the widest elements first, where each is aligned to its elements at least.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Self

from lmx.core.checkpoint import SINGLE
from lmx.core.jsonfile import to_json
from lmx.core.mapped import ITEM_SIZES

if TYPE_CHECKING:
    from torch import Tensor

ALIGNMENT = 64
DEFAULT_SHARD_BYTES = 5_000_000_000

# So much is written before the disk is made to take it and the system's cache to let it go: what is unwritten stays
# small, a full shard syncs at once, and new bytes come into the pages of old ones instead of pushing out the source.
_FLUSH_BYTES = 128 << 20
_WRITE_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Slot:
    """The place for one tensor; `dtype` as safetensors spells it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its length in the file."""
        return prod(self.shape) * ITEM_SIZES[self.dtype]


Unit = tuple[Slot, ...]
"""Tensors that are one thing, as a packed matrix and its scales: they are always in one shard."""


@dataclass(frozen=True)
class Shard:
    """One file: its name, its first bytes, and where each tensor begins, counted from the start of the file."""

    name: str
    header: bytes
    offsets: Mapping[str, int]
    slots: tuple[Slot, ...]
    units: tuple[Unit, ...]

    @property
    def size(self) -> int:
        """The length of the file in bytes."""
        return len(self.header) + sum(slot.nbytes for slot in self.slots)


def plan_shards(groups: Iterable[Sequence[Unit]], max_bytes: int = DEFAULT_SHARD_BYTES) -> tuple[Shard, ...]:
    """Deal tensors out to files of at most `max_bytes` of tensors, in their order.

    A group (the experts of a layer) stays in one file where it fits in one; a unit always does, however long it is.
    A single file is called `model.safetensors`; several have their number and count in their names.
    """
    files = list(_deal(groups, max_bytes))
    if len(files) == 1:
        return (make_shard(SINGLE, files[0]),)
    names = (f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1))
    return tuple(make_shard(name, units) for name, units in zip(names, files, strict=True))


def _deal(groups: Iterable[Sequence[Unit]], max_bytes: int) -> Iterator[list[Unit]]:
    units: list[Unit] = []
    used = 0
    for group in groups:
        if units and used + _nbytes(group) > max_bytes >= _nbytes(group):
            yield units
            units, used = [], 0
        for unit in group:
            if units and used + _nbytes([unit]) > max_bytes:
                yield units
                units, used = [], 0
            units.append(unit)
            used += _nbytes([unit])
    yield units


def _nbytes(units: Iterable[Unit]) -> int:
    return sum(slot.nbytes for unit in units for slot in unit)


def make_shard(name: str, units: Sequence[Unit]) -> Shard:
    """One file of these tensors, in the order that alignment wants."""
    slots = sorted((slot for unit in units for slot in unit), key=_alignment_rank)  # stable
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts: dict[str, int] = {}
    end = 0
    for slot in slots:
        starts[slot.name] = end
        end += slot.nbytes
        entries[slot.name] = {
            "dtype": slot.dtype,
            "shape": list(slot.shape),
            "data_offsets": [starts[slot.name], end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    return Shard(name, header, {n: len(header) + start for n, start in starts.items()}, tuple(slots), tuple(units))


def _alignment_rank(slot: Slot) -> int:
    return -ITEM_SIZES[slot.dtype] if slot.nbytes % ALIGNMENT else -ALIGNMENT


def index_json(shards: Sequence[Shard]) -> bytes:
    """The `model.safetensors.index.json` of several shards."""
    slots = [(slot, shard.name) for shard in shards for slot in shard.slots]
    index = {
        "metadata": {"total_size": sum(slot.nbytes for slot, _ in slots)},
        "weight_map": dict(sorted((slot.name, file) for slot, file in slots)),
    }
    return to_json(index)


class ShardWriter:
    """One shard as a growing file. Use as a context manager: when it ends well, every byte is on the disk.

    Raises OSError as the disk does; the caller knows what to say about it.
    """

    def __init__(self, path: Path, shard: Shard, done: int = 0) -> None:
        """done: how many of the slots, in their order, the file holds already."""
        self.path, self.shard, self.done = path, shard, done
        self._sizes = {slot.name: slot.nbytes for slot in shard.slots}
        self._written = sum(slot.nbytes for slot in shard.slots[:done])
        self._unsynced = 0
        self._syncing: Future[None] | None = None

    def __enter__(self) -> Self:
        fresh = 0 if self.done else os.O_TRUNC
        self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | fresh | os.O_CLOEXEC, 0o666)
        self._syncer = ThreadPoolExecutor(1, "sync")
        try:
            self._put(memoryview(self.shard.header), 0)
        except OSError:
            os.close(self._fd)
            raise
        return self

    def write(self, name: str, tensor: "Tensor", first_byte: int = 0) -> None:
        """Put a tensor, or the part of it that starts at `first_byte`, in its place."""
        import torch

        if first_byte + tensor.nbytes > self._sizes[name]:
            raise ValueError(f"{name}: {first_byte + tensor.nbytes} bytes for a place of {self._sizes[name]}")
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
        self._put(data, self.shard.offsets[name] + first_byte)

    def sync(self) -> None:
        """Have all that was written on the disk when this returns."""
        if self._syncing is not None:
            self._syncing.result()
        self._hand_over()
        self._unsynced = 0

    def _put(self, data: memoryview, offset: int) -> None:
        self._written += len(data)
        while len(data):
            done = os.pwrite(self._fd, data[:_WRITE_BYTES], offset)
            data, offset = data[done:], offset + done
            self._unsynced += done
            if self._unsynced >= _FLUSH_BYTES:
                self._start_sync()

    def _start_sync(self) -> None:
        """Make the disk take what was written, while more is being made; at most one such request at a time."""
        if self._syncing is not None:
            self._syncing.result()
        self._syncing = self._syncer.submit(self._hand_over)
        self._unsynced = 0

    def _hand_over(self) -> None:
        """Have on the disk what was written, and out of the system's cache: it will not be read soon."""
        os.fsync(self._fd)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self._syncer.shutdown()
            if kind is None:
                self._finish()
        finally:
            os.close(self._fd)

    def _finish(self) -> None:
        if self._written != self.shard.size:
            raise ValueError(f"{self.shard.name}: {self._written} bytes were written of {self.shard.size}")
        self.sync()
