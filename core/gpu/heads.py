"""A step's heads on the card: queries and keys turned by their position, keys and values put into the cache."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _clipped(head, channel, mask, limit, HAS_LIMIT: tl.constexpr):
    x = tl.load(head + channel, mask, 0.0).to(tl.float32)
    if HAS_LIMIT:
        x = tl.where(x > limit, limit, tl.where(x < -limit, -limit, x))  # NaN stays NaN
    return x


@triton.jit
def _turned(head, channel, mask, cos, sin, half, limit, HAS_LIMIT: tl.constexpr):
    """One head, its channels i and i + half as a pair; those behind 2 * half as they are."""
    is_left, is_turned = channel < half, mask & (channel < 2 * half)
    angle = tl.where(is_left, channel, channel - half)
    cosine, sine = tl.load(cos + angle, is_turned, 1.0), tl.load(sin + angle, is_turned, 0.0)
    x = _clipped(head, channel, mask, limit, HAS_LIMIT)
    partner = _clipped(head, tl.where(is_left, channel + half, channel - half), is_turned, limit, HAS_LIMIT)
    return x * cosine + tl.where(is_left, -partner, partner) * sine


@triton.jit
def _keep_heads(
    query, key, value, cos, sin, at, turned, keys, values,
    heads, kv_heads, width, half, slots, limit, HAS_LIMIT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, WIDTH)
    mask = channel < width
    if head < heads:
        place = (row * heads + head) * width
        x = _turned(query + place, channel, mask, cos, sin, half, limit, HAS_LIMIT)
        tl.store(turned + place + channel, x.to(turned.dtype.element_ty), mask)
    else:
        slot = tl.load(at) % slots
        kv_head = (head - heads) % kv_heads
        source = (row * kv_heads + kv_head) * width
        place = ((row * kv_heads + kv_head) * slots + slot) * width
        if head < heads + kv_heads:
            x = _turned(key + source, channel, mask, cos, sin, half, limit, HAS_LIMIT)
            tl.store(keys + place + channel, x.to(keys.dtype.element_ty), mask)
        else:
            x = _clipped(value + source, channel, mask, limit, HAS_LIMIT)
            tl.store(values + place + channel, x.to(values.dtype.element_ty), mask)


def keep_heads(
    query: Tensor, key: Tensor, value: Tensor, rotary: tuple[Tensor, Tensor], at: Tensor, keys: Tensor, values: Tensor,
    limit: float | None,
) -> Tensor:  # fmt: skip
    """`lmx.core.gpu.stream.keep_heads`."""
    rows, kv_heads, slots, width = keys.shape
    heads = query.shape[-1] // width
    cos, sin = rotary
    turned = torch.empty(rows, heads, 1, width, dtype=query.dtype, device=query.device)
    tensors = query, key, value, cos, sin, at, turned, keys, values
    sizes = heads, kv_heads, width, cos.shape[-1], slots
    options = {"HAS_LIMIT": limit is not None, "WIDTH": triton.next_power_of_2(width), "num_warps": 1}
    _keep_heads[(heads + 2 * kv_heads, rows)](*tensors, *sizes, float(limit or 0.0), **options)
    return turned
