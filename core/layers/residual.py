"""Adding to the stream that runs through all layers, and biases to products."""

import torch
from torch import Tensor

from lmx.core.native.add import add, can_add


def added(x: Tensor, y: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`x.to(dtype) + y`: y of x's shape [..., width], or [width] for all rows."""
    dtype = x.dtype if dtype is None else dtype
    if can_add(x, y) and dtype in (x.dtype, torch.float32):
        return add(x, y, dtype)
    return x.to(dtype) + y
