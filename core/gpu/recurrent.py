"""The recurrent layers' work on CUDA: whether Triton's kernels take it, and the calls. Importing this loads no Triton.

States are written to in place where the caller allows it and no gradient is wanted, so that a step of generation
reads and writes the same addresses each time, and nothing here waits for the device: a CUDA graph can hold a step.
Gradients go through torch: the forward pass is a kernel's, the backward pass runs the layer's own torch functions on
the same inputs.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lmx.core.gpu.launch import can_launch

MAX_STATES, MAX_KERNEL, MAX_PARTS = 64, 17, 4096
# Rows of a one-token step beyond which a batched product is better than each row's own reading of the gates' weights.
MAX_ROWS = 4
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_Pair = tuple[Tensor, Tensor]


def serves(first: Tensor, *others: Tensor) -> bool:
    """Whether the kernels run where the first lies and take its dtype, which all share."""
    if torch.compiler.is_compiling() or first.dtype not in _DTYPES or first.numel() == 0 or not can_launch(first):
        return False
    return all(other.dtype == first.dtype and other.device == first.device for other in others)


def can_normalise_parts(x: Tensor, sizes: Sequence[int]) -> bool:
    """Whether `normalise_parts` takes these: three parts of a few numbers, without gaps, and no gradients."""
    return len(sizes) == 3 and sum(sizes) <= MAX_PARTS and serves(x) and x.is_contiguous() and not _is_watched(x)


def normalise_parts(x: Tensor, sizes: Sequence[int], eps: float) -> Tensor:
    """`lmx.core.layers.norm.rms_normalise_parts`, the parts still side by side."""
    from lmx.core.gpu import norm

    first, second, third = sizes
    with torch.cuda.device_of(x):
        return norm.normalise_parts(x, (first, second, third), eps)


def can_convolve(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor) -> bool:
    """Whether `convolve` takes these: all of one dtype, a short kernel, and nobody wants gradients."""
    others = (weight, state) if bias is None else (weight, state, bias)
    return weight.shape[1] <= MAX_KERNEL and serves(x, *others) and not _is_watched(x, *others)


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, lengths: Tensor | None, silu: bool, overwrite: bool
) -> _Pair:
    """`lmx.core.layers.conv.causal_conv`."""
    from lmx.core.gpu import conv

    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    state, new_state = _states(state, overwrite)
    with torch.cuda.device_of(x):
        return conv.convolve(_rows(x), weight, bias, state, lengths, silu, new_state), new_state


def can_scan(x: Tensor, raw: Tensor, bias: Tensor, D: Tensor, A: Tensor, state: Tensor) -> bool:
    """Whether `gated_scan` takes these: the first four of one dtype, A and the state in float32."""
    exact = A.dtype == state.dtype == torch.float32 and A.shape[1] <= MAX_STATES
    return exact and serves(x, raw, bias, D) and A.device == state.device == x.device


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
    oracle: Callable[..., _Pair],
) -> _Pair:
    """`lmx.core.native.scan.gated_scan`; the state is written to, unless gradients are wanted.

    oracle: the same in torch, of the first nine tensors.
    """
    from lmx.core.gpu import scan

    def kernel(*tensors: Tensor) -> _Pair:
        raw, bias, x, gate, A, B, C, D, state = tensors
        state, new_state = _states(state, not watched)
        weights = A.contiguous(), _rows(B), _rows(C), D.contiguous()
        with torch.cuda.device_of(x):
            columns = _rows(raw), bias.contiguous(), _rows(x), _rows(gate)
            return scan.gated_scan(*columns, *weights, state, lengths, new_state), new_state

    tensors = raw, bias, x, gate, A, B, C, D, state
    watched = _is_watched(*tensors)
    return _recomputed(kernel, oracle, *tensors) if watched else kernel(*tensors)


def can_recur(x: Tensor, state: Tensor, *parameters: Tensor) -> bool:
    """Whether `recur` and `recur_step` take these: parameters of x's dtype, a state in float32."""
    return state.dtype == torch.float32 and state.device == x.device and serves(x, *parameters)


