"""What stands between a step's products, on CUDA: norms, heads, the choice of experts. Importing this loads no Triton.

Torch takes some forty launches a layer for it, each of two microseconds or so even in a CUDA graph: as long as the
card takes to read the layer's weights.
"""

import torch
from torch import Tensor

from lmx.core.gpu.recurrent import serves

MAX_WIDTH, MAX_EXPERTS = 16384, 1024
_NORMS = (None, 1.0)
_Tables = tuple[Tensor, Tensor]


def can_normalise(x: Tensor, weight: Tensor) -> bool:
    """Whether `rms_norm` takes these: x [..., width] without gaps, in the weight's dtype or float32; no gradients."""
    same = x.dtype in (weight.dtype, torch.float32) and x.device == weight.device
    fits = same and x.shape[-1] <= MAX_WIDTH and x.is_contiguous() and weight.is_contiguous()
    return fits and serves(x) and serves(weight) and not _is_watched(x, weight)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: bool = False) -> Tensor:
    """`lmx.core.native.norm.rms_norm`."""
    from lmx.core.gpu import norm

    with torch.cuda.device_of(x):
        return norm.rms_norm(x, weight, eps, offset)


def can_route(router_logits: Tensor, normalize: float | None) -> bool:
    """Whether `route` takes logits [tokens, experts]: not too many experts, a norm that it knows; no gradients."""
    fits = normalize in _NORMS and router_logits.shape[-1] <= MAX_EXPERTS and router_logits.is_contiguous()
    return fits and serves(router_logits) and not _is_watched(router_logits)


def route(router_logits: Tensor, top_k: int, normalize: float | None) -> tuple[Tensor, Tensor]:
    """`lmx.core.layers.moe.route`; the lower id wins a tie, and NaN chooses the id of no expert."""
    from lmx.core.gpu import router

    with torch.cuda.device_of(router_logits):
        return router.route(router_logits, top_k, normalize is not None)


def can_keep_heads(query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether `keep_heads` takes one token a row, and the buffers of a cache: all of one dtype, without gaps."""
    tensors = query, key, value, keys, values
    fits = query.shape[1] == 1 and all(tensor.is_contiguous() for tensor in tensors)
    return fits and serves(query, key, value, keys, values) and not _is_watched(query, key, value)


def keep_heads(
    query: Tensor, key: Tensor, value: Tensor, rotary: _Tables, at: Tensor, keys: Tensor, values: Tensor,
    limit: float | None,
) -> Tensor:  # fmt: skip
    """Turn the heads of one token a row, and write its key and value into a cache, in one launch.

    query [rows, 1, heads * head_dim]; key, value [rows, 1, kv_heads * head_dim]; rotary: float32 [1, 1, 1, turned / 2];
    at: int64 [1], the token's number; keys, values [rows, kv_heads, slots, head_dim], written at its remainder by
    slots; limit: all three are kept within it. Returns the turned query [rows, heads, 1, head_dim].
    """
    from lmx.core.gpu import heads

    with torch.cuda.device_of(query):
        return heads.keep_heads(query, key, value, rotary, at, keys, values, limit)


def _is_watched(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
