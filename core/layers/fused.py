"""Steps of whole blocks by one kernel each, where that is the same as calling their modules one after another."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lmx.core.layers.projection import affine, is_watched
from lmx.core.native.block import (
    AttentionWeights,
    ExpertWeights,
    attention_step,
    can_step_attention,
    can_step_experts,
    expert_step,
)
from lmx.core.native.mixer import Affine

if TYPE_CHECKING:
    from lmx.core.call import AttentionCall
    from lmx.core.kv_cache import AttentionCache


def step_attention(
    block: nn.Module,
    x: Tensor,
    call: "AttentionCall",
    cache: "AttentionCache | None",
    weights: Callable[[], AttentionWeights | None],
) -> Tensor | None:
    """`x + attention(norm(x))` of x [rows, 1, hidden] -> the same; None where the block must call its modules."""
    if call.step is None or cache is None or not _is_step(block, x):
        return None
    found = weights()
    cache.make_room(call.span)
    if found is None or not can_step_attention(x, found, cache.keys, cache.values):
        return None
    return attention_step(x, found, call.step, cache.keys, cache.values)


def step_experts(
    block: nn.Module, x: Tensor, call: "AttentionCall", weights: Callable[[], ExpertWeights | None]
) -> Tensor | None:
    """`x + mlp(norm(x))` of x [rows, 1, hidden] -> the same; None where the block must call its modules."""
    if call.step is None or call.record.router_logits is not None or not _is_step(block, x):
        return None
    found = weights()
    return expert_step(x, found) if found is not None and can_step_experts(x, found) else None


def affines(*layers: nn.Module) -> tuple[Affine, ...] | None:
    """What kernels must know of linear layers; None where they cannot read one of them."""
    found = [affine(layer) for layer in layers]
    known = tuple(each for each in found if each is not None)
    return known if len(known) == len(found) else None


def _is_step(block: nn.Module, x: Tensor) -> bool:
    """Whether this is one token a row, and nobody trains, compiles or watches the modules."""
    return x.shape[1] == 1 and not block.training and not torch.compiler.is_compiling() and not is_watched(block)
