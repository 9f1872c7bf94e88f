"""The selective scan of Mamba: a linear recurrence whose decay and input depend on the token.

    h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t        y_t = sum_n C_t[n] h_t[n]

(arXiv 2312.00752, algorithm 2.) The D skip, the softplus of delta and the gate stay with the caller.
A state per step is 16 times as large as an input per step, so states never exist for the whole prompt: blocks of a few
steps that fit the caches are made, used and overwritten. Every function here is pure: state in, state out.
"""

import math
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# exp(z) = exp2(z log2 e). PyTorch's exp2 takes a third of the time of its exp on an AVX-512 AMD core, and exp was more
# than half of the scan; the one extra rounding, in the exponent, is of the size of the one that delta * A has anyway.
LOG2_E = 1 / math.log(2)

# Elements of the block of states, 4 MiB in float32: 8 steps of FalconMamba-7B. Larger blocks fall out of the cache,
# smaller ones pay for more calls.
BLOCK_ELEMENTS = 1 << 20


def selective_scan(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Scan `length` steps from `state`; returns y and the state after the last step.

    x [batch, length, inner], delta [batch, length, inner] (after softplus; 0 leaves the state as it is),
    A [inner, state] (negative), B and C [batch, length, state], state [batch, inner, state].
    y [batch, length, inner] and the new state have the dtype of `state`, in which everything is computed: float32 or
    float64; x, B and C may be narrower and are widened block by block. A length of 0 is a no-op.

    Differentiable in all six inputs, with memory that grows as the square root of the length: the backward pass keeps
    one state per segment of sqrt(length) steps and recomputes the others.
    """
    length = x.shape[1]
    if length == 0:
        return torch.empty_like(x, dtype=state.dtype), state
    if length == 1:
        return selective_scan_step(x, delta, A, B, C, state)
    inputs = (x, delta, A, B, C, state)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        return cast(tuple[Tensor, Tensor], _SelectiveScan.apply(*inputs))  # type: ignore[no-untyped-call]
    y = torch.empty_like(x, dtype=state.dtype, memory_format=torch.contiguous_format)
    return y, _scan_into(y, *inputs)


def selective_scan_step(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """`selective_scan` for a length of 1, with the same shapes: a few plain torch calls, as decoding wants."""
    delta = delta.to(state.dtype).transpose(1, 2)  # [batch, inner, 1]
    drive = delta * x.transpose(1, 2) * B  # [batch, inner, state]
    state = torch.addcmul(drive, torch.exp2(delta * LOG2_E * A), state)
    y = torch.matmul(state, C.to(state.dtype).transpose(1, 2))  # [batch, inner, 1]
    return y.transpose(1, 2), state


def selective_scan_reference(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The oracle: the two lines of the definition, one step after another. Shapes as in `selective_scan`."""
    outputs = []
    for t in range(x.shape[1]):
        decay = torch.exp(delta[:, t, :, None] * A)  # [batch, inner, state]
        state = decay * state + (delta[:, t] * x[:, t])[..., None] * B[:, t, None]
        outputs.append((state * C[:, t, None]).sum(-1))
    y = torch.stack(outputs, 1) if outputs else torch.empty_like(x, dtype=state.dtype)
    return y, state


def block_length(batch: int, inner: int, state: int) -> int:
    """How many steps of [batch, state, inner] are scanned at a time."""
    return max(1, BLOCK_ELEMENTS // max(1, batch * inner * state))


def _scan_into(y: Tensor, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> Tensor:
    """Write the outputs into y [batch, length, inner] and return the last state, without autograd.

    Of the formulations tried, this was the quickest: decays of a block in two calls, then two calls a step that turn
    each decay into its state in place (half the memory of separate decays and inputs), then one product with C.
    Inside, `inner` is the last axis: a last axis of 16 would leave the vector units idle. Sums of logarithms or
    quotients of products of decays would need fewer calls, but overflow.
    """
    batch, length, _ = x.shape
    rates = _rates(A, state.dtype)  # [state, inner]
    columns, rows = B.to(state.dtype)[..., None], C.to(state.dtype)[:, :, None]
    carried = state.transpose(1, 2).clone(memory_format=torch.contiguous_format)  # [batch, state, inner]
    steps = min(length, block_length(*state.shape))
    buffer = carried.new_empty(steps * carried.numel())
    for start in range(0, length, steps):
        span = slice(start, min(start + steps, length))
        count = span.stop - span.start
        block = buffer[: count * carried.numel()].view(batch, count, *carried.shape[1:])
        _decays(delta[:, span], rates, out=block)
        drive = delta[:, span] * x[:, span]
        carried.copy_(_steps(block, drive, columns[:, span], carried))
        y[:, span] = torch.matmul(rows[:, span], block).squeeze(2)  # [batch, count, 1, inner]
    return carried.transpose(1, 2).contiguous()


def _rates(A: Tensor, dtype: torch.dtype) -> Tensor:
    return (A.to(dtype).t() * LOG2_E).contiguous()


def _decays(delta: Tensor, rates: Tensor, out: Tensor) -> Tensor:
    """exp(delta A) for a block: delta [batch, steps, inner], rates [state, inner], out [batch, steps, state, inner]."""
    torch.mul(delta.to(out.dtype)[:, :, None], rates, out=out)
    return torch.exp2(out, out=out)


def _steps(block: Tensor, drive: Tensor, columns: Tensor, state: Tensor) -> Tensor:
    """Turn the decays in `block` [batch, steps, state, inner] into states, in place; returns a view of the last one."""
    per_step = zip(block.unbind(1), columns.unbind(1), drive[:, :, None].unbind(1), strict=True)
    for decay, column, row in per_step:  # [batch, state, inner], [batch, state, 1], [batch, 1, inner]
        state = decay.mul_(state).addcmul_(column, row)
    return state


class _SelectiveScan(torch.autograd.Function):
    """The scan with a backward pass that recomputes the states of one segment at a time."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        y = torch.empty_like(x, dtype=state.dtype, memory_format=torch.contiguous_format)
        entering = []
        for span in _segments(x.shape[1]):
            entering.append(state)
            state = _scan_into(y[:, span], x[:, span], delta[:, span], A, B[:, span], C[:, span], state)
        ctx.save_for_backward(x, delta, A, B, C, *entering)
        return y, state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_state: Tensor) -> tuple[Tensor, ...]:
        x, delta, A, B, C, *entering = ctx.saved_tensors
        grads = [torch.empty_like(tensor) for tensor in (x, delta, B, C)]
        grad_A = torch.zeros_like(A)
        adjoint = grad_state.transpose(1, 2)  # [batch, state, inner]
        for span, state in zip(reversed(_segments(x.shape[1])), reversed(entering), strict=True):
            parts = (x[:, span], delta[:, span], A, B[:, span], C[:, span], state)
            *local, local_A, adjoint = _segment_backward(*parts, grad_y[:, span], adjoint)
            grad_A += local_A
            for whole, part in zip(grads, local, strict=True):
                whole[:, span] = part
        grad_x, grad_delta, grad_B, grad_C = grads
        return grad_x, grad_delta, grad_A, grad_B, grad_C, adjoint.transpose(1, 2).contiguous()


def _segments(length: int) -> list[slice]:
    """About sqrt(length) spans of about sqrt(length) steps: the least memory for states kept plus states recomputed."""
    steps = math.isqrt(length - 1) + 1
    return [slice(start, min(start + steps, length)) for start in range(0, length, steps)]


def _segment_backward(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, grad_y: Tensor, adjoint: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, delta, B, C, A and of the state that entered (as [batch, state, inner]), for one segment.

    `adjoint` [batch, state, inner] is the gradient of the state that left. With g_t = dL/dh_t,
    g_t = C_t grad_y_t + decay_{t+1} g_{t+1}: the same recurrence, backwards.
    """
    dtype = state.dtype
    x, B, C, delta = x.to(dtype), B.to(dtype), C.to(dtype), delta.to(dtype)
    shape = (*x.shape[:2], A.shape[1], A.shape[0])  # [batch, steps, state, inner]
    decay = _decays(delta, _rates(A, dtype), out=x.new_empty(shape))
    first = state.transpose(1, 2)
    states = decay.clone()
    _steps(states, delta * x, B[..., None], first)

    grad_h = C[..., None] * grad_y[:, :, None]
    grad_h[:, -1] += adjoint
    for t in range(shape[1] - 2, -1, -1):
        grad_h[:, t].addcmul_(decay[:, t + 1], grad_h[:, t + 1])
    adjoint = decay[:, 0] * grad_h[:, 0]

    grad_C = torch.matmul(states, grad_y[..., None]).squeeze(-1)  # [batch, steps, state]
    grad_B = torch.matmul(grad_h, (delta * x)[..., None]).squeeze(-1)
    grad_drive = torch.matmul(B[:, :, None], grad_h).squeeze(2)  # [batch, steps, inner]
    # From here on `decay` holds the gradient of delta A: g_t h_{t-1} decay_t.
    decay.mul_(grad_h)
    decay[:, 1:].mul_(states[:, :-1])
    decay[:, 0].mul_(first)
    grad_delta = torch.einsum("bkni,in->bki", decay, A.to(dtype)) + grad_drive * x
    grad_A = torch.einsum("bkni,bki->in", decay, delta)
    return grad_drive * delta, grad_delta, grad_B, grad_C, grad_A, adjoint
