"""Sums of the CPU's kernels: residuals and biases."""

import torch
from torch import Tensor

from lmx.core.native.compiled import INT, LONG, POINTER, c_function
from lmx.core.native.norm import serves
from lmx.core.native.operation import DTYPE_CODES
from lmx.core.native.tape import call
from lmx.core.native.temporary import temporary

_add = c_function("lmx_add", POINTER, INT, POINTER, INT, LONG, POINTER, INT, LONG, LONG)


def can_add(x: Tensor, y: Tensor) -> bool:
    """Whether `add` takes these: x contiguous, y of its shape or one row for all of x's, and not wider than x."""
    fits = y.shape == x.shape or y.shape == x.shape[-1:]
    wide = x.dtype == y.dtype or x.dtype == torch.float32
    return fits and wide and x.numel() > 0 and serves(x, y) and x.is_contiguous() and y.is_contiguous()


def add(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """`x + y` [..., width] in `dtype`, which is x's or wider: summed in float32 and rounded once."""
    out = temporary(x.shape, dtype)
    width = x.shape[-1]
    stride = width if y.dim() == x.dim() else 0
    right = y.data_ptr(), DTYPE_CODES[y.dtype], stride
    left = x.data_ptr(), DTYPE_CODES[x.dtype]
    call(_add(), *left, *right, out.data_ptr(), DTYPE_CODES[dtype], x.numel() // width, width)
    return out
