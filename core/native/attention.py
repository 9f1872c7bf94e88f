"""Attention of one new token a row over a cache, from the projections to the heads' answers, in one call a layer."""

import ctypes
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lmx.core.native.compiled import FLOAT, INT, LONG, POINTER, c_function, library
from lmx.core.native.operation import DTYPE_CODES
from lmx.core.native.tape import call

_SERVED = (torch.float32, torch.bfloat16)


# The three structures of src/attention.h.
class _Step(ctypes.Structure):
    _fields_ = (
        *((name, POINTER) for name in ("cos", "sin")),
        *((name, LONG) for name in ("half", "table_stride")),
        *((name, POINTER) for name in ("slots", "counts")),
        ("rows", LONG),
    )


class ProjectedStruct(ctypes.Structure):
    """`Projected` of that file."""

    _fields_ = (
        *((name, POINTER) for name in ("query", "key", "value")),
        *((name, LONG) for name in ("query_stride", "key_stride", "value_stride")),
        *((name, POINTER) for name in ("query_norm", "key_norm")),
        *((name, FLOAT) for name in ("query_eps", "key_eps", "limit")),
        ("dtype", INT),
        *((name, LONG) for name in ("heads", "kv_heads", "width")),
    )


class CacheStruct(ctypes.Structure):
    """`Cache` of that file."""

    _fields_ = (
        *((name, POINTER) for name in ("keys", "values")),
        *((name, LONG) for name in ("row_stride", "head_stride", "slot_stride")),
    )


_attend_step = c_function("lmx_attend_step", _Step, ProjectedStruct, CacheStruct, POINTER)


@dataclass(frozen=True)
class Scale:
    """An RMS norm over a whole projection: weight [projection], and what is added under the root."""

    weight: Tensor
    eps: float


class AttentionStep:
    """What the layers of a decode step share: rotary angles, and each row's slot and number of keys."""

    def __init__(self, cos: Tensor, sin: Tensor, slots: Tensor, counts: Tensor) -> None:
        """cos, sin: float32 [rows or 1, ..., half]; slots, counts: int64 [rows].

        A row's new key goes into its slot (-1: into none), and its query sees the first `counts` slots, at least one.
        """
        # Copies of the tables, which others read: `follow` writes to them.
        tables = (table.clone(memory_format=torch.contiguous_format) for table in (cos, sin))
        self._tensors = *tables, slots.contiguous(), counts.contiguous()
        cosines, sines, into, seen = (tensor.data_ptr() for tensor in self._tensors)
        half = cos.shape[-1]
        stride = half if cos.shape[0] > 1 else 0
        self._words = _Step(cosines, sines, half, stride, into, seen, slots.shape[0])
        self._step = ctypes.byref(self._words)
        numbers = ctypes.c_int64 * slots.shape[0]
        self._places = cosines, sines, numbers.from_address(into), numbers.from_address(seen)
        self._table_bytes = 4 * half

    @property
    def address(self) -> int:
        """Where a kernel finds it, for as long as this object lives."""
        return ctypes.addressof(self._words)

    def follow(self, cos: int, sin: int, slot: int, count: int) -> None:
        """Become the step of another token, of the same number in every row.

        cos, sin: the addresses of its angles' tables. Everything is written to where it lay, without a call of torch:
        each costs as much as a kernel when the weights of a whole step have passed through the caches.
        """
        cosines, sines, slots, counts = self._places
        ctypes.memmove(cosines, cos, self._table_bytes)
        ctypes.memmove(sines, sin, self._table_bytes)
        for row in range(len(slots)):
            slots[row], counts[row] = slot, count

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        keys: Tensor,
        values: Tensor,
        norms: tuple[Scale, Scale] | None = None,
        limit: float | None = None,
    ) -> Tensor:
        """Normalise and clip, turn queries and keys, write keys and values into the cache, attend.

        query: [rows, 1, heads * head_dim]; key, value: [rows, 1, kv_heads * head_dim]; keys, values: the cache's
        buffers [rows, kv_heads, slots, head_dim]; all of one dtype (see `can_attend`). Returns the heads' answers side
        by side [rows, 1, heads * head_dim].
        """
        kv_heads, width = keys.shape[1], keys.shape[3]
        projected = ProjectedStruct(
            *(states.data_ptr() for states in (query, key, value)),
            *(states.stride(0) for states in (query, key, value)),
            *describe_heads(norms, limit, query.dtype, query.shape[-1] // width, kv_heads, width),
        )
        kept = CacheStruct(keys.data_ptr(), values.data_ptr(), *keys.stride()[:3])
        out = query.new_empty(query.shape)
        call(_attend_step(), self._step, projected, kept, out.data_ptr())
        return out


def describe_heads(
    norms: tuple[Scale, Scale] | None, limit: float | None, dtype: torch.dtype, heads: int, kv_heads: int, width: int
) -> tuple[int | float, ...]:
    """The fields of `ProjectedStruct` behind the places and strides."""
    scales: tuple[int | float, ...] = (0, 0, 0.0, 0.0)
    if norms is not None:
        scales = (*(norm.weight.data_ptr() for norm in norms), *(norm.eps for norm in norms))
    return *scales, math.inf if limit is None else limit, DTYPE_CODES[dtype], heads, kv_heads, width


def can_step(cos: Tensor) -> bool:
    """Whether the kernels are there for a call with these rotary tables, and nothing is being recorded."""
    recorded = torch.is_grad_enabled() or torch.compiler.is_compiling()
    return not recorded and cos.is_cpu and cos.dtype == torch.float32 and library() is not None


def can_attend(
    query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, norms: tuple[Scale, Scale] | None
) -> bool:
    """Whether the kernel reads these tensors as they lie: one dtype, on the CPU, without gaps in a head."""
    dtype = keys.dtype
    return (
        dtype in _SERVED
        and keys.is_cpu
        and query.dtype == key.dtype == value.dtype == values.dtype == dtype
        and query.stride(2) == key.stride(2) == value.stride(2) == keys.stride(3) == 1
        and keys.stride() == values.stride()
        and (norms is None or all(norm.weight.dtype == dtype and norm.weight.is_contiguous() for norm in norms))
    )