def can_step(x: Tensor, *parameters: Tensor) -> bool:
    """Whether `recur_step` is for these, beside what `can_recur` says: one token a row, few rows, no gradients."""
    return x.shape[1] == 1 and len(x) <= MAX_ROWS and not _is_watched(x, *parameters)


def recur(
    x: Tensor,
    products: _Pair,
    rate: Tensor,
    reset: Tensor,
    state: Tensor,
    gate: Tensor | None,
    lengths: Tensor | None,
    overwrite: bool,
    oracle: Callable[..., _Pair],
) -> _Pair:
    """`lmx.core.native.recurrence.recur`; where `overwrite` says so and no gradients are wanted, in place.

    oracle: the same in torch, of x, both products, rate, state and gate.
    """
    from lmx.core.gpu import rg_lru

    def kernel(x: Tensor, first: Tensor, second: Tensor, rate: Tensor, state: Tensor, gate: Tensor | None) -> _Pair:
        state, new_state = _states(state, overwrite and not watched)
        products, opened = (first.contiguous(), second.contiguous()), None if gate is None else _rows(gate)
        with torch.cuda.device_of(x):
            given = _rows(x), products, rate.contiguous(), reset.contiguous(), state, opened
            return rg_lru.recur(*given, lengths, new_state), new_state

    tensors = x, *products, rate, state, gate
    watched = _is_watched(*tensors)
    return _recomputed(kernel, oracle, *tensors) if watched else kernel(*tensors)


def recur_step(
    x: Tensor,
    input_gate: _Pair,
    recurrent_gate: _Pair,
    rate: Tensor,
    reset: Tensor,
    state: Tensor,
    gate: Tensor | None,
    overwrite: bool,
) -> _Pair:
    """`lmx.core.native.recurrence.recur_step`, in place where `overwrite` says so."""
    from lmx.core.gpu import rg_lru

    state, new_state = _states(state, overwrite)
    (first, first_bias), (second, second_bias) = input_gate, recurrent_gate
    gates = (first.contiguous(), first_bias.contiguous()), (second.contiguous(), second_bias.contiguous())
    opened = None if gate is None else _rows(gate)
    with torch.cuda.device_of(x):
        given = _rows(x), *gates, rate.contiguous(), reset.contiguous(), state, opened
        return rg_lru.recur_step(*given, new_state), new_state


def _rows(x: Tensor) -> Tensor:
    """X [batch, length, width] with the numbers of a token side by side."""
    return x if x.stride(2) == 1 else x.contiguous()


def _states(state: Tensor, overwrite: bool) -> _Pair:
    """The state without gaps, and where the new one goes."""
    state = state.contiguous()
    return state, state if overwrite else torch.empty_like(state)


def _is_watched(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _recomputed(kernel: Callable[..., _Pair], oracle: Callable[..., _Pair], *tensors: Tensor | None) -> _Pair:
    return cast(_Pair, _Recomputed.apply(kernel, oracle, *tensors))


class _Recomputed(torch.autograd.Function):
    """A kernel's answers with the gradients of the torch functions that say the same."""

    @staticmethod
    def forward(ctx: Any, kernel: Callable[..., _Pair], oracle: Callable[..., _Pair], *tensors: Tensor | None) -> _Pair:
        ctx.oracle = oracle
        ctx.save_for_backward(*tensors)
        return kernel(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[2:]
        saved: tuple[Tensor | None, ...] = ctx.saved_tensors
        inputs = [None if tensor is None else tensor.detach() for tensor in saved]
        chosen = [
            tensor.requires_grad_()
            for tensor, needed in zip(inputs, wanted, strict=True)
            if tensor is not None and needed
        ]
        with torch.enable_grad():
            outputs = ctx.oracle(*inputs)
        made = iter(torch.autograd.grad(outputs, chosen, grads))
        return None, None, *(next(made) if needed else None for needed in wanted)
