"""The recurrence of the RG-LRU, the recurrent layer of Griffin: h_t = a_t h_{t-1} + x_t, element by element.

(arXiv 2402.19427, equation 4, with x_t standing for sqrt(1 - a_t^2) (i_t * u_t).) The gates, the square root and the
reset at the first token of a document (a_t = 0) stay with the caller. Pure functions: state in, state out.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rg_lru(a: Tensor, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Run `length` steps from `state`; returns every h and the last one.

    a and x [batch, length, width], state [batch, width], all of one dtype, float32 or float64;
    h [batch, length, width].
    A step with a = 1 and x = 0 leaves the state as it is; a length of 0 is a no-op.
    Differentiable in all three; the backward pass keeps a and h and is the same recurrence reversed.
    """
    length = x.shape[1]
    if length == 0:
        return torch.empty_like(x), state
    if length == 1:
        return rg_lru_step(a, x, state)
    if torch.is_grad_enabled() and (a.requires_grad or x.requires_grad or state.requires_grad):
        h = cast(Tensor, _LinearRecurrence.apply(a, x, state))  # type: ignore[no-untyped-call]
    else:
        h = _recur(a, x, state)
    return h, h[:, -1].clone()  # a view would keep every h alive


def rg_lru_step(a: Tensor, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """`rg_lru` for a length of 1, with the same shapes: one torch call."""
    h = torch.addcmul(x, a, state[:, None])
    return h, h[:, 0]


def rg_lru_reference(a: Tensor, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The oracle: the definition, one step after another. Shapes as in `rg_lru`."""
    steps = []
    for t in range(x.shape[1]):
        state = a[:, t] * state + x[:, t]
        steps.append(state)
    return (torch.stack(steps, 1) if steps else torch.empty_like(x)), state


def _recur(a: Tensor, x: Tensor, state: Tensor) -> Tensor:
    """One fused call a step, straight into the result, so that no memory is needed beside it.

    Scanning sqrt(length) chunks side by side with products of a was tried: it saves about a millisecond of the hundred
    that a 2B-wide layer takes for 512 tokens, and costs a second buffer and equal bits for every split.
    """
    h = torch.empty_like(x, memory_format=torch.contiguous_format)
    for decay, drive, out in zip(a.unbind(1), x.unbind(1), h.unbind(1), strict=True):
        state = torch.addcmul(drive, decay, state, out=out)
    return h


class _LinearRecurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, x: Tensor, state: Tensor) -> Tensor:
        h = _recur(a, x, state)
        ctx.save_for_backward(a, h, state)
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """With g_t = dL/dh_t in all: g_t = grad_h_t + a_{t+1} g_{t+1}."""
        a, h, state = ctx.saved_tensors
        g = torch.empty_like(grad_h, memory_format=torch.contiguous_format)
        g[:, -1] = grad_h[:, -1]
        for t in range(h.shape[1] - 2, -1, -1):
            torch.addcmul(grad_h[:, t], a[:, t + 1], g[:, t + 1], out=g[:, t])
        grad_a = torch.empty_like(a)
        torch.mul(g[:, 1:], h[:, :-1], out=grad_a[:, 1:])
        torch.mul(g[:, 0], state, out=grad_a[:, 0])
        return grad_a, g, a[:, 0] * g[:, 0]
