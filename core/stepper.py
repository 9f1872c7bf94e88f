"""One token a row at a time: a model's step of generation with as little between its kernels as can be.

The first step runs as any call does, while its kernels are noted (`lmx.core.native.tape`); the following ones only call
the kernels again (`benchmarks/step_profile.py` says what that saves). Where anything but kernels takes part, or a
caller watches the modules, every step runs as any call does. The numbers are the same to the bit either way.
"""

import ctypes
import math
import operator
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lmx.core.call import Call, Inputs
from lmx.core.heads import CausalHead
from lmx.core.kv_cache import KVCache
from lmx.core.native.compiled import library
from lmx.core.native.pick import can_embed, embed_rows
from lmx.core.native.tape import Tape, recording
from lmx.core.sampling import Chosen, Sampler

if TYPE_CHECKING:
    from lmx.core.model import AnyState, LanguageModel


@dataclass(frozen=True)
class _Noted:
    """A whole step. ids: the tokens that it reads; logits [rows, vocab]: its answer; hidden: where that takes more than
    kernels, the stream behind the layers in its stead; buffers: what the state lay in; room: for how many tokens.
    """

    tape: Tape
    call: Call
    ids: Tensor
    logits: Tensor | None
    hidden: Tensor
    buffers: tuple[Tensor, ...]
    room: float


class Stepper:
    """Continues one state with one model. Keep it no longer than the weights stay as they are."""

    def __init__(self, model: "LanguageModel", state: "AnyState") -> None:
        self._model = model
        self._state = state
        self._vocabulary = model.decoder.embed.weight.shape[0]
        self._noted: _Noted | None = None
        # The first step may compute what layers keep of their weights, and so is not kernels alone.
        self._tries = 2 if _can_note(model) else 0

    def feed(self, input_ids: Tensor) -> Tensor:
        """Advance the state by one token a row: input_ids [rows, 1] -> logits [rows, vocab].

        The next step may write over the logits: clone what must last.
        """
        noted, state = self._noted, self._state
        if noted is not None and state.length and state.lengths is None and self._follows(noted, input_ids):
            noted.tape.replay()
            state.length += 1
            return self._answer(noted.hidden) if noted.logits is None else noted.logits
        return self._feed_anew(input_ids)

    # no_grad rather than inference_mode: a state that grew in inference mode could not be continued outside of it.
    @torch.no_grad()
    def _feed_anew(self, input_ids: Tensor) -> Tensor:
        """The same by calling the model, noting its kernels if that may serve the next steps."""
        # The first token of a text may be special to a layer; and rows of different lengths are.
        if self._tries and self._state.length and self._state.lengths is None and input_ids.shape[1] == 1:
            return self._note(input_ids)
        output = self._model(input_ids=input_ids, state=self._state, logits_to_keep=1, output_router_logits=False)
        return output.logits[:, -1]

    def choices(self, logits: Tensor, sampler: Sampler, limit: int | None = None) -> Generator[Chosen, None, None]:
        """Choose tokens one after another, the first from the logits [vocab] of the state's last token.

        limit: how many there may be, so that nothing is computed for more; None for no end. Once the generator is
        closed or exhausted, the state holds all tokens chosen but the last one. Raises InputError if the model produces
        NaN.
        """
        device = self._model.device
        feed = self.feed if device.type == "cpu" else lambda ids: self.feed(ids.to(device))
        yield from one_by_one(feed, logits, sampler)

    def _follows(self, noted: _Noted, input_ids: Tensor) -> bool:
        """Put the next step's tokens and places where the noted one read its own; False where it does not fit them.

        Hardly anything but ctypes: each of torch's functions that is called once a step waits for its code to come
        through caches that the weights have just passed.
        """
        state, ids = self._state, noted.ids
        if input_ids.shape != ids.shape or input_ids.dtype != ids.dtype or not input_ids.is_contiguous():
            return False
        if state.length >= noted.room or not all(map(operator.is_, self._buffers(), noted.buffers)):
            return False
        tokens = (ctypes.c_int64 * ids.shape[0]).from_address(ids.data_ptr())
        ctypes.memmove(tokens, input_ids.data_ptr(), ctypes.sizeof(tokens))
        return 0 <= min(tokens) <= max(tokens) < self._vocabulary and noted.call.follow(state.length)

    def _note(self, input_ids: Tensor) -> Tensor:
        """Run one step, part for part as a call does, and keep its kernels where it is made of nothing else."""
        decoder, state = self._model.decoder, self._state
        embeds = decoder.embed(input_ids)  # it checks the tokens, too
        span = state.span(1, None)
        call = decoder.plan(Inputs(embeds, None, None, self._model.attention), span, state)
        for layer in state.layers:
            layer.make_room(span)
        places, ids = self._places(), input_ids.clone(memory_format=torch.contiguous_format)
        with recording() as tape:
            x = embed_rows(decoder.embed.weight, ids, decoder.embed_scale)
            hidden = decoder.run_layers(x, call, state)
        with recording() as ending:
            logits = self._answer(hidden)
        whole = tape.foreign is None and self._places() == places
        if whole and ending.foreign is None:
            tape.append(ending)
        kept = logits if ending.foreign is None else None
        room = min((layer.keys.shape[2] for layer in state.layers if isinstance(layer, KVCache)), default=math.inf)
        self._noted = _Noted(tape, call, ids, kept, hidden, self._buffers(), room) if whole else None
        self._tries = 2 if whole else self._tries - 1
        state.advance(span)
        return logits

    @torch.no_grad()
    def _answer(self, hidden: Tensor) -> Tensor:
        decoder, head = self._model.decoder, self._model.head
        if not isinstance(head, CausalHead):
            raise TypeError("a model without a head for tokens generates none")
        logits: Tensor = head(decoder.norm(hidden), decoder.embed.weight)
        return logits[:, -1]

    def _buffers(self) -> tuple[Tensor, ...]:
        return tuple([buffer for layer in self._state.layers for buffer in layer.buffers])

    def _places(self) -> tuple[int, ...]:
        return tuple(buffer.data_ptr() for buffer in self._buffers())


def one_by_one(feed: Callable[[Tensor], Tensor], logits: Tensor, sampler: Sampler) -> Generator[Chosen, None, None]:
    """Choose from logits [vocab], feed the token as [1, 1] for those of the next, and so on without end."""
    ids = torch.zeros(1, 1, dtype=torch.int64)
    token = ctypes.c_int64.from_address(ids.data_ptr())
    while True:
        chosen = Chosen(*sampler.next(logits))
        yield chosen
        token.value = chosen.token_id
        with torch.no_grad():
            logits = feed(ids)[0]


def _can_note(model: "LanguageModel") -> bool:
    """Whether a step of this model may consist of kernels alone, and nobody wants to see its modules called."""
    if model.device.type != "cpu" or model.decoder.placement is not None or library() is None:
        return False
    if model.training or model.attention != "sdpa" or not isinstance(model.head, CausalHead):
        return False
    embed = model.decoder.embed
    with torch.no_grad():
        if embed.max_norm is not None or not can_embed(embed.weight):
            return False
    return not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
