"""The real-gated linear recurrent unit of Griffin: gates, decay and reset around the recurrence itself."""

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmx.core.layers.derived import Derived
from lmx.core.layers.linear_recurrence import rg_lru
from lmx.core.layers.padding import Compaction
from lmx.core.native.recurrence import MAX_ROWS, can_recur, recur, recur_step

_LARGEST_SQRT_GRADIENT = 1000.0


class _BoundedSqrt(torch.autograd.Function):
    """A square root whose gradient stays finite at zero, so that training in 16 bits meets no NaN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sqrt()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad / torch.sqrt(torch.clip(4.0 * x, min=1.0 / _LARGEST_SQRT_GRADIENT**2))


def bounded_sqrt(x: Tensor) -> Tensor:
    """The square root of x >= 0, its gradient at most 1000 (arXiv 2402.19427, appendix A)."""
    return cast(Tensor, _BoundedSqrt.apply(x))  # type: ignore[no-untyped-call]


def _exponents(recurrent_param: Tensor) -> Tensor:
    """log2(a) where the recurrent gate is open, in float32."""
    return F.softplus(recurrent_param.float()) * (-8.0 / math.log(2))


class RGLRU(nn.Module):
    """The real-gated linear recurrent unit (arXiv 2402.19427, section 2.4); gates are block-diagonal by heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        part = width // heads
        self.recurrent_param = nn.Parameter(torch.empty(width))
        self.input_gate_weight = nn.Parameter(torch.empty(heads, part, part))
        self.input_gate_bias = nn.Parameter(torch.empty(heads, part))
        self.recurrent_gate_weight = nn.Parameter(torch.empty(heads, part, part))
        self.recurrent_gate_bias = nn.Parameter(torch.empty(heads, part))
        self._rate = Derived(_exponents)

    @property
    def gates(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Weight [heads, part, part] and bias [heads, part] of the input gate and of the recurrent one."""
        input_gate = self.input_gate_weight, self.input_gate_bias
        return input_gate, (self.recurrent_gate_weight, self.recurrent_gate_bias)

    @property
    def rate(self) -> Tensor:
        """The exponents of 2 that the recurrent gate scales, float32 [width]."""
        return self._rate.of(self.recurrent_param)

    def forward(
        self, x: Tensor, gate: Tensor | None, reset: Tensor, compaction: Compaction | None, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Run the recurrence in float32.

        x: [batch, length, width]; gate: what to multiply the outputs with, of the same shape, or None;
        reset: [batch or 1, length] bool, True where a text begins; state: [batch, width].
        Returns the outputs in x's dtype and the state after the last token.
        """
        input_gate, recurrent_gate = self.gates
        if can_recur(x, state, *input_gate, *recurrent_gate):
            return self._natively(x, gate, reset, compaction, state)
        h, last = self._in_torch(x, reset, compaction, state)
        return h if gate is None else gate * h, last

    def _natively(
        self, x: Tensor, gate: Tensor | None, reset: Tensor, compaction: Compaction | None, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        input_gate, recurrent_gate = self.gates
        if x.shape[1] == 1 and len(x) <= MAX_ROWS and compaction is None:
            return recur_step(x, input_gate, recurrent_gate, self.rate, reset, state, gate)
        heads = self._heads(x)
        products = _product(heads, *input_gate), _product(heads, *recurrent_gate)
        return recur(x, products, self.rate, reset, state, gate, None if compaction is None else compaction.lengths)

    def _heads(self, x: Tensor) -> Tensor:
        """[batch, length, width] -> [heads, batch * length, width of one]."""
        return x.unflatten(-1, self.input_gate_weight.shape[:2]).flatten(0, 1).transpose(0, 1)

    def _in_torch(
        self, x: Tensor, reset: Tensor, compaction: Compaction | None, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        heads = self._heads(x)
        input_gate = _gate(_product(heads, self.input_gate_weight, self.input_gate_bias), x.shape)
        recurrent_gate = _gate(_product(heads, self.recurrent_gate_weight, self.recurrent_gate_bias), x.shape)
        log_a = -8.0 * recurrent_gate * F.softplus(self.recurrent_param.float())
        kept = 1.0 - torch.exp(2.0 * log_a)
        # With gradients off the plain root is the same, and opens the way to a compiled graph.
        root = bounded_sqrt(kept) if torch.is_grad_enabled() else kept.sqrt()
        start = reset[..., None]
        drive = x.float() * input_gate * torch.where(start, 1.0, root)
        a = log_a.exp().masked_fill(start, 0.0)
        if compaction is not None:
            a, drive = compaction.fill_tail(a, 1.0), compaction.fill_tail(drive, 0.0)
        h, last = rg_lru(a, drive, state)
        return h.to(x.dtype), last

    @torch.no_grad()
    def reset_parameters(self, variance_scale: float) -> None:
        """Small gates without bias, and decays drawn from 0.9 to 0.999 (arXiv 2402.19427, section 2.4)."""
        std = math.sqrt(variance_scale / self.input_gate_weight.shape[1])
        for weight in (self.input_gate_weight, self.recurrent_gate_weight):
            weight.normal_(0.0, std)
        for bias in (self.input_gate_bias, self.recurrent_gate_bias):
            bias.zero_()
        square = torch.empty_like(self.recurrent_param).uniform_(0.9**2 + 1e-8, 0.999**2 + 1e-8)
        # the inverse of a = exp(-softplus(param))
        self.recurrent_param.copy_(square.log().mul(0.5).neg().expm1().log())


def _product(heads: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """heads: [heads, batch * length, width of one] -> the same, through each head's own matrix."""
    return torch.baddbmm(bias[:, None], heads, weight)


def _gate(product: Tensor, shape: torch.Size) -> Tensor:
    """product: [heads, batch * length, width of one] -> a gate in float32 of the shape [batch, length, width]."""
    return product.transpose(0, 1).reshape(shape).float().sigmoid()
