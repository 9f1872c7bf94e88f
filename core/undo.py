"""What one step of generation overwrites, kept so that the step can be taken back."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmx.core.kv_cache import WindowKVCache
from lmx.core.recurrent_state import RecurrentState
from lmx.core.state import LayerState


@dataclass(frozen=True)
class _Slot:
    """A ring's buffer, and room for the one slot of it that is written over: [batch, kv_heads, 1, head_dim]."""

    ring: Tensor
    kept: Tensor


class Undo:
    """Saves and puts back, on the device, what a token changes for good.

    That is all of a recurrence, and the slot that it takes in a ring. A full cache needs nothing: slots behind a
    state's length are never seen. Recurrences are copied in one call for all layers; of FalconMamba-7B they are 37 MB,
    to be read and written, beside 4 GB of weights to be read.
    """

    def __init__(self, layers: Sequence[LayerState], slots: int) -> None:
        """slots: the most tokens that a row may hold after a step."""
        recurrent = [layer for layer in layers if isinstance(layer, RecurrentState)]
        places = [layer.conv for layer in recurrent], [layer.hidden for layer in recurrent]
        self._recurrent = [(place, [torch.empty_like(tensor) for tensor in place]) for place in places if place]
        rings = [buffer for layer in layers if isinstance(layer, WindowKVCache) for buffer in layer.buffers]
        self._rings = [_Slot(ring, torch.zeros_like(ring[:, :, :1])) for ring in rings]
        # A ring that never went round has a slot of zeros to give back.
        self._windows = {slot.ring.shape[2] for slot in self._rings}
        self._wraps = any(slots > window for window in self._windows)

    def save(self, at: Tensor) -> None:
        """Before a step whose token has the number `at`, int64 [1]."""
        for places, kept in self._recurrent:
            torch._foreach_copy_(kept, places)
        if self._wraps:
            numbers = self._numbers(at)
            for slot in self._rings:
                torch.index_select(slot.ring, 2, numbers[slot.ring.shape[2]], out=slot.kept)

    def restore(self, at: Tensor) -> None:
        """After the step."""
        for places, kept in self._recurrent:
            torch._foreach_copy_(places, kept)
        numbers = self._numbers(at)
        for slot in self._rings:
            slot.ring.index_copy_(2, numbers[slot.ring.shape[2]], slot.kept)

    def _numbers(self, at: Tensor) -> dict[int, Tensor]:
        """The slot of a token in a ring of each size."""
        return {window: at % window for window in self._windows}
