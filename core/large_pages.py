"""Memory in large pages, where the system has them.

Whoever reads a model's weights once a token touches every page of gigabytes. With pages of 4 KB, looking them up takes
as long as reading them, most of all in virtual machines, where each is looked up twice (`benchmarks/large_pages.py`
tells). Linux gives 2 MB at a time to those who ask (madvise(2), MADV_HUGEPAGE): of fresh memory, and of files as they
are read in, where the file system can (ext4 since Linux 6.16, XFS).
"""

import mmap
import weakref
from contextlib import suppress
from math import prod
from threading import Lock
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LARGE_PAGE = 2 << 20
# Weights are a megabyte or less where experts are many: they share regions. What is larger has one of its own.
_REGION = 64 << 20
_ALIGNMENT = 64


def advise_large(memory: mmap.mmap) -> None:
    """Ask for large pages; where there are none nothing changes."""
    if hasattr(mmap, "MADV_HUGEPAGE") and len(memory) >= LARGE_PAGE:
        with suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)


def fresh_memory(nbytes: int) -> mmap.mmap:
    """Pages of zeros that belong to nothing else. Raises MemoryError where the system has not so much left."""
    try:
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{nbytes:,} bytes of memory cannot be had") from error
    advise_large(pages)
    return pages


class _Regions:
    """Hands out pieces of regions; a region lives as long as a tensor lies in it."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._current: weakref.ref[mmap.mmap] | None = None
        self._used = 0

    def take(self, nbytes: int) -> tuple[mmap.mmap, int]:
        """Memory and where in it `nbytes` of zeros begin."""
        if nbytes > _REGION // 4:
            return fresh_memory(nbytes), 0
        with self._lock:
            region = None if self._current is None else self._current()
            if region is None or self._used + nbytes > _REGION:
                region = fresh_memory(_REGION)
                self._current, self._used = weakref.ref(region), 0
            first = self._used
            self._used = -(-(first + nbytes) // _ALIGNMENT) * _ALIGNMENT
            return region, first


_regions = _Regions()


def lasting_zeros(shape: tuple[int, ...], dtype: "torch.dtype") -> "Tensor":
    """A tensor of zeros on the CPU for what lasts as long as a model or a conversation."""
    import torch

    elements = prod(shape)
    if not elements:
        return torch.empty(shape, dtype=dtype)
    memory, first = _regions.take(elements * dtype.itemsize)
    return torch.frombuffer(memory, dtype=dtype, count=elements, offset=first).view(shape)


def lasting(x: "Tensor") -> "Tensor":
    """The same numbers in memory for what lasts, if they lie on the CPU."""
    if not x.is_cpu:
        return x
    return lasting_zeros(tuple(x.shape), x.dtype).copy_(x)
