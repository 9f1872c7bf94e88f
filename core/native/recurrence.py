"""The RG-LRU with its gates in one call on the CPU; for one token the products of the gates too."""

import ctypes

import torch
from torch import Tensor

from lmx.core.native.compiled import INT, LONG, POINTER, c_function
from lmx.core.native.norm import serves
from lmx.core.native.operation import DTYPE_CODES
from lmx.core.native.scan import token_rows
from lmx.core.native.tape import call
from lmx.core.native.temporary import temporary

# Rows of a one-token step beyond which torch's batched product is quicker than reading the weights for each.
MAX_ROWS = 4


class _Recurrence(ctypes.Structure):
    _fields_ = (
        *((name, POINTER) for name in ("x", "input", "recurrent", "gate")),
        *((name, POINTER) for name in ("input_weight", "input_bias", "recurrent_weight", "recurrent_bias")),
        *((name, POINTER) for name in ("rate", "state", "reset", "new_state", "y")),
        *((name, LONG) for name in ("lengths", "batch", "length", "heads", "width")),
        *((name, LONG) for name in ("x_stride", "gate_stride", "reset_stride")),
    )


_recurrence = c_function("lmx_recurrence", _Recurrence, INT)


def can_recur(x: Tensor, state: Tensor, *parameters: Tensor) -> bool:
    """Whether the functions below take these: parameters of x's dtype, a state in float32, all on the CPU."""
    alike = state.dtype == torch.float32 and all(parameter.dtype == x.dtype for parameter in parameters)
    return alike and x.numel() > 0 and serves(x, state, *parameters)


def recur(
    x: Tensor,
    products: tuple[Tensor, Tensor],
    rate: Tensor,
    reset: Tensor,
    state: Tensor,
    gate: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The recurrence from the products of its gates on; returns its answers and the new state [batch, width].

    x and gate [batch, length, width]; products: of the input gate and of the recurrent gate, before the sigmoid,
    [heads, batch * length, width of one]; rate float32 [width], the exponent of 2 in `a` where the gate is open;
    reset: [batch or 1, length] bool, True where a text begins. The answers, in x's dtype, are the states times `gate`.
    lengths [batch]: how many of each row's tokens are real; the answers are 0 behind them.
    """
    heads, _, width = products[0].shape
    input_gate, recurrent_gate = (product.contiguous() for product in products)
    gates = input_gate.data_ptr(), recurrent_gate.data_ptr(), None, None, None, None
    return _run(x, gates, rate, reset, state, gate, lengths, (heads, width))


def recur_step(
    x: Tensor,
    input_gate: tuple[Tensor, Tensor],
    recurrent_gate: tuple[Tensor, Tensor],
    rate: Tensor,
    reset: Tensor,
    state: Tensor,
    gate: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`recur` for one token a row, gates included: each a weight [heads, width, width] and a bias [heads, width]."""
    weights = [parameter.contiguous() for parameter in (*input_gate, *recurrent_gate)]
    gates = None, None, *(weight.data_ptr() for weight in weights)
    return _run(x, gates, rate, reset, state, gate, None, (weights[0].shape[0], weights[0].shape[1]))


def _run(
    x: Tensor,
    gates: tuple[int | None, ...],
    rate: Tensor,
    reset: Tensor,
    state: Tensor,
    gate: Tensor | None,
    lengths: Tensor | None,
    heads: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    x, x_stride = token_rows(x)
    opened, gate_stride = (None, 0) if gate is None else token_rows(gate)
    state, reset = state.contiguous(), reset.contiguous()
    y, new_state = temporary(x.shape, x.dtype), torch.empty_like(state)
    products, weights = gates[:2], gates[2:]
    places = x.data_ptr(), *products, None if opened is None else opened.data_ptr(), *weights
    states = rate.data_ptr(), state.data_ptr(), reset.data_ptr(), new_state.data_ptr(), y.data_ptr()
    real = 0 if lengths is None else lengths.data_ptr()
    reset_stride = 0 if len(reset) == 1 else reset.shape[1]
    sizes = *x.shape[:2], *heads, x_stride, gate_stride, reset_stride
    call(_recurrence(), _Recurrence(*places, *states, real, *sizes), DTYPE_CODES[x.dtype])
    return y, new_state
