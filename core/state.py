"""What a model remembers between calls: typed, owned by the caller, exact.

A state belongs to one model family and holds one entry a layer. The model's own modules hold none: two conversations
are two states over the same weights. Rows of a batch are kept compact: a row's slot number counts its real tokens, so
padding never enters a state and rows of different lengths continue exactly.

Worked example, a full cache and a ring of window 4, after the tokens a b c d e f:

    KVCache        slots  a b c d e f . .     slot = ordinal, grown when full
    WindowKVCache  slots  e f c d             slot = ordinal mod 4: e and f replaced a and b
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Generic, Self, TypeVar, cast

import torch
from torch import Tensor

from lmx.core.errors import InputError, UsageError


class StateError(UsageError):
    """A state that cannot do what was asked of it, such as forgetting what it has already folded in."""


@dataclass(frozen=True)
class Span:
    """Where the tokens of one call go.

    start: real tokens that every row already holds (the most, if they differ); length: columns of this call;
    ordinals: [batch, length], each real token's number in its row, -1 for padding; None while no row was ever padded;
    held: [batch], real tokens that each row already holds; None likewise. whole: whether no column is padding.
    at: int64 [1], the number in every row of a call's one token, where only the device knows it; start is then the
    largest number that it may have. For calls that are captured once and replayed for many tokens.
    """

    start: int
    length: int
    ordinals: Tensor | None = None
    held: Tensor | None = None
    whole: bool = True
    at: Tensor | None = None

    @classmethod
    def stateless(cls, columns: int, mask: Tensor | None) -> "Span":
        """The span of a call without a state. mask: [batch, columns] bool, False for padding, or None."""
        if mask is None:
            return cls(0, columns)
        ordinals = (mask.cumsum(1) - 1).masked_fill(~mask, -1)
        return cls(0, columns, ordinals, torch.zeros_like(ordinals[:, 0]), whole=False)

    def to(self, device: torch.device) -> "Span":
        """The same for a layer on another device."""
        if self.ordinals is None or self.ordinals.device == device:
            return self
        held = None if self.held is None else self.held.to(device)
        return replace(self, ordinals=self.ordinals.to(device), held=held)

    def positions(self, device: torch.device) -> Tensor:
        """Rotary positions: real tokens count from 0 in each row; padding gets 0. [batch or 1, length]."""
        if self.ordinals is not None:
            return self.ordinals.clamp(min=0)
        if self.at is not None:
            return self.at[None]
        return torch.arange(self.start, self.start + self.length, device=device)[None]


class LayerState(ABC):
    """One layer's memory."""

    KIND: str
    REWINDS: ClassVar[bool] = False
    """Whether it can be truncated to any length at any time."""

    @abstractmethod
    def tensors(self, length: int) -> dict[str, Tensor]:
        """What must be kept of it after `length` tokens: to copy, to save, to count."""

    @classmethod
    @abstractmethod
    def restore(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Rebuild from `tensors()`; it takes them over without a copy. Raises InputError if they do not fit."""

    @abstractmethod
    def truncate(self, length: int, held: int) -> None:
        """Forget all but the first `length` of `held` tokens. Raises StateError where they are no longer apart."""

    def part(self, start: int, end: int) -> Self:
        """A copy of what the tokens `start` to `end` have put in. Raises StateError where they are not kept apart."""
        raise StateError(f"a {self.KIND} layer does not keep tokens apart", "Take a clone() of the whole state.")

    def extend(self, part: Self, held: int) -> None:
        """Put a `part` behind the `held` tokens. Raises StateError as `part` does."""
        raise StateError(f"a {self.KIND} layer does not keep tokens apart", "Take a clone() of the whole state.")

    def to(self, device: torch.device, length: int) -> Self:
        """The same on another device, of what it holds after `length` tokens; itself where it is there already."""
        if all(buffer.device == device for buffer in self.buffers):
            return self
        return self.restore({name: tensor.to(device) for name, tensor in self.tensors(length).items()})

    def make_room(self, span: Span) -> None:
        """See that there is room for every token of the span."""
        return None  # most kinds never grow

    @property
    @abstractmethod
    def buffers(self) -> tuple[Tensor, ...]:
        """The tensors that it lies in, spare room included."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it occupies."""
        return sum(buffer.nbytes for buffer in self.buffers)

    def nbytes_at(self, length: int) -> int:
        """Bytes that it would occupy after `length` tokens. As now, unless a kind of layer grows."""
        return self.nbytes

    @property
    @abstractmethod
    def signature(self) -> tuple[object, ...]:
        """What two states must share for one model to continue both: kind, widths and dtype."""


L = TypeVar("L", bound=LayerState)


def take(tensors: Mapping[str, Tensor], kind: str, **dimensions: int) -> list[Tensor]:
    """The named tensors of a saved layer, each of the given number of dimensions; anything else is an InputError."""
    if set(tensors) != set(dimensions) or any(tensors[name].dim() != n for name, n in dimensions.items()):
        raise InputError(
            f"saved state: a {kind} layer holds {sorted(tensors)!r:.80}", "The file is not a state of this model."
        )
    return [tensors[name] for name in dimensions]


_PART_HINT = "Use parts of an unpadded state of the same model, within its length."


@dataclass
class State(Generic[L]):
    """The memory of one batch of conversations.

    length: real tokens that each row has consumed (the most, if rows were padded differently);
    lengths: [batch], each row's own count, or None while all rows are alike.
    """

    family: str
    layers: list[L]
    batch_size: int
    length: int = 0
    lengths: Tensor | None = None

    def span(self, columns: int, mask: Tensor | None) -> Span:
        """Place the next `columns` tokens of every row. mask: [batch, columns] bool, False for padding."""
        if mask is None and self.lengths is None:
            return Span(self.length, columns)
        device = self.lengths.device if self.lengths is not None else mask.device if mask is not None else None
        held = self.lengths if self.lengths is not None else torch.full((self.batch_size,), self.length, device=device)
        whole = mask is None
        if mask is None:
            mask = torch.ones(self.batch_size, columns, dtype=torch.bool, device=device)
        ordinals = (held[:, None] + mask.cumsum(1) - 1).masked_fill(~mask, -1)  # [batch, columns]
        return Span(self.length, columns, ordinals, held, whole)

    def advance(self, span: Span) -> None:
        """Count the tokens of a call whose layers have all been written."""
        if span.ordinals is not None and span.held is not None:
            self.lengths = span.held + (span.ordinals >= 0).sum(1)
        # Without padding the host knows the longest row; else it must wait for the device to tell.
        self.length = self.length + span.length if span.whole or self.lengths is None else int(self.lengths.max())

    def truncate(self, length: int) -> None:
        """Keep the first `length` real tokens of every row.

        Raises StateError if a layer has folded later tokens in (a ring that went round, a recurrence), and leaves the
        state as it was: continue from a `clone()` taken at that point instead.
        """
        if not 0 <= length <= self.length:
            raise StateError(
                f"cannot cut a state of {self.length} tokens to {length}", "Cut to a length that it holds."
            )
        if length == self.length:
            return
        for layer in self.layers:
            layer.truncate(length, self.length)
        self.length = length
        if self.lengths is not None:
            self.lengths = self.lengths.clamp(max=length)

    def clone(self) -> Self:
        """An independent copy; the two continue separately."""
        layers = [
            type(layer).restore({name: tensor.clone() for name, tensor in layer.tensors(self.length).items()})
            for layer in self.layers
        ]
        lengths = None if self.lengths is None else self.lengths.clone()
        return type(self)(self.family, layers, self.batch_size, self.length, lengths)

    def settle(self, devices: Sequence[torch.device]) -> None:
        """Move each layer to the device of the same number, and the rows' lengths to the first."""
        self.layers = [layer.to(device, self.length) for layer, device in zip(self.layers, devices, strict=True)]
        if self.lengths is not None:
            self.lengths = self.lengths.to(devices[0])

    def part(self, start: int, end: int) -> Self:
        """A copy of what the tokens `start` to `end` have put in, as a state of its own, to `extend` another with.

        For states that rewind, of rows without padding; raises StateError for any other.
        """
        if self.lengths is not None or not 0 <= start <= end <= self.length:
            raise StateError(f"no part {start} to {end} can be had of a state of {self.length} tokens", _PART_HINT)
        layers = [layer.part(start, end) for layer in self.layers]
        return type(self)(self.family, layers, self.batch_size, end - start)

    def extend(self, part: Self) -> None:
        """Append a `part` that was cut where this state ends. Raises StateError where the two do not fit."""
        part.check_fits(self.family, self.layers)
        if self.lengths is not None or part.lengths is not None or part.batch_size != self.batch_size:
            raise StateError("a part of other rows cannot be appended", _PART_HINT)
        for layer, piece in zip(self.layers, part.layers, strict=True):
            layer.extend(piece, self.length)
        self.length += part.length

    @property
    def rewinds(self) -> bool:
        """Whether `truncate` works to any length at any time; if not, going back takes a `clone` from before."""
        return all(layer.REWINDS for layer in self.layers)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the state occupies."""
        return sum(layer.nbytes for layer in self.layers)

    def nbytes_at(self, length: int) -> int:
        """Bytes that the state would occupy after `length` tokens, spare room not counted."""
        return sum(layer.nbytes_at(length) for layer in self.layers)

    def save(self, path: Path) -> None:
        """Write the state as one safetensors file, beside its final name first and renamed when complete."""
        from lmx.core.state_file import save_state

        save_state(cast(State[LayerState], self), path)

    def check_fits(self, family: str, layers: Sequence[LayerState]) -> None:
        """Raise StateError unless the layers of a model's own state are of the same kinds, widths and dtypes."""
        if self.family != family or [layer.signature for layer in self.layers] != [layer.signature for layer in layers]:
            raise StateError(
                f"a state of {self.family} does not fit this {family} model",
                "Continue it with the model and the dtype that it was made with.",
            )
