"""Root-mean-square normalisation (arXiv 1910.07467): `x / sqrt(mean(x^2) + eps)` over the last dimension."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmx.core.native.attention import Scale
from lmx.core.native.norm import can_normalise, rms_norm


def rms_normalise(x: Tensor, eps: float) -> Tensor:
    """Normalise [..., width]; computed in float32 at least, returned in x's dtype."""
    return F.rms_norm(x, x.shape[-1:], None, eps)


class RMSNorm(nn.Module):
    """The normalised input times a learned scale; the product is taken in the model's dtype, as Llama does.

    forward: [..., width] -> [..., width].
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    @property
    def scale(self) -> Scale:
        """What a kernel must know to do the same."""
        return Scale(self.weight, self.eps)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise over the last dimension."""
        if can_normalise(x, self.weight) and x.dtype == self.weight.dtype:
            return rms_norm(x, self.weight, self.eps)
        return self.weight * rms_normalise(x, self.eps)


class OffsetRMSNorm(nn.Module):
    """Gemma's variant: the learned scale is stored minus one, and the product is taken in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise over the last dimension."""
        if can_normalise(x, self.weight) and x.dtype == self.weight.dtype:
            return rms_norm(x, self.weight, self.eps, offset=True)
        return (rms_normalise(x.float(), self.eps) * (1.0 + self.weight.float())).to(x.dtype)
