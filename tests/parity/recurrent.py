"""What the tests of the two recurrent families share."""

import torch
from torch import Tensor

from lmx.core.loader import HEAD_NAMES
from lmx.core.registry import family_of
from parity.families import Pair, close


def _holes() -> Tensor:
    mask = torch.ones(4, 17, dtype=torch.int64)
    mask[0, :6], mask[1, 11:], mask[2, 3:8], mask[2, 12], mask[3, 1:16] = 0, 0, 0, 0, 0
    return mask


HOLES = _holes()
"""A mask [4, 17] with padding on the left, on the right and in between."""


def gradients_agree(both: Pair, ids: Tensor) -> None:
    """Fail unless every weight has the gradient of its namesake, to 1e-4 of its own scale and 1e-5 of the largest."""
    table = family_of({"model_type": both.row.model_type}).names(both.ours.config)
    both.reference.zero_grad()
    both.ours.zero_grad()
    both.reference(ids, labels=ids, use_cache=False).loss.backward()
    both.ours(ids, labels=ids).loss.backward()
    theirs = {name: weight.grad for name, weight in both.reference.named_parameters() if weight.grad is not None}
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    for name, weight in both.ours.named_parameters():
        expected = theirs.pop(HEAD_NAMES.get(name) or table.hub_name(name.removeprefix("decoder.")))
        assert weight.grad is not None, f"{name} has no gradient"
        close(weight.grad, expected, 1e-4 * float(expected.abs().max()) + 1e-5 * largest)
    assert not theirs
