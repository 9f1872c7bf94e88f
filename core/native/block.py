"""A step of a transformer's blocks, one token a row, in one call each on the CPU: attention, and experts."""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from lmx.core.native.attention import AttentionStep, CacheStruct, ProjectedStruct, Scale, describe_heads
from lmx.core.native.compiled import FLOAT, INT, LONG, POINTER, c_function
from lmx.core.native.mixer import Affine, AffineStruct, are_served
from lmx.core.native.router import NORM_CODES
from lmx.core.native.tape import call
from lmx.core.native.vector import ACTIVATION_CODES, ExpertTable


# The structure of src/attention_block.cpp.
class _AttentionBlock(ctypes.Structure):
    _fields_ = (
        *((name, POINTER) for name in ("x", "out", "norm_weight")),
        *((name, AffineStruct) for name in ("query", "key", "value", "output")),
        *(("step", POINTER), ("projected", ProjectedStruct), ("cache", CacheStruct)),
        *(("hidden", LONG), ("eps", FLOAT), ("offset", INT)),
    )


# The structure of src/experts.cpp.
class _ExpertBlock(ctypes.Structure):
    _fields_ = (
        *((name, POINTER) for name in ("x", "out", "norm_weight", "router", "bank")),
        *((name, LONG) for name in ("rows", "hidden", "experts", "top_k")),
        *(("routing_norm", INT), ("activation", INT), ("eps", FLOAT)),
    )


_attention_block = c_function("lmx_attention_block", _AttentionBlock)
_expert_block = c_function("lmx_expert_block", _ExpertBlock)


@dataclass(frozen=True)
class AttentionWeights:
    """`x + output(attend(query(y), key(y), value(y)))` with y = norm(x); bfloat16.

    offset: the norm's weight is stored minus one. head_norms: of the whole query and the whole key. limit: all three
    projections are kept within it.
    """

    norm: Scale
    query: Affine
    key: Affine
    value: Affine
    output: Affine
    offset: bool = False
    head_norms: tuple[Scale, Scale] | None = None
    limit: float | None = None

    @property
    def parameters(self) -> list[Tensor]:
        """All that must be bfloat16."""
        biases = (projection.bias for projection in (self.query, self.key, self.value, self.output))
        scales = (norm.weight for norm in self.head_norms or ())
        return [self.norm.weight, *scales, *(bias for bias in biases if bias is not None)]


@dataclass(frozen=True)
class ExpertWeights:
    """`x + experts(y)` with y = norm(x); bfloat16. router [experts, hidden] has no bias; normalize: as of `route`."""

    norm: Scale
    router: Affine
    experts: ExpertTable
    top_k: int
    normalize: float | None


def can_step_attention(x: Tensor, weights: AttentionWeights, keys: Tensor, values: Tensor) -> bool:
    """Whether `attention_step` takes these: keys and values as of `AttentionStep.attend`."""
    alike = keys.dtype == values.dtype == x.dtype == torch.bfloat16 and keys.is_cpu
    lie = keys.stride() == values.stride() and keys.stride(3) == 1
    return alike and lie and are_served(x, weights.parameters)


def attention_step(x: Tensor, weights: AttentionWeights, step: AttentionStep, keys: Tensor, values: Tensor) -> Tensor:
    """One token a row: x [rows, 1, hidden] -> the same, rounded where the layers by themselves round.

    keys, values: the cache's buffers [rows, kv_heads, slots, head_dim], written to.
    """
    out = torch.empty(x.shape, dtype=x.dtype)
    kv_heads, width = keys.shape[1], keys.shape[3]
    heads = weights.query.table.rows // width
    shape = describe_heads(weights.head_norms, weights.limit, x.dtype, heads, kv_heads, width)
    block = _AttentionBlock(
        *(x.data_ptr(), out.data_ptr(), weights.norm.weight.data_ptr()),
        *(AffineStruct.of(each) for each in (weights.query, weights.key, weights.value, weights.output)),
        step.address,
        ProjectedStruct(0, 0, 0, 0, 0, 0, *shape),
        CacheStruct(keys.data_ptr(), values.data_ptr(), *keys.stride()[:3]),
        *(x.shape[2], weights.norm.eps, weights.offset),
    )
    call(_attention_block(), block)
    return out


def can_step_experts(x: Tensor, weights: ExpertWeights) -> bool:
    """Whether `expert_step` takes these."""
    bare = weights.router.bias is None and weights.normalize in NORM_CODES
    return bare and x.dtype == torch.bfloat16 and are_served(x, [weights.norm.weight])


def expert_step(x: Tensor, weights: ExpertWeights) -> Tensor:
    """One token a row: x [rows, 1, hidden] -> the same, rounded where the layers by themselves round."""
    out = torch.empty(x.shape, dtype=x.dtype)
    router, bank = weights.router.table, weights.experts
    block = _ExpertBlock(
        *(x.data_ptr(), out.data_ptr(), weights.norm.weight.data_ptr(), router.words.data_ptr(), bank.words.data_ptr()),
        *(x.shape[0], x.shape[2], router.rows, weights.top_k),
        *(NORM_CODES[weights.normalize], ACTIVATION_CODES[bank.activation], weights.norm.eps),
    )
    call(_expert_block(), block)
    return out
