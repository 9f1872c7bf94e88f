"""Linear layers whose one-token step reads a 16-bit weight at the speed of memory."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmx.core.layers.projection import Projection
from lmx.core.native.mixer import Affine
from lmx.core.native.temporary import LEAST_BYTES, temporary
from lmx.core.native.vector import MatrixTable, StoredMatrix, are_few, can_multiply, multiply_kept


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`: x [..., columns] -> [..., rows], both of weight's dtype.

    One to four vectors and 16-bit weights go to the CPU's kernels, which read the weight faster than torch 2.13 does
    (`benchmarks/products.py` times both). A sum with a bias is then rounded twice.
    """
    if not _is_ours(x, weight):
        return _by_torch(x, weight) if bias is None else F.linear(x, weight, bias)
    out = multiply_kept(weight, x)
    return out if bias is None else out.add_(bias)


def _by_torch(x: Tensor, weight: Tensor) -> Tensor:
    """The same product; of a prompt into memory that is used again, where nobody else asks for anything."""
    watched = torch.is_grad_enabled() or torch.compiler.is_compiling()
    is_small = x.shape[:-1].numel() * len(weight) * x.element_size() < LEAST_BYTES
    if is_small or watched or not x.is_cpu or x.dtype != weight.dtype or x.dim() < 2:
        return F.linear(x, weight)
    out = temporary((*x.shape[:-1], len(weight)), x.dtype)
    torch.mm(x.flatten(0, -2), weight.t(), out=out.view(-1, len(weight)))
    return out


def _is_ours(x: Tensor, weight: Tensor) -> bool:
    return (
        weight.element_size() == 2
        and x.dtype == weight.dtype
        and are_few(x, weight.shape[1])
        and can_multiply(weight)
        and not (torch.is_grad_enabled() and weight.requires_grad)
        and not torch.compiler.is_compiling()
    )


class Linear(nn.Linear, Projection):
    """`torch.nn.Linear` with `linear` inside: the same parameters and the same answers to rounding."""

    _table: tuple[int, torch.dtype, MatrixTable] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """X [..., in_features] -> [..., out_features]."""
        return linear(x, self.weight, self.bias)

    def affine(self) -> Affine | None:
        """The weight as it lies, if the kernels read it; its table is made again where it has moved."""
        if not can_multiply(self.weight):
            return None
        place, dtype = self.weight.data_ptr(), self.weight.dtype
        if self._table is None or self._table[:2] != (place, dtype):
            self._table = place, dtype, MatrixTable([StoredMatrix.kept(self.weight.detach())])
        return Affine(self._table[2], self.bias)
