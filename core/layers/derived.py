"""What a layer computes from a weight alone, kept until the weight changes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lmx.core.large_pages import lasting


@dataclass(frozen=True)
class _Kept:
    """A result, and which weight it was made of: `source` shares its memory, which nothing else can then take."""

    source: Tensor
    version: int
    result: Tensor

    def is_of(self, weight: Tensor) -> bool:
        """Whether the weight is still where it was, and has not been written to."""
        place = (self.source.data_ptr(), self.source.dtype, self.version)
        return place == (weight.data_ptr(), weight.dtype, weight._version)


class Derived:
    """`compute(weight)`, computed again only for another weight, or where autograd or a compiled graph must see it."""

    def __init__(self, compute: Callable[[Tensor], Tensor]) -> None:
        self._compute = compute
        self._kept: _Kept | None = None

    def of(self, weight: Tensor) -> Tensor:
        """The result for this weight."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or weight.is_inference():
            return self._compute(weight)
        if self._kept is None or not self._kept.is_of(weight):
            # Not among the temporaries of a prompt, which would then leave holes behind.
            self._kept = _Kept(weight.detach(), weight._version, lasting(self._compute(weight)))
        return self._kept.result
