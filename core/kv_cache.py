"""Keys and values kept between calls: whole, or the last window of them in a ring (see the example in state.py)."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor

from lmx.core.errors import InputError
from lmx.core.large_pages import lasting_zeros
from lmx.core.layers.attention import Visibility
from lmx.core.state import LayerState, Span, StateError, take
from lmx.core.visibility import causal_visibility, filled_slots, visible_keys

_GROW = 256
# Heads a power of two apart would share the same few sets of a core's cache.
_SHIFT = 32


def _pair(tensors: Mapping[str, Tensor], kind: str) -> tuple[Tensor, Tensor]:
    keys, values = take(tensors, kind, keys=4, values=4)
    if keys.shape != values.shape or keys.dtype != values.dtype:
        raise InputError(f"saved state: keys and values of a {kind} layer differ", "The file is damaged.")
    return keys, values


class AttentionCache(LayerState):
    """Keys and values of one attention layer. keys, values: [batch, kv_heads, slots, head_dim]."""

    keys: Tensor
    values: Tensor

    @abstractmethod
    def visibility(self, span: Span) -> Visibility:
        """Which of the keys that `update` will return each query of the span sees."""

    @abstractmethod
    def update(self, keys: Tensor, values: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        """Take in the span's keys and values [batch, kv_heads, length, head_dim]; return all that it may attend to."""

    @abstractmethod
    def step(self, span: Span) -> tuple[Tensor, Tensor]:
        """Where the one token of each row goes, and how many slots its query sees from the first on.

        Two int64 [batch]; a slot is -1 for padding. To be written by a kernel, after `make_room`.
        """

    def first(self, slots: int) -> tuple[Tensor, Tensor]:
        """Keys and values of so many slots, or of as many as there are."""
        return self.keys[:, :, :slots], self.values[:, :, :slots]

    @abstractmethod
    def place(self, number: int) -> tuple[int, int]:
        """The same for the token of this number in every row: its slot, and how many slots it sees."""

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        """Keys and values."""
        return self.keys, self.values

    def _placed(self, number: int) -> tuple[Tensor, Tensor]:
        slot, count = self.place(number)
        return torch.full((len(self.keys),), slot), torch.full((len(self.keys),), count)

    @property
    def signature(self) -> tuple[object, ...]:
        """Kind, heads, head width and dtype."""
        return self.KIND, self.keys.shape[1], self.keys.shape[3], self.keys.dtype


