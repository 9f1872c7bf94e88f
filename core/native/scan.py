"""The selective scan with its gate and the short convolution before it, each in one call on the CPU."""

import ctypes

import torch
from torch import Tensor

from lmx.core.native.compiled import INT, LONG, POINTER, c_function
from lmx.core.native.norm import serves
from lmx.core.native.operation import DTYPE_CODES
from lmx.core.native.tape import call
from lmx.core.native.temporary import temporary

# As in src/lanes.h.
MAX_STATES, MAX_KERNEL = 64, 8


class _Conv(ctypes.Structure):
    _fields_ = (
        *((name, POINTER) for name in ("x", "weight", "bias", "state", "new_state", "y")),
        *((name, LONG) for name in ("batch", "length", "channels", "kernel", "x_stride", "silu")),
    )


class _Scan(ctypes.Structure):
    _fields_ = (
        *((name, POINTER) for name in ("raw", "bias", "x", "gate", "B", "C", "D", "A", "state", "new_state", "y")),
        *((name, LONG) for name in ("lengths", "batch", "length", "inner", "states")),
        *((name, LONG) for name in ("raw_stride", "x_stride", "gate_stride", "b_stride")),
    )


_convolution, _scan = c_function("lmx_conv", _Conv, INT), c_function("lmx_scan", _Scan, INT)


def token_rows(x: Tensor) -> tuple[Tensor, int]:
    """X [batch, length, width] such that tokens are one stride apart, throughout the batch; and that stride."""
    batch, length, _ = x.shape
    per_row, per_token, step = x.stride()
    if step == 1 and length == 1:
        return x, per_row
    if step == 1 and (batch == 1 or per_row == length * per_token):
        return x, per_token
    return x.contiguous(), x.shape[2]


def can_convolve(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor) -> bool:
    """Whether `convolve` takes these: all of one dtype, on the CPU, and a short kernel."""
    tensors = (x, weight, state) if bias is None else (x, weight, state, bias)
    return weight.shape[1] <= MAX_KERNEL and x.numel() > 0 and _alike(*tensors)


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, silu: bool, overwrite: bool
) -> tuple[Tensor, Tensor]:
    """`layers.conv.causal_conv` without padding, and then silu if asked for, before anything is rounded."""
    x, stride = token_rows(x)
    weight, state = weight.contiguous(), state.contiguous()
    y, new_state = temporary(x.shape, x.dtype), state if overwrite else torch.empty_like(state)
    biases = None if bias is None else bias.data_ptr()
    places = x.data_ptr(), weight.data_ptr(), biases, state.data_ptr(), new_state.data_ptr(), y.data_ptr()
    call(_convolution(), _Conv(*places, *x.shape, weight.shape[1], stride, silu), DTYPE_CODES[x.dtype])
    return y, new_state


def can_scan(x: Tensor, raw: Tensor, bias: Tensor, D: Tensor, A: Tensor, state: Tensor) -> bool:
    """Whether `gated_scan` takes these: the first four of one dtype, A and the state in float32, all on the CPU."""
    exact = A.dtype == state.dtype == torch.float32 and A.shape[1] <= MAX_STATES
    return exact and x.numel() > 0 and _alike(x, raw, bias, D) and serves(A, state)


def gated_scan(
    raw: Tensor,
    bias: Tensor,
    x: Tensor,
    gate: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    state: Tensor,
    lengths: Tensor | None,
    new_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`(selective_scan(x, softplus(raw + bias), A, B, C, state) + D x) silu(gate)`, and the new state.

    raw, x, gate [batch, length, inner], B and C [batch, length, states], bias and D [inner], all of x's dtype;
    A [inner, states] and state [batch, inner, states] float32. y has x's dtype and is rounded once.
    lengths [batch]: how many of each row's tokens are real; y is 0 behind them. new_state: where to write the state,
    which may be the state itself.
    """
    (raw, raw_stride), (x, x_stride), (gate, gate_stride) = token_rows(raw), token_rows(x), token_rows(gate)
    (B, b_stride), (C, c_stride) = token_rows(B), token_rows(C)
    if b_stride != c_stride:
        B, C, b_stride = B.contiguous(), C.contiguous(), B.shape[2]
    state, A, y = state.contiguous(), A.contiguous(), temporary(x.shape, x.dtype)
    new_state = torch.empty_like(state) if new_state is None else new_state
    tensors = raw, bias, x, gate, B, C, D, A, state, new_state, y
    places = [tensor.data_ptr() for tensor in tensors]
    real = 0 if lengths is None else lengths.data_ptr()
    scan = _Scan(*places, real, *x.shape, A.shape[1], raw_stride, x_stride, gate_stride, b_stride)
    call(_scan(), scan, DTYPE_CODES[x.dtype])
    return y, new_state


def _alike(first: Tensor, *others: Tensor) -> bool:
    return all(other.dtype == first.dtype for other in others) and serves(first, *others)
