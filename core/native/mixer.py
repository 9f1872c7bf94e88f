"""A step of a whole recurrent block, one token a row, in one call on the CPU."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmx.core.native.attention import Scale
from lmx.core.native.compiled import FLOAT, INT, LONG, POINTER, c_function
from lmx.core.native.norm import serves
from lmx.core.native.operation import DTYPE_CODES
from lmx.core.native.scan import MAX_KERNEL, MAX_STATES
from lmx.core.native.tape import call
from lmx.core.native.vector import MAX_VECTORS, MatrixTable


# As in src/mixer.cpp.
class _MambaStep(ctypes.Structure):
    _fields_ = (
        *((name, POINTER) for name in ("x", "out", "norm_weight")),
        *((name, POINTER) for name in ("in_proj", "x_proj", "dt_proj", "out_proj")),
        *((name, POINTER) for name in ("in_bias", "dt_bias", "out_bias", "conv_weight", "conv_bias", "D")),
        *((name, POINTER) for name in ("A", "conv_state", "state")),
        *((name, LONG) for name in ("rows", "hidden", "inner", "states", "rank", "kernel")),
        *((name, INT) for name in ("x_dtype", "out_dtype")),
        *((name, FLOAT) for name in ("norm_eps", "mixer_eps")),
    )


_mamba_step = c_function("lmx_mamba_step", _MambaStep)


@dataclass(frozen=True)
class Affine:
    """A matrix [rows, columns] and its bias [rows], if any."""

    table: MatrixTable
    bias: Tensor | None


@dataclass(frozen=True)
class MambaWeights:
    """What a Mamba block with silu is made of; bfloat16, but A.

    in_proj [2 * inner, hidden], x_proj [rank + 2 * states, inner] and dt_proj [inner, rank] without a bias in the
    product, out_proj [hidden, inner]; conv_weight [inner, kernel], conv_bias [inner] or None, dt_bias and D [inner];
    A [inner, states] float32. eps: of the norms of dt, B and C.
    """

    norm: Scale
    in_proj: Affine
    x_proj: Affine
    dt_proj: Affine
    out_proj: Affine
    conv_weight: Tensor
    conv_bias: Tensor | None
    A: Tensor
    D: Tensor
    eps: float

    @property
    def parameters(self) -> list[Tensor]:
        """All that must be bfloat16."""
        biases = self.in_proj.bias, self.dt_proj.bias, self.out_proj.bias, self.conv_bias
        return [self.norm.weight, self.conv_weight, self.D, *(bias for bias in biases if bias is not None)]


class AffineStruct(ctypes.Structure):
    """`Affine` of src/affine.h."""

    _fields_ = (("matrix", POINTER), ("bias", POINTER))

    @classmethod
    def of(cls, projection: Affine) -> "AffineStruct":
        """The layer's; its table must outlive it."""
        return cls(projection.table.words.data_ptr(), place(projection.bias))


def can_step_mamba(x: Tensor, weights: MambaWeights, conv_state: Tensor, state: Tensor) -> bool:
    """Whether `mamba_step` takes these."""
    sizes = weights.conv_weight.shape[1] <= MAX_KERNEL and weights.A.shape[1] <= MAX_STATES
    floats = weights.A.dtype == state.dtype == torch.float32 and lie_whole(weights.A, state)
    return sizes and floats and serves(weights.A, state) and are_served(x, [*weights.parameters, conv_state])


def mamba_step(x: Tensor, weights: MambaWeights, conv_state: Tensor, state: Tensor, out_dtype: torch.dtype) -> Tensor:
    """`x + mixer(norm(x))` for one token a row: x [rows, 1, hidden] -> the same in `out_dtype`, x's or float32.

    conv_state [rows, inner, kernel - 1] bfloat16 and state [rows, inner, states] float32 are written to. Numbers are
    rounded where the layers by themselves round them.
    """
    rows, _, hidden = x.shape
    inner, states = weights.A.shape
    out = torch.empty(x.shape, dtype=out_dtype)
    projections = weights.in_proj, weights.x_proj, weights.dt_proj, weights.out_proj
    biases = weights.in_proj.bias, weights.dt_proj.bias, weights.out_proj.bias
    step = _MambaStep(
        *(x.data_ptr(), out.data_ptr(), weights.norm.weight.data_ptr()),
        *(projection.table.words.data_ptr() for projection in projections),
        *(place(tensor) for tensor in (*biases, weights.conv_weight, weights.conv_bias, weights.D)),
        *(tensor.data_ptr() for tensor in (weights.A, conv_state, state)),
        *(rows, hidden, inner, states, weights.dt_proj.table.columns, weights.conv_weight.shape[1]),
        *(DTYPE_CODES[x.dtype], DTYPE_CODES[out_dtype], weights.norm.eps, weights.eps),
    )
    call(_mamba_step(), step)
    return out


def place(tensor: Tensor | None) -> int | None:
    """Where a tensor lies, or null."""
    return None if tensor is None else tensor.data_ptr()


def are_served(x: Tensor, parameters: Sequence[Tensor]) -> bool:
    """Whether x [rows, 1, hidden] is one token a row, few rows, and the parameters are bfloat16 without gaps."""
    few = x.dim() == 3 and x.shape[1] == 1 and 0 < x.shape[0] <= MAX_VECTORS
    alike = all(parameter.dtype == torch.bfloat16 for parameter in parameters)
    return few and alike and serves(x, *parameters) and lie_whole(x, *parameters)


def lie_whole(*tensors: Tensor) -> bool:
    """Whether each lies in memory without gaps."""
    return all(tensor.is_contiguous() for tensor in tensors)
