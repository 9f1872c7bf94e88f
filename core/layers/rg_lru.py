"""The real-gated linear recurrent unit of Griffin: gates, decay and reset around the recurrence itself."""

import math
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmx.core.gpu import recurrent as gpu
from lmx.core.layers.derived import Derived
from lmx.core.layers.linear_recurrence import rg_lru
from lmx.core.layers.padding import Compaction
from lmx.core.native.recurrence import MAX_ROWS, can_recur, recur, recur_step

_SCALE = -8.0  # of log(a), which is written as -8 times gate and softplus of the parameter
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
    return F.softplus(recurrent_param.float()) * (_SCALE / math.log(2))


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
        self,
        x: Tensor,
        gate: Tensor | None,
        reset: Tensor,
        compaction: Compaction | None,
        state: Tensor,
        *,
        overwrite: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Run the recurrence in float32.

        x: [batch, length, width]; gate: what to multiply the outputs with, of the same shape, or None;
        reset: [batch or 1, length] bool, True where a text begins; state: [batch, width].
        Returns the outputs in x's dtype and the state after the last token, which may lie where the old one lay if
        `overwrite` says that nobody needs that.
        """
        input_gate, recurrent_gate = self.gates
        if can_recur(x, state, *input_gate, *recurrent_gate):
            return self._natively(x, gate, reset, compaction, state)
        if gpu.can_recur(x, state, *input_gate, *recurrent_gate):
            return self._on_gpu(x, gate, reset, compaction, state, overwrite)
        softplus = F.softplus(self.recurrent_param.float())
        return _in_torch(reset, compaction, x, *self._products(x), softplus, state, gate)

    def _natively(
        self, x: Tensor, gate: Tensor | None, reset: Tensor, compaction: Compaction | None, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        input_gate, recurrent_gate = self.gates
        if x.shape[1] == 1 and len(x) <= MAX_ROWS and compaction is None:
            return recur_step(x, input_gate, recurrent_gate, self.rate, reset, state, gate)
        lengths = None if compaction is None else compaction.lengths
        return recur(x, self._products(x), self.rate, reset, state, gate, lengths)

    def _on_gpu(
        self,
        x: Tensor,
        gate: Tensor | None,
        reset: Tensor,
        compaction: Compaction | None,
        state: Tensor,
        overwrite: bool,
    ) -> tuple[Tensor, Tensor]:
        input_gate, recurrent_gate = self.gates
        if compaction is None and gpu.can_step(x, *input_gate, *recurrent_gate, self.rate, state):
            return gpu.recur_step(x, input_gate, recurrent_gate, self.rate, reset, state, gate, overwrite)
        lengths, oracle = None if compaction is None else compaction.lengths, partial(_of_rate, reset, compaction)
        return gpu.recur(x, self._products(x), self.rate, reset, state, gate, lengths, overwrite, oracle)

    def _products(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """X [batch, length, width] through both gates' matrices: [heads, batch * length, width of one] each."""
        heads = x.unflatten(-1, self.input_gate_weight.shape[:2]).flatten(0, 1).transpose(0, 1)
        input_gate, recurrent_gate = self.gates
        return _product(heads, *input_gate), _product(heads, *recurrent_gate)

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


def _in_torch(
    reset: Tensor,
    compaction: Compaction | None,
    x: Tensor,
    input_product: Tensor,
    recurrent_product: Tensor,
    softplus: Tensor,
    state: Tensor,
    gate: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The recurrence from the products of its gates on; softplus [width] is that of the parameter."""
    log_a = _SCALE * _gate(recurrent_product, x.shape) * softplus
    kept = 1.0 - torch.exp(2.0 * log_a)
    # With gradients off the plain root is the same, and opens the way to a compiled graph.
    root = bounded_sqrt(kept) if torch.is_grad_enabled() else kept.sqrt()
    start = reset[..., None]
    drive = x.float() * _gate(input_product, x.shape) * torch.where(start, 1.0, root)
    a = log_a.exp().masked_fill(start, 0.0)
    if compaction is not None:
        a, drive = compaction.fill_tail(a, 1.0), compaction.fill_tail(drive, 0.0)
    h, last = rg_lru(a, drive, state)
    h = h.to(x.dtype)
    return h if gate is None else gate * h, last


def _of_rate(
    reset: Tensor,
    compaction: Compaction | None,
    x: Tensor,
    input_product: Tensor,
    recurrent_product: Tensor,
    rate: Tensor,
    state: Tensor,
    gate: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`_in_torch` with the exponents of 2 that kernels take."""
    softplus = rate * (math.log(2) / _SCALE)
    return _in_torch(reset, compaction, x, input_product, recurrent_product, softplus, state, gate)
