"""Norms in one launch each, Mamba's of dt, B and C in one for all three: a step has no time for more."""

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


@triton.jit
def _rms_norm(x, weight, y, width, eps, OFFSET: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < width
    dtype = y.dtype.element_ty
    value = tl.load(x + row * width + column, mask, 0.0).to(dtype).to(tl.float32)
    value *= tl.rsqrt(tl.sum(value * value, 0) / width + eps)
    scale = tl.load(weight + column, mask, 0.0).to(tl.float32)
    value = value * (1 + scale) if OFFSET else value.to(dtype).to(tl.float32) * scale
    tl.store(y + row * width + column, value.to(dtype), mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: bool) -> Tensor:
    """`lmx.core.gpu.stream.rms_norm`: x [..., width] in the weight's dtype or float32 -> the same in the weight's."""
    width = x.shape[-1]
    y = torch.empty(x.shape, dtype=weight.dtype, device=x.device)
    block = triton.next_power_of_2(width)
    warps = min(16, max(1, block // 256))
    _rms_norm[(x.numel() // width,)](x, weight, y, width, eps, OFFSET=offset, BLOCK=block, num_warps=warps)
    return y


def normalise_parts(x: Tensor, sizes: tuple[int, int, int], eps: float) -> Tensor:
    """`lmx.core.layers.norm.rms_normalise_parts` of x [..., sum of sizes], contiguous, as one tensor."""
    width = sum(sizes)
    y = torch.empty_like(x)
    block = triton.next_power_of_2(width)
    _normalise_parts[(x.numel() // width,)](x, y, width, *sizes, eps, BLOCK=block)
    return y