class KVCache(AttentionCache):
    """Every key and value so far; a token's slot is its number in the row, spare slots lie behind."""

    KIND = "kv"
    REWINDS = True

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys = keys
        self.values = values

    @classmethod
    def empty(
        cls, batch: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device, slots: int = 0
    ) -> Self:
        """A cache with room for `slots` tokens; it grows by half when it is full."""
        shape = (batch, kv_heads, slots, head_dim)
        return cls(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))

    def visibility(self, span: Span) -> Visibility:
        """Keys lie in slots 0 .. start + length."""
        if span.at is not None:
            return filled_slots(span.at, span.start + 1)
        span = span.to(self.keys.device)
        if span.ordinals is None and span.start == 0:
            return causal_visibility(span, None, self.keys.device)
        if span.ordinals is None and span.length == 1:
            return Visibility(None)
        slots = torch.arange(span.start + span.length, device=self.keys.device)[None]
        queries = slots[:, span.start :] if span.ordinals is None else span.ordinals.clamp(min=0)
        return Visibility(visible_keys(queries, slots, None), causal=span.ordinals is None)

    def update(self, keys: Tensor, values: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        """Write behind what is there; return views of all slots in use."""
        self.make_room(span)
        end = span.start + span.length
        for buffer, new in ((self.keys, keys), (self.values, values)):
            if span.at is not None:
                buffer.index_copy_(2, span.at, new)
            elif span.ordinals is None:
                buffer[:, :, span.start : end] = new
            else:
                _scatter(buffer, new, span.ordinals, span.ordinals)
        return self.keys[:, :, :end], self.values[:, :, :end]

    def make_room(self, span: Span) -> None:
        """Grow by half when the slots are full."""
        end = span.start + span.length
        if end > self.keys.shape[2]:
            self._grow(max(end, self.keys.shape[2] * 3 // 2))

    def step(self, span: Span) -> tuple[Tensor, Tensor]:
        """A token's slot is its number; it sees all before it."""
        if span.ordinals is None:
            return self._placed(span.start)
        return span.ordinals[:, 0], span.ordinals[:, 0].clamp(min=0) + 1

    def place(self, number: int) -> tuple[int, int]:
        """A token's slot is its number; it sees all before it."""
        return number, number + 1

    def nbytes_at(self, length: int) -> int:
        """Keys and values of `length` tokens."""
        batch, kv_heads, _, head_dim = self.keys.shape
        return 2 * batch * kv_heads * length * head_dim * self.keys.element_size()

    def _grow(self, slots: int) -> None:
        slots = -(-slots // _GROW) * _GROW + _SHIFT
        for name in ("keys", "values"):
            old: Tensor = getattr(self, name)
            shape = (*old.shape[:2], slots, old.shape[3])
            new = lasting_zeros(shape, old.dtype) if old.is_cpu else old.new_zeros(shape)
            new[:, :, : old.shape[2]] = old
            setattr(self, name, new)

    def tensors(self, length: int) -> dict[str, Tensor]:
        """The slots in use."""
        return {"keys": self.keys[:, :, :length], "values": self.values[:, :, :length]}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Take over the slots of `tensors()`."""
        return cls(*_pair(tensors, "kv"))

    def part(self, start: int, end: int) -> Self:
        """The slots of these tokens."""
        return type(self)(self.keys[:, :, start:end].clone(), self.values[:, :, start:end].clone())

    def extend(self, part: Self, held: int) -> None:
        """Fill the slots behind those in use."""
        self.update(part.keys, part.values, Span(held, part.keys.shape[2]))

    def truncate(self, length: int, held: int) -> None:
        """Nothing to do: slots past the state's length are never seen, and are written over."""


class WindowKVCache(AttentionCache):
    """The last `window` keys and values in a ring: a token's slot is its number in the row modulo the window."""

    KIND = "window"

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys = keys
        self.values = values

    @classmethod
    def empty(
        cls, batch: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device, window: int
    ) -> Self:
        """A ring of `window` slots, whole from the start: its memory never grows."""
        shape = (batch, kv_heads, window, head_dim)
        return cls(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))

    @property
    def signature(self) -> tuple[object, ...]:
        """The window too: a ring cannot change its size."""
        return *super().signature, self.window

    @property
    def window(self) -> int:
        """How many keys back a query sees, itself included."""
        return self.keys.shape[2]

    def visibility(self, span: Span) -> Visibility:
        """One token is written first and sees the ring; several see the ring as it was, and each other."""
        if span.at is not None:
            return filled_slots(span.at, min(span.start + 1, self.window))
        span = span.to(self.keys.device)
        if span.ordinals is None and span.start == 0:
            return causal_visibility(span, self.window, self.keys.device)
        slots = torch.arange(self.window, device=self.keys.device)
        if span.length == 1:
            if span.ordinals is None:
                return Visibility(None)
            return Visibility(visible_keys(span.ordinals.clamp(min=0), slots[None], None))
        if span.ordinals is None or span.held is None:
            queries = torch.arange(span.start, span.start + span.length, device=self.keys.device)[None]
            held = torch.full((1, 1), span.start, device=self.keys.device)
        else:
            queries = span.ordinals
            held = span.held[:, None]  # [batch, 1]
        # The ordinal that each slot holds: the largest below `held` that is congruent to the slot.
        kept = held - 1 - (held - 1 - slots[None]) % self.window
        seen = visible_keys(queries, torch.cat((kept, queries), dim=1), self.window)
        if span.ordinals is not None:
            seen[..., self.window :] |= torch.eye(span.length, dtype=torch.bool, device=seen.device)
        return Visibility(seen)

    def update(self, keys: Tensor, values: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        """Write over the oldest; return the ring, or for several tokens the ring as it was and their own keys."""
        fresh = span.ordinals is None and span.start == 0 and span.at is None
        if span.length == 1 and not fresh:
            self._write(keys, values, span)
            used = self.window if span.ordinals is not None else min(span.start + 1, self.window)
            return self.keys[:, :, :used], self.values[:, :, :used]
        seen = (keys, values) if fresh else (torch.cat((self.keys, keys), 2), torch.cat((self.values, values), 2))
        self._write(keys, values, span)
        return seen

    def step(self, span: Span) -> tuple[Tensor, Tensor]:
        """The token writes over the oldest and sees the ring, as far as it is filled."""
        if span.ordinals is None:
            return self._placed(span.start)
        numbers = span.ordinals[:, 0]
        return torch.where(numbers < 0, -1, numbers % self.window), (numbers.clamp(min=0) + 1).clamp(max=self.window)

    def place(self, number: int) -> tuple[int, int]:
        """The token writes over the oldest and sees the ring, as far as it is filled."""
        return number % self.window, min(number + 1, self.window)

    def _write(self, keys: Tensor, values: Tensor, span: Span) -> None:
        slot_at = None if span.at is None else span.at % self.window
        for buffer, new in ((self.keys, keys), (self.values, values)):
            if slot_at is not None:
                buffer.index_copy_(2, slot_at, new)
                continue
            if span.ordinals is not None:
                newest = span.ordinals.max(dim=1, keepdim=True).values
                kept = span.ordinals.masked_fill(span.ordinals <= newest - self.window, -1)
                _scatter(buffer, new, kept, kept % self.window)
                continue
            last = new[:, :, -self.window :]
            first = span.start + span.length - last.shape[2]
            slot = first % self.window
            room = self.window - slot
            buffer[:, :, slot : slot + min(room, last.shape[2])] = last[:, :, :room]
            if last.shape[2] > room:
                buffer[:, :, : last.shape[2] - room] = last[:, :, room:]

    def tensors(self, length: int) -> dict[str, Tensor]:
        """The whole ring."""
        return {"keys": self.keys, "values": self.values}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Take over the ring of `tensors()`."""
        return cls(*_pair(tensors, "window"))

    def truncate(self, length: int, held: int) -> None:
        """Possible while nothing was written over, and to nothing. Raises StateError after the ring went round."""
        if length and held > self.window:
            raise StateError(
                f"a sliding window of {self.window} has already dropped what it held after {length} tokens",
                "Continue from a clone() taken at that point.",
            )


def _scatter(buffer: Tensor, new: Tensor, ordinals: Tensor, slots: Tensor) -> None:
    """Write each row's real tokens (ordinal not negative) into its own slots. buffer, new: [batch, heads, *, width]."""
    if new.shape[2] == 1:
        # The step of generation: to look for padding would make the host wait for the device in every layer.
        every, slot = torch.arange(len(new), device=new.device), slots[:, 0].clamp(min=0)
        buffer[every, :, slot] = torch.where(ordinals[:, :1, None] >= 0, new[:, :, 0], buffer[every, :, slot])
        return
    rows, columns = (ordinals >= 0).nonzero(as_tuple=True)
    buffer[rows, :, slots[rows, columns]] = new[rows, :, columns]
