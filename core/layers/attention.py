"""Grouped-query attention over keys that may come from a cache, a ring, or the call itself."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from lmx.core.errors import UsageError

Implementation = Literal["sdpa", "eager", "flash"]


@dataclass(frozen=True)
class Visibility:
    """Which keys each query of one call sees: the same for every attention layer of a model.

    mask: [batch or 1, 1, queries, keys], True where seen; None where all keys are, or, with `causal`, all earlier ones
    (then there are as many keys as queries). causal with a mask: it says no more than that the queries are the last of
    the keys and each sees those up to itself, which some kernels do without it.
    """

    mask: Tensor | None
    causal: bool = False

    def to(self, device: torch.device) -> "Visibility":
        """The same for a layer on another device."""
        return self if self.mask is None else replace(self, mask=self.mask.to(device))


def clip(states: Tensor, limit: float | None) -> Tensor:
    """Queries, keys or values kept within [-limit, limit], where a config sets one (`clip_qkv`)."""
    return states if limit is None else states.clamp(-limit, limit)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visibility: Visibility,
    implementation: Implementation,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention at scale `head_dim^-1/2`; several query heads share a key head without copies of it.

    query: [batch, heads, queries, head_dim]; key, value: [batch, kv_heads, keys, head_dim].
    Returns the heads' answers side by side [batch, queries, heads * head_dim] and, with `eager`, the weights
    [batch, heads, queries, keys]. Raises UsageError where `flash` cannot serve.
    """
    if implementation == "eager":
        answer, weights = _eager(query, key, value, visibility, dropout)
    elif implementation == "flash":
        answer, weights = _flash(query, key, value, visibility, dropout), None
    else:
        answer, weights = _sdpa(query, key, value, visibility, dropout), None
    return answer.transpose(1, 2).flatten(2), weights


def _sdpa(query: Tensor, key: Tensor, value: Tensor, visibility: Visibility, dropout: float) -> Tensor:
    batch, heads, queries, width = query.shape
    kv_heads, mask = key.shape[1], visibility.mask
    if queries == 1 and heads != kv_heads:
        # A single query's heads become the queries of their shared key head: twice as fast as enable_gqa here.
        folded = query.view(batch, kv_heads, heads // kv_heads, width)
        answer = F.scaled_dot_product_attention(folded, key, value, mask, dropout)
        return answer.reshape(batch, heads, 1, width)
    if mask is not None and visibility.causal and query.is_cuda and _can_flash(query, key, value, dropout):
        return _flash_end(query, key, value, dropout)
    causal = visibility.causal and mask is None
    return F.scaled_dot_product_attention(query, key, value, mask, dropout, causal, enable_gqa=heads != kv_heads)


def _flash_end(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
    """A prompt's later part over all keys, without a mask: it would keep flash attention away.

    No other kernel shares key heads without copies of them, or leaves [queries, keys] scores unwritten. Torch's public
    function aligns `is_causal` to the first key; this operation aligns it to the last, as
    `torch.nn.attention.bias.causal_lower_right` has it, whose import takes seconds.
    """
    answer: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout, True)[0]
    return answer


def _can_flash(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether torch's flash kernel takes these tensors as they are; it wants heads of a multiple of 8 channels."""
    shared = key.shape[1] != query.shape[1]
    params = SDPAParams(query, key, value, None, dropout, False, shared)
    return query.shape[-1] % 8 == 0 and can_use_flash_attention(params)


def _flash(query: Tensor, key: Tensor, value: Tensor, visibility: Visibility, dropout: float) -> Tensor:
    problem = _against_flash(query, key, value, visibility, dropout)
    if problem is not None:
        raise UsageError(
            f"--attention flash: torch's flash kernel {problem}",
            "Use --attention sdpa, which picks the fastest kernel that fits.",
        )
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return _sdpa(query, key, value, visibility, dropout)


def _against_flash(query: Tensor, key: Tensor, value: Tensor, visibility: Visibility, dropout: float) -> str | None:
    """Why torch's flash kernel cannot serve a call; None where it can."""
    if query.device.type != "cuda":
        return f"needs CUDA, and this runs on {query.device.type}"
    if visibility.mask is not None and not visibility.causal:
        return "takes no mask: it needs rows without padding, and a prompt no longer than the window"
    if query.dtype not in (torch.bfloat16, torch.float16):
        return f"computes in 16 bits, and the model is in {str(query.dtype).removeprefix('torch.')}"
    if not _can_flash(query, key, value, dropout):
        return f"does not serve heads of {query.shape[-1]} channels on this GPU"
    return None


def _eager(query: Tensor, key: Tensor, value: Tensor, visibility: Visibility, dropout: float) -> tuple[Tensor, Tensor]:
    batch, heads, queries, width = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    folded = query.reshape(batch, kv_heads, -1, width)  # [batch, kv_heads, group * queries, head_dim]
    scores = (folded @ key.transpose(2, 3) * width**-0.5).view(batch, heads, queries, keys)
    mask = visibility.mask
    if visibility.causal and mask is None:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, dropout, training=dropout > 0)
    answer = weights.view(batch, kv_heads, -1, keys) @ value
    return answer.view(batch, heads, queries, width), weights
