"""Root-mean-square normalisation (arXiv 1910.07467): `x / sqrt(mean(x^2) + eps)` over the last dimension."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmx.core.gpu import recurrent as gpu
from lmx.core.gpu import stream
from lmx.core.layers.projection import is_watched
from lmx.core.native.attention import Scale
from lmx.core.native.norm import can_normalise, rms_norm, rms_norm_parts, serves


def rms_normalise(x: Tensor, eps: float) -> Tensor:
    """Normalise [..., width]; computed in float32 at least, returned in x's dtype."""
    return F.rms_norm(x, x.shape[-1:], None, eps)


def rms_normalise_parts(x: Tensor, sizes: Sequence[int], eps: float) -> tuple[Tensor, ...]:
    """Cut [..., sum of sizes] into parts and normalise each by itself."""
    if serves(x) and x.is_contiguous():
        return rms_norm_parts(x, sizes, eps).split(sizes, -1)
    if gpu.can_normalise_parts(x, sizes):
        return gpu.normalise_parts(x, sizes, eps).split(sizes, -1)
    return tuple(rms_normalise(part, eps) for part in x.split(sizes, -1))


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
        if stream.can_normalise(x, self.weight) and x.dtype == self.weight.dtype:
            return stream.rms_norm(x, self.weight, self.eps)
        return self.weight * rms_normalise(x, self.eps)

    def of_rounded(self, x: Tensor) -> Tensor:
        """The same of x rounded to the weight's dtype: of a stream that is kept in float32."""
        if not is_watched(self):
            if can_normalise(x, self.weight):
                return rms_norm(x, self.weight, self.eps)
            if stream.can_normalise(x, self.weight):
                return stream.rms_norm(x, self.weight, self.eps)
        return self(x.to(self.weight.dtype))


class OffsetRMSNorm(nn.Module):
    """Gemma's variant: the learned scale is stored minus one, and the product is taken in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(width))

    @property
    def scale(self) -> Scale:
        """What a kernel must know to do the same."""
        return Scale(self.weight, self.eps)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise over the last dimension."""
        if can_normalise(x, self.weight) and x.dtype == self.weight.dtype:
            return rms_norm(x, self.weight, self.eps, offset=True)
        if stream.can_normalise(x, self.weight) and x.dtype == self.weight.dtype:
            return stream.rms_norm(x, self.weight, self.eps, offset=True)
        return (rms_normalise(x.float(), self.eps) * (1.0 + self.weight.float())).to(x.dtype)
