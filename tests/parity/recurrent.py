"""What the tests of the two recurrent families share."""

import torch
from torch import Tensor


def _holes() -> Tensor:
    mask = torch.ones(4, 17, dtype=torch.int64)
    mask[0, :6], mask[1, 11:], mask[2, 3:8], mask[2, 12], mask[3, 1:16] = 0, 0, 0, 0, 0
    return mask


HOLES = _holes()
"""A mask [4, 17] with padding on the left, on the right and in between."""
