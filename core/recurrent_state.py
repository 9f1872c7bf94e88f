"""The memory of recurrent layers: the last inputs of a short convolution and the hidden state; it never grows."""

from collections.abc import Mapping
from typing import ClassVar, Self

import torch
from torch import Tensor

from lmx.core.state import LayerState, StateError, take


class RecurrentState(LayerState):
    """conv: [batch, width, kernel - 1], oldest first; hidden: what the recurrence carries, in float32 at least."""

    HIDDEN: ClassVar[str]
    HIDDEN_DIMENSIONS: ClassVar[int]

    def __init__(self, conv: Tensor, hidden: Tensor) -> None:
        self.conv = conv
        self.hidden = hidden

    def keep(self, conv: Tensor, hidden: Tensor) -> None:
        """Take in the state after a call; it carries no gradient."""
        self.conv = conv.detach()
        self.hidden = hidden.detach()

    def tensors(self, length: int) -> dict[str, Tensor]:
        """Both tensors, whatever the length."""
        return {"conv": self.conv, self.HIDDEN: self.hidden}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Take over the tensors of `tensors()`."""
        return cls(*take(tensors, cls.KIND, **{"conv": 3, cls.HIDDEN: cls.HIDDEN_DIMENSIONS}))

    def truncate(self, length: int, held: int) -> None:
        """Only the empty state can be had back. Raises StateError for any other."""
        if length:
            raise StateError(
                f"a recurrent layer cannot go back from {held} tokens to {length}: they are folded into one state",
                "Continue from a clone() taken at that point.",
            )
        self.conv = torch.zeros_like(self.conv)
        self.hidden = torch.zeros_like(self.hidden)

    @property
    def signature(self) -> tuple[object, ...]:
        """Kind, shapes of a row and dtypes."""
        return self.KIND, self.conv.shape[1:], self.conv.dtype, self.hidden.shape[1:], self.hidden.dtype

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        """Both tensors."""
        return self.conv, self.hidden


class MambaState(RecurrentState):
    """A selective scan's state, [batch, inner, state]."""

    KIND = "mamba"
    HIDDEN = "ssm"
    HIDDEN_DIMENSIONS = 3


class GriffinState(RecurrentState):
    """An RG-LRU's state, [batch, width]."""

    KIND = "griffin"
    HIDDEN = "lru"
    HIDDEN_DIMENSIONS = 2
