"""Which keys a query sees: those before it, of its own text, no further back than a window."""

import torch
from torch import Tensor

from lmx.core.layers.attention import Visibility
from lmx.core.state import Span


def causal_visibility(
    span: Span, window: int | None, device: torch.device, positions: Tensor | None = None
) -> Visibility:
    """Queries see the earlier keys of the same call, and no cache: the stateless pass of training and scoring.

    window: how many keys back a query sees, itself included; None for all. positions: [batch or 1, length] as a caller
    gave them without a mask: where they fall back, another text begins, and texts packed in a row are blind to each
    other, as transformers has it in training.
    """
    texts = None if positions is None else _packed_texts(positions)
    if span.ordinals is None and texts is None and (window is None or span.length <= window):
        return Visibility(None, causal=span.length > 1)
    if span.ordinals is None:
        row = torch.arange(span.length, device=device)[None]
        seen = visible_keys(row, row, window)
        return Visibility(seen if texts is None else seen & (texts[:, None, :, None] == texts[:, None, None, :]))
    seen = visible_keys(span.ordinals, span.ordinals, window)
    # A padding query sees itself, so that its softmax has something to share; nobody sees its answer.
    return Visibility(seen | torch.eye(span.length, dtype=torch.bool, device=device))


def _packed_texts(positions: Tensor) -> Tensor | None:
    """The number of the text that each token belongs to [batch or 1, length], or None where a row is one text."""
    texts = (positions.diff(dim=1, prepend=positions[:, :1] - 1) < 1).cumsum(1)
    return texts if bool(texts.any()) else None


def visible_keys(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Which keys come no later than each query, and no more than the window before it: [batch, 1, queries, keys]."""
    query, key = queries[:, None, :, None], keys[:, None, None, :]
    seen = (key <= query) & (key >= 0)
    return seen if window is None else seen & (key > query - window)


def filled_slots(at: Tensor, slots: int) -> Visibility:
    """A token of number `at` [1] sees the first of `slots` slots, itself last, or all once a ring is full."""
    return Visibility((torch.arange(slots, device=at.device) <= at)[None, None, None])
