"""One step of generation in which nothing depends on the host: what a CUDA graph can be captured of.

All that changes from step to step lies in tensors that stay where they are: the tokens, their number, the state. Shapes
are fixed, so attention reads a fixed number of slots and a mask, made on the device, hides those not yet filled.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lmx.core.call import AttentionCall, Call, Inputs
from lmx.core.decoder import Decoder
from lmx.core.device_sampling import DeviceSampler
from lmx.core.heads import CausalHead
from lmx.core.kv_cache import KVCache, WindowKVCache
from lmx.core.layers.attention import Visibility
from lmx.core.recurrent_state import RecurrentState
from lmx.core.sampling import Sampler
from lmx.core.state import LayerState, Span
from lmx.core.undo import Undo

if TYPE_CHECKING:
    from lmx.core.model import AnyState, LanguageModel

_UNIT = 256


def slots_for(layers: Sequence[LayerState], tokens: int) -> int:
    """How many slots a step reads that leaves `tokens` in a row: 256, 512, 768, 1024, 1536, 2048, 3072, 4096 ...

    Reading all that a context could hold would cost too much: OLMoE's 4,096 tokens are 0.54 GB of keys and values, and
    its active weights in four bits 0.7 GB. With two sizes an octave a step reads at most half more than it must, a
    fifth on average, and growing to a whole context means eight captures. Rings stop at their window (one more says
    that they go round), and what has no slots needs but one size.
    """
    units = -(-tokens // _UNIT)
    power = 1 << (units - 1).bit_length()
    slots = _UNIT * (power * 3 // 4 if units <= power * 3 // 4 else power)
    if any(isinstance(layer, KVCache) for layer in layers):
        return slots
    return min(slots, max((layer.window + 1 for layer in layers if isinstance(layer, WindowKVCache)), default=1))


class StaticStep:
    """Advances one state by one token a row at a time; `run` is the whole step on the device.

    tokens: int64 [rows, 1], what the next step feeds; with a sampler (one row) a step chooses the next one itself.
    After a step `logits` [rows, vocab] are its answer, or with a sampler `report` is: float64 [2], the token chosen and
    the log of its probability.
    """

    def __init__(self, model: "LanguageModel", state: "AnyState", sampler: Sampler | None) -> None:
        device = model.device
        self.sampler = sampler
        self.tokens = torch.zeros(state.batch_size, 1, dtype=torch.int64, device=device)
        self.logits = torch.empty(0, device=device)
        self.report = torch.zeros(2, dtype=torch.float64, device=device)
        self._model, self._state = model, state
        self._at = torch.full((1,), state.length, device=device)
        self._length, self._slots = state.length, 0
        self._chooser = None if sampler is None else DeviceSampler(sampler, model.config.vocab_size, device)
        self._undo: Undo | None = None
        self._fit(slots_for(state.layers, state.length + 1))

    @property
    def follows(self) -> bool:
        """Whether the state is as the last step left it, and lies where it lay."""
        return self._length == self._state.length and self._places == _places(self._state)

    def resume(self) -> bool:
        """Go on where the state is now, further on or cut, if it lies where it lay; a sampler could not follow."""
        if self.sampler is not None or self._places != _places(self._state):
            return False
        self._length = self._state.length
        self._at.fill_(self._length)
        return True

    def make_room(self) -> bool:
        """See that there is room for one more token. True where the step is another one from now on."""
        slots = slots_for(self._state.layers, self._state.length + 1)
        if slots == self._slots:
            return False
        self._fit(slots)
        return True

    def prepare(self) -> None:
        """What the host has to do before each step."""
        if self._chooser is not None:
            self._chooser.prepare()

    def choose(self, logits: Tensor) -> None:
        """Choose the first token from the logits [vocab] of a prompt."""
        if self._chooser is not None:
            token_id, logprob = self._chooser.choose(logits)
            self.tokens.copy_(token_id[None])
            torch.cat((token_id.double(), logprob.double()), out=self.report)

    def run(self) -> None:
        """The step, on the device alone: the host has to `prepare` before and to `count` after."""
        if self._undo is not None:
            self._undo.save(self._at)
        decoder, head = self._model.decoder, self._model.head
        if not isinstance(head, CausalHead):
            raise TypeError("a model without a head for tokens generates none")
        with self._in_place():
            hidden = self._run_layers(decoder)
        self.logits = head(hidden, decoder.embed.weight)[:, -1]
        self.choose(self.logits[0])
        self._at.add_(1)

    def count(self) -> None:
        """Note on the host that a step was run."""
        self._length += 1
        self._state.length += 1

    def undo(self) -> None:
        """Take the last step back."""
        self._at.sub_(1)
        if self._undo is not None:
            self._undo.restore(self._at)
        self._length -= 1
        self._state.length -= 1

    def _fit(self, slots: int) -> None:
        layers = self._state.layers
        self._slots = slots
        self._span = Span(slots - 1, 1, at=self._at)
        for layer in layers:
            layer.make_room(self._span)
        self._undo = None if self.sampler is None else Undo(layers, slots)
        self._places = _places(self._state)

    def _run_layers(self, decoder: Decoder[Any]) -> Tensor:
        embeds = decoder.embed(self.tokens)
        call = decoder.plan(Inputs(embeds, None, None, "sdpa"), self._span, self._state)
        hidden: Tensor = decoder.norm(decoder.run_layers(decoder.scaled(embeds), _added(call, embeds), self._state))
        return hidden

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """Layers may give a recurrence new tensors inside; afterwards its numbers are where they were before."""
        layers = [layer for layer in self._state.layers if isinstance(layer, RecurrentState)]
        places = [(layer.conv, layer.hidden) for layer in layers]
        fresh: list[tuple[Tensor, Tensor]] = []
        try:
            yield
            fresh = [(layer.conv, layer.hidden) for layer in layers]
        finally:
            for layer, (conv, hidden) in zip(layers, places, strict=True):
                layer.conv, layer.hidden = conv, hidden
        for kind in range(2):
            moved = [
                (old[kind], new[kind]) for old, new in zip(places, fresh, strict=True) if not _same(old, new, kind)
            ]
            if moved:
                torch._foreach_copy_([old for old, _ in moved], [new for _, new in moved])


def _added(call: Call, embeds: Tensor) -> Call:
    """The call with its mask as what is added to scores: torch's kernels would else make that of it in every layer."""
    if not isinstance(call, AttentionCall) or call.visibility.mask is None:
        return call
    seen = call.visibility.mask
    hidden = torch.zeros_like(seen, dtype=embeds.dtype).masked_fill(~seen, float("-inf"))
    return replace(call, visibility=Visibility(hidden))


def _same(old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], kind: int) -> bool:
    """Whether a kernel has written to the old tensor itself."""
    return old[kind].untyped_storage()._cdata == new[kind].untyped_storage()._cdata


def _places(state: "AnyState") -> tuple[int, ...]:
    return tuple(buffer.data_ptr() for layer in state.layers for buffer in layer.buffers)
