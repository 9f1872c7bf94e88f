"""Memory read by the CPU's kernels, as fast as it comes."""

import ctypes

from torch import Tensor

from lmx.core.native.compiled import LONG, POINTER, c_function

BLOCK_BYTES = 8 * 4096
"""A multiple of so many is read: eight pages side by side."""

_read = c_function("lmx_read", POINTER, LONG, result=ctypes.c_uint64)


def read(numbers: Tensor) -> int:
    """The exclusive or of all 64-bit words of `numbers`, which are contiguous and fill whole BLOCK_BYTES."""
    if not numbers.is_contiguous() or numbers.nbytes % BLOCK_BYTES:
        raise ValueError("whole blocks of contiguous memory can be read")
    return int(_read()(numbers.data_ptr(), numbers.nbytes // 8))
