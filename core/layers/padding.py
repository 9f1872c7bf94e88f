"""Padded rows for recurrent layers: a recurrence must step over pads as if they were not there."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Compaction:
    """Moves each row's real tokens to the front, so that pads, wherever they are, all come last.

    A model packs its inputs once, runs every layer on them and unpacks its outputs once. With `_` for a pad:

        mask       0 1 1 0 1        x      _ a b _ c       pack(x)      a b c 0 0
                   1 1 1 1 1               d e f g h                    d e f g h
                   1 1 0 0 0               i j _ _ _                    i j 0 0 0

        lengths    3 5 2            real   1 1 1 0 0       unpack(pack(x))   0 a b 0 c
                                           1 1 1 1 1                         d e f g h
                                           1 1 0 0 0                         i j 0 0 0

    Behind its real tokens a row must not move its state: `fill_tail(delta, 0)` before a selective scan,
    `fill_tail(a, 1)` and `fill_tail(x, 0)` before an RG-LRU, and `lengths` for `causal_conv`. A causal layer's outputs
    at real tokens never depend on the tail, so nothing else is needed; the state is exactly that of the row without
    pads, also when the rows are a later part of a text. Rows without real tokens keep their state.

    Everything but `of` runs without waiting for the device.
    """

    mask: Tensor
    """[batch, length] bool, as given: which tokens are real."""
    real: Tensor
    """[batch, length] bool, after packing: position < lengths."""
    lengths: Tensor
    """[batch] int64: real tokens of each row."""
    sources: Tensor
    """[batch, length] int64: where each packed token comes from."""
    targets: Tensor
    """[batch, length] int64: where each token goes, the inverse permutation of `sources`."""

    @classmethod
    def of(cls, mask: Tensor) -> "Compaction | None":
        """From mask [batch, length] bool, True at real tokens; None if all are. Reads one bool back from the device."""
        if bool(mask.all()):
            return None
        lengths = mask.sum(1)
        sources = torch.argsort(mask.logical_not(), dim=1, stable=True)
        real = torch.arange(mask.shape[1], device=mask.device) < lengths[:, None]
        return cls(mask, real, lengths, sources, torch.argsort(sources, dim=1))

    def to(self, device: torch.device) -> "Compaction":
        """The same for a layer on another device."""
        parts = (self.mask, self.real, self.lengths, self.sources, self.targets)
        return Compaction(*(part.to(device) for part in parts))

    def pack(self, x: Tensor) -> Tensor:
        """Real tokens first, in their order, then zeros: [batch, length, ...] -> [batch, length, ...]."""
        return self.fill_tail(_permute(x, self.sources), 0)

    def unpack(self, y: Tensor) -> Tensor:
        """Undo `pack`: every real token back in its place, zeros at pads."""
        return _permute(y, self.targets).masked_fill(_like(~self.mask, y), 0)

    def fill_tail(self, x: Tensor, value: float) -> Tensor:
        """Packed x [batch, length, ...] with `value` behind each row's real tokens."""
        return x.masked_fill(_like(~self.real, x), value)


def _permute(x: Tensor, order: Tensor) -> Tensor:
    """Put the tokens of x [batch, length, ...] in `order` [batch, length]."""
    rows = torch.arange(x.shape[0], device=x.device)[:, None]
    return x[rows, order]


def _like(mask: Tensor, x: Tensor) -> Tensor:
    """Give mask [batch, length] as many axes as x."""
    return mask.reshape(*mask.shape, *[1] * (x.ndim - 2))
