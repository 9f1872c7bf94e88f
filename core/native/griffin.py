"""Steps of Griffin's blocks, one token a row, in one call each on the CPU; and the soft cap on logits."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmx.core.native.attention import Scale
from lmx.core.native.compiled import FLOAT, INT, LONG, POINTER, c_function
from lmx.core.native.mixer import Affine, AffineStruct, are_served, lie_whole
from lmx.core.native.norm import serves
from lmx.core.native.scan import MAX_KERNEL
from lmx.core.native.tape import call
from lmx.core.native.vector import ACTIVATION_CODES

# The error function's gelu is torch's alone.
ACTIVATIONS_SERVED = frozenset(ACTIVATION_CODES) - {"gelu"}


# The structures of src/griffin.cpp.
class _MlpStep(ctypes.Structure):
    _fields_ = (
        *((name, POINTER) for name in ("x", "out", "norm_weight")),
        *((name, AffineStruct) for name in ("gate", "up", "down")),
        *((name, LONG) for name in ("rows", "hidden", "inner")),
        *(("activation", INT), ("eps", FLOAT)),
    )


class _GriffinStep(ctypes.Structure):
    _fields_ = (
        *((name, POINTER) for name in ("x", "out", "norm_weight")),
        *((name, AffineStruct) for name in ("linear_y", "linear_x", "linear_out")),
        *((name, POINTER) for name in ("conv_weight", "conv_bias", "input_weight", "input_bias")),
        *((name, POINTER) for name in ("recurrent_weight", "recurrent_bias", "rate", "reset", "conv_state", "state")),
        *((name, LONG) for name in ("width", "heads", "kernel", "reset_stride")),
        *(("activation", INT), ("eps", FLOAT), ("mlp", _MlpStep)),
    )


_mlp_step, _griffin_step = c_function("lmx_mlp_step", _MlpStep), c_function("lmx_griffin_step", _GriffinStep)
_soft_cap = c_function("lmx_soft_cap", POINTER, LONG, FLOAT)


@dataclass(frozen=True)
class MlpWeights:
    """`x + down(activation(gate(norm(x))) * up(norm(x)))`: gate, up [inner, hidden], down [hidden, inner]."""

    norm: Scale
    gate: Affine
    up: Affine
    down: Affine
    activation: str

    @property
    def parameters(self) -> list[Tensor]:
        """All that must be bfloat16."""
        return [self.norm.weight, *_biases(self.gate, self.up, self.down)]


@dataclass(frozen=True)
class GriffinWeights:
    """A recurrent block with its norm, and the MLP behind it.

    linear_y, linear_x [width, hidden], linear_out [hidden, width]; conv_weight [width, kernel], conv_bias [width];
    input_gate, recurrent_gate: weight [heads, width of one, width of one] and bias [heads, width of one]; rate float32
    [width], as of `lmx.core.native.recurrence.recur`.
    """

    norm: Scale
    linear_y: Affine
    linear_x: Affine
    linear_out: Affine
    conv_weight: Tensor
    conv_bias: Tensor
    input_gate: tuple[Tensor, Tensor]
    recurrent_gate: tuple[Tensor, Tensor]
    rate: Tensor
    activation: str
    mlp: MlpWeights

    @property
    def parameters(self) -> list[Tensor]:
        """All that must be bfloat16."""
        small = self.norm.weight, self.conv_weight, self.conv_bias, *self.input_gate, *self.recurrent_gate
        return [*small, *_biases(self.linear_y, self.linear_x, self.linear_out), *self.mlp.parameters]


def can_step_mlp(x: Tensor, weights: MlpWeights) -> bool:
    """Whether `mlp_step` takes these."""
    served = weights.activation in ACTIVATIONS_SERVED and x.dtype == torch.bfloat16
    return served and are_served(x, weights.parameters)


def can_step_griffin(x: Tensor, weights: GriffinWeights, conv_state: Tensor, state: Tensor) -> bool:
    """Whether `griffin_step` takes these."""
    sizes = weights.conv_weight.shape[1] <= MAX_KERNEL and weights.activation in ACTIVATIONS_SERVED
    floats = state.dtype == torch.float32 and lie_whole(state) and serves(state)
    return sizes and floats and can_step_mlp(x, weights.mlp) and are_served(x, [*weights.parameters, conv_state])


def mlp_step(x: Tensor, weights: MlpWeights) -> Tensor:
    """One token a row: x [rows, 1, hidden] -> the same, rounded where the layers by themselves round."""
    out = torch.empty(x.shape, dtype=x.dtype)
    call(_mlp_step(), _mlp(x, out, weights))
    return out


def griffin_step(x: Tensor, weights: GriffinWeights, conv_state: Tensor, state: Tensor, reset: Tensor) -> Tensor:
    """The block and its MLP for one token a row: x [rows, 1, hidden] -> the same, rounded where the layers round.

    conv_state [rows, width, kernel - 1] bfloat16 and state [rows, width] float32 are written to; reset: contiguous bool
    [rows or 1, 1], True where a text begins.
    """
    out = torch.empty(x.shape, dtype=x.dtype)
    width, kernel = weights.conv_weight.shape
    small = weights.conv_weight, weights.conv_bias, *weights.input_gate, *weights.recurrent_gate, weights.rate
    step = _GriffinStep(
        *(x.data_ptr(), out.data_ptr(), weights.norm.weight.data_ptr()),
        *(AffineStruct.of(projection) for projection in (weights.linear_y, weights.linear_x, weights.linear_out)),
        *(tensor.data_ptr() for tensor in (*small, reset, conv_state, state)),
        *(width, weights.input_gate[0].shape[0], kernel, int(reset.shape[0] > 1)),
        *(ACTIVATION_CODES[weights.activation], weights.norm.eps, _mlp(x, out, weights.mlp)),
    )
    call(_griffin_step(), step)
    return out


def can_cap(logits: Tensor) -> bool:
    """Whether `soft_cap` takes these."""
    return logits.dtype == torch.bfloat16 and logits.numel() > 0 and lie_whole(logits) and serves(logits)


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """`cap * tanh(logits / cap)` in place, each of the three rounded to bfloat16; returns the logits."""
    call(_soft_cap(), logits.data_ptr(), logits.numel(), cap)
    return logits


def _biases(*projections: Affine) -> Sequence[Tensor]:
    return [projection.bias for projection in projections if projection.bias is not None]


def _mlp(x: Tensor, out: Tensor, weights: MlpWeights) -> _MlpStep:
    return _MlpStep(
        *(x.data_ptr(), out.data_ptr(), weights.norm.weight.data_ptr()),
        *(AffineStruct.of(projection) for projection in (weights.gate, weights.up, weights.down)),
        *(x.shape[0], x.shape[2], weights.gate.table.rows),
        *(ACTIVATION_CODES[weights.activation], weights.norm.eps),
    )
