"""Memory for a kernel's answer that is large and soon gone: what is handed back is handed out again.

A prompt goes through dozens of layers, and each makes the same few tensors of megabytes and lets them go. Aligned
memory that goes back to glibc's heap does not fit the next request for as much, by the few bytes that aligning it took:
the heap grew by a tensor a layer. Fresh pages for each would have to be zeroed first.
"""

import ctypes
import mmap
import weakref
from math import prod

import torch
from torch import Tensor

from lmx.core.large_pages import LARGE_PAGE, fresh_memory

LEAST_BYTES = 1 << 20
"""What is smaller the heap does well."""

KEPT_BYTES = 128 << 20
"""So much of what was handed back is kept at most: what a layer makes of 512 tokens at a width of 7 billion parameters,
twice."""


class _Blocks:
    """Blocks that nothing lies in. No lock: a finalizer may run in any thread, amid any line of Python."""

    def __init__(self) -> None:
        self._free: list[mmap.mmap] = []

    def take(self, nbytes: int) -> mmap.mmap:
        """One of at least so many bytes, and of at most half as many again."""
        nbytes = -(-nbytes // LARGE_PAGE) * LARGE_PAGE
        fitting = [block for block in self._free if nbytes <= len(block) <= nbytes * 3 // 2]
        for block in sorted(fitting, key=len):
            try:
                self._free.remove(block)
            except ValueError:  # another thread has it
                continue
            return block
        return fresh_memory(nbytes)

    def give_back(self, block: mmap.mmap) -> None:
        """Keep it for the next, or let it go where enough is kept."""
        if sum(map(len, tuple(self._free))) + len(block) <= KEPT_BYTES:
            self._free.append(block)


_blocks = _Blocks()


def temporary(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor on the CPU; it may live as long as any other. Raises MemoryError without room for it."""
    elements = prod(shape)
    nbytes = elements * dtype.itemsize
    if nbytes < LEAST_BYTES:
        return torch.empty(shape, dtype=dtype)
    block = _blocks.take(nbytes)
    view = (ctypes.c_char * nbytes).from_buffer(block)  # lives as long as the tensor's storage
    weakref.finalize(view, _blocks.give_back, block).atexit = False
    return torch.frombuffer(view, dtype=dtype, count=elements).view(shape)
