"""Grouped-query attention over keys that may come from a cache, a ring, or the call itself."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lmx.core.errors import UsageError

Implementation = Literal["sdpa", "eager", "flash"]


@dataclass(frozen=True)
class Visibility:
    """Which keys each query of one call sees: the same for every attention layer of a model.

    mask: [batch or 1, 1, queries, keys], True where seen; None where all keys are, or, with `causal`, all earlier ones
    (then there are as many keys as queries).
    """

    mask: Tensor | None
    causal: bool = False


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
    kv_heads = key.shape[1]
    if queries == 1 and heads != kv_heads:
        # A single query's heads become the queries of their shared key head: twice as fast as enable_gqa here.
        folded = query.view(batch, kv_heads, heads // kv_heads, width)
        answer = F.scaled_dot_product_attention(folded, key, value, visibility.mask, dropout)
        return answer.reshape(batch, heads, 1, width)
    return F.scaled_dot_product_attention(
        query, key, value, visibility.mask, dropout, visibility.causal, enable_gqa=heads != kv_heads
    )


def _flash(query: Tensor, key: Tensor, value: Tensor, visibility: Visibility, dropout: float) -> Tensor:
    if visibility.mask is not None or query.device.type != "cuda":
        raise UsageError(
            "--attention flash: torch's flash kernel needs CUDA, no padding, and a prompt no longer than the window",
            "Use --attention sdpa, which picks the fastest kernel that fits.",
        )
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        return _sdpa(query, key, value, visibility, dropout)


def _eager(query: Tensor, key: Tensor, value: Tensor, visibility: Visibility, dropout: float) -> tuple[Tensor, Tensor]:
    batch, heads, queries, width = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    folded = query.reshape(batch, kv_heads, -1, width)  # [batch, kv_heads, group * queries, head_dim]
    scores = (folded @ key.transpose(2, 3) * width**-0.5).view(batch, heads, queries, keys)
    mask = visibility.mask
    if visibility.causal:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, dropout, training=dropout > 0)
    answer = weights.view(batch, kv_heads, -1, keys) @ value
    return answer.view(batch, heads, queries, width), weights
