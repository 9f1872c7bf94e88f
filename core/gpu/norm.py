"""Mamba's norms of dt, B and C in one launch: a step has no time for a launch each."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _scale(squares, is_part, size, eps):
    return tl.where(is_part, tl.rsqrt(tl.sum(tl.where(is_part, squares, 0.0), 0) / size + eps), 0.0)


@triton.jit
def _normalise_parts(x, y, stride, first, second, third, eps, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    width = first + second + third
    value = tl.load(x + token * stride + column, column < width, 0.0).to(tl.float32)
    squares = value * value
    in_first, in_third = column < first, (column >= first + second) & (column < width)
    in_second = (column >= first) & (column < first + second)
    scale = _scale(squares, in_first, first, eps) + _scale(squares, in_second, second, eps)
    scale += _scale(squares, in_third, third, eps)
    tl.store(y + token * width + column, value * scale, column < width)


def normalise_parts(x: Tensor, sizes: tuple[int, int, int], eps: float) -> Tensor:
    """`lmx.core.layers.norm.rms_normalise_parts` of x [..., sum of sizes], contiguous, as one tensor."""
    width = sum(sizes)
    y = torch.empty_like(x)
    block = triton.next_power_of_2(width)
    _normalise_parts[(x.numel() // width,)](x, y, width, *sizes, eps, BLOCK=block)
    return y
