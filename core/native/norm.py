"""Root-mean-square norms of the CPU's kernels: one call instead of torch's several."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from lmx.core.native.compiled import FLOAT, INT, LONG, POINTER, c_function, library
from lmx.core.native.operation import DTYPE_CODES, define
from lmx.core.native.tape import call
from lmx.core.native.temporary import temporary

# What the kernels of this file and of scan.py and recurrence.py compute with.
WORKING_DTYPES = (torch.float32, torch.bfloat16)


# `Norm` of src/lanes.h, and behind it what src/norm.cpp adds.
class _NormRows(ctypes.Structure):
    _fields_ = (
        *((name, POINTER) for name in ("x", "weight", "y")),
        *((name, LONG) for name in ("x_stride", "y_stride", "width")),
        *(("x_dtype", INT), ("eps", FLOAT), ("offset", LONG)),
        *(("dtype", INT), ("rows", LONG)),
    )


_rms_norm = c_function("lmx_rms_norm", _NormRows)


def serves(*tensors: Tensor) -> bool:
    """Whether the kernels are there and may take these tensors: on the CPU, no gradient asked for, not compiling."""
    if torch.compiler.is_compiling() or library() is None:
        return False
    grad = torch.is_grad_enabled()
    return all(t.is_cpu and t.dtype in WORKING_DTYPES and not (grad and t.requires_grad) for t in tensors)


def can_normalise(x: Tensor, weight: Tensor) -> bool:
    """Whether `rms_norm` takes these: x [..., width] of the weight's dtype or float32, rows one after another."""
    same = x.dtype == weight.dtype or x.dtype == torch.float32
    return same and serves(x, weight) and x.is_contiguous() and weight.is_contiguous() and x.shape[-1] > 0


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: bool = False) -> Tensor:
    """`weight * (x / sqrt(mean(x^2) + eps))` over the last dimension, in the weight's dtype, computed in float32.

    x [..., width] is rounded to the weight's dtype first, and the normalised x before the product, as in
    `layers.norm.RMSNorm`; with `offset` the scale is `1 + weight` and the product is rounded once (`OffsetRMSNorm`).
    """
    return _rms_norm_cpu(x, weight, eps, offset)


def rms_norm_parts(x: Tensor, sizes: Sequence[int], eps: float) -> Tensor:
    """Normalise each part of the rows of contiguous x [..., sum of sizes] by itself, without a scale."""
    out = torch.empty_like(x)
    at, code, total = 0, DTYPE_CODES[x.dtype], x.shape[-1]
    for size in sizes:
        start = at * x.element_size()
        source, target = x.data_ptr() + start, out.data_ptr() + start
        rows = x.numel() // total
        call(_rms_norm(), _NormRows(source, None, target, total, total, size, code, eps, 0, code, rows))
        at += size
    return out


def _rms_norm_cpu(x: Tensor, weight: Tensor, eps: float, offset: bool) -> Tensor:
    out = temporary(x.shape, weight.dtype)
    width = x.shape[-1]
    places = x.data_ptr(), weight.data_ptr(), out.data_ptr(), width, width, width
    call(
        _rms_norm(),
        _NormRows(*places, DTYPE_CODES[x.dtype], eps, offset, DTYPE_CODES[weight.dtype], x.numel() // width),
    )
    return out


define(
    "rms_norm(Tensor x, Tensor weight, float eps, bool offset) -> Tensor",
    _rms_norm_cpu,
    lambda x, weight, eps, offset: torch.empty_like(x, dtype=weight.dtype),
)
