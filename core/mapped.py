"""A file in memory without being read: one private map, torch views of it, and advice to the kernel.

torch is imported when the first view is made, not before.
"""

import errno
import mmap
import platform
import sys
from enum import Enum
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from lmx.core.errors import ResourceError
from lmx.core.files import quoted

if TYPE_CHECKING:
    import torch

# Bytes an element, by the safetensors name of the dtype.
ITEM_SIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "BOOL": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1,
}  # fmt: skip


class Advice(Enum):
    """What the kernel may expect of a range of bytes (madvise)."""

    WILL_NEED = mmap.MADV_WILLNEED
    SEQUENTIAL = mmap.MADV_SEQUENTIAL
    DONT_NEED = mmap.MADV_DONTNEED


class FileMap:
    """One private copy-on-write map of a whole file.

    Pages are read when touched and, as long as nobody writes to them, dropped again when memory is short. A write (an
    optimizer's step) makes a page private to the process; the file never changes. No swap is reserved for the pages
    that might be written, so that a file larger than the machine's memory can be mapped.

    The map lives as long as this object or any view of it. The caller may close `fd` (before Python 3.13 the map keeps
    a duplicate of it). Truncating the file while it is mapped is outside of what can be caught: touching what is gone
    kills the process, as with every mapped file.
    """

    __slots__ = ("_map",)

    def __init__(self, fd: int, size: int, path: Path) -> None:
        """Map `size` bytes of `fd`. Raises ResourceError where the kernel refuses."""
        flags = mmap.MAP_PRIVATE | _no_reserve()
        prot = mmap.PROT_READ | mmap.PROT_WRITE
        try:
            if sys.version_info >= (3, 13):
                self._map = mmap.mmap(fd, size, flags=flags, prot=prot, trackfd=False)
            else:
                self._map = mmap.mmap(fd, size, flags=flags, prot=prot)
        except (OSError, OverflowError) as error:
            hint = "free some memory"
            if isinstance(error, OSError) and error.errno == errno.ENOMEM:
                hint = "raise the limit of address space (ulimit -v), or set vm.overcommit_memory to 0"
            raise ResourceError(f"{quoted(str(path))} ({size:,} bytes) cannot be mapped: {error}", hint) from error

    def view(self, dtype: str, shape: tuple[int, ...], offset: int, nbytes: int) -> "torch.Tensor":
        """The tensor at `offset`, which the caller has checked to lie within the file.

        A view where `offset` is aligned to the element size, else a copy: torch and its kernels want aligned elements.
        Every view has a storage of its own, just as long as the tensor.
        """
        import torch

        dtypes = torch_dtypes()
        if not nbytes:
            return torch.empty(shape, dtype=dtypes[dtype])
        item = ITEM_SIZES[dtype]
        if offset % item:
            raw = torch.frombuffer(self._map, dtype=torch.uint8, count=nbytes, offset=offset)
            return raw.clone().view(dtypes[dtype]).view(shape)
        return torch.frombuffer(self._map, dtype=dtypes[dtype], count=nbytes // item, offset=offset).view(shape)

    def advise(self, advice: Advice, offset: int, nbytes: int) -> None:
        """Tell the kernel what is about to happen to a range; changes speed and resident memory, never a byte read.

        DONT_NEED drops the pages that lie wholly in the range, and what was written to them through a view; pages
        shared with a neighbour stay. The others take in the pages at both ends.
        """
        page = mmap.PAGESIZE
        end = offset + nbytes
        start, end = (
            (-(-offset // page), end // page) if advice is Advice.DONT_NEED else (offset // page, -(-end // page))
        )
        length = min(end * page, len(self._map)) - start * page
        if length > 0:
            self._map.madvise(advice.value, start * page, length)


def empty_alone(elements: int, dtype: "torch.dtype") -> "torch.Tensor":
    """A flat tensor on pages of its own, which go back to the system as soon as nothing refers to it.

    For what is large and short-lived, or made beside such: malloc keeps what is freed, and small things that live long
    are then put into the gaps, so that the next large one no longer fits and a loader's memory grows by all of them.
    """
    import torch

    if not elements:
        return torch.empty(0, dtype=dtype)
    pages = mmap.mmap(-1, elements * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype)


def _no_reserve() -> int:
    """MAP_NORESERVE, which Python's mmap does not name in every version; 0 where it has no meaning."""
    if sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64", "riscv64"):
        return 0x4000  # include/uapi/asm-generic/mman-common.h
    return 0


@cache
def torch_dtypes() -> "dict[str, torch.dtype]":
    """Torch's dtypes by safetensors' names."""
    import torch

    return {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "BOOL": torch.bool,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U64": torch.uint64,
        "U32": torch.uint32,
        "U16": torch.uint16,
        "U8": torch.uint8,
    }


def stored_name(dtype: "torch.dtype") -> str:
    """Safetensors' name of a dtype. Raises KeyError for one that it has no name for."""
    return _stored_names()[dtype]


@cache
def _stored_names() -> "dict[torch.dtype, str]":
    return {dtype: name for name, dtype in torch_dtypes().items()}
