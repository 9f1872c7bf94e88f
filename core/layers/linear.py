"""Linear layers whose one-token step reads a 16-bit weight at the speed of memory."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmx.core.native.vector import MatrixTable, StoredMatrix, are_few, can_multiply


class FewVectors:
    """A matrix [rows, columns] times vectors: by the CPU's kernels where they are quicker than torch, else by torch.

    They are for one to four vectors and 16-bit weights, where torch 2.13 takes twice as long as reading the weight
    does. Remembers what it found out about the weight until another one comes.
    """

    def __init__(self) -> None:
        self._weight: Tensor | None = None
        self._address = 0
        self._table: MatrixTable | None = None

    def multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        """X [..., columns] of weight's dtype -> [..., rows]."""
        vectors = x.numel() // x.shape[-1] if x.shape[-1] else 0
        grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        if grad or not vectors > 0 or not are_few(x, vectors) or torch.compiler.is_compiling():
            return F.linear(x, weight)
        if self._weight is not weight or self._address != weight.data_ptr():
            self._remember(weight)
        if self._table is None or x.device != weight.device:
            return F.linear(x, weight)
        return self._table.multiply(x.reshape(vectors, -1)).view(*x.shape[:-1], -1)

    def _remember(self, weight: Tensor) -> None:
        self._weight, self._address = weight, weight.data_ptr()
        narrow = weight.element_size() == 2 and can_multiply(weight)
        self._table = MatrixTable([StoredMatrix.kept(weight.detach())]) if narrow else None


class Linear(nn.Linear):
    """`torch.nn.Linear` with `FewVectors` inside: the same parameters and the same answer to rounding."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self._few = FewVectors()

    def forward(self, x: Tensor) -> Tensor:
        """X [..., in_features] -> [..., out_features]."""
        out = self._few.multiply(x, self.weight)
        return out if self.bias is None else out + self.bias
