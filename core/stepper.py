"""One token a row at a time: a model's step of generation with as little between its kernels as can be.

The first step runs as any call does, while its kernels are noted (`lmx.core.native.tape`); the following ones only call
the kernels again (`benchmarks/step_profile.py` says what that saves). Where anything but kernels takes part, or a
caller watches the modules, every step runs as any call does. The numbers are the same to the bit either way.
"""

import ctypes
import math
import operator
from collections.abc import Callable, Generator, Sequence
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
    """A whole step. ids [rows, 1]: the tokens that it reads; tokens: the same numbers; logits [rows, vocab]: its
    answer; row: that of a single one; hidden: where an answer takes more than kernels, the stream behind the layers in
    its stead; buffers: what the state lay in; room: for how many tokens.
    """

    tape: Tape
    call: Call
    ids: Tensor
    tokens: "ctypes.Array[ctypes.c_int64]"
    logits: Tensor | None
    row: Tensor | None
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
        noted = self._noted
        alike = noted is not None and input_ids.shape == noted.ids.shape and input_ids.dtype == noted.ids.dtype
        if noted is None or not alike or not self._replays(noted, input_ids.flatten().tolist()):
            return self._feed_anew(input_ids)
        return self._answer(noted.hidden) if noted.logits is None else noted.logits

    def step(self, token_id: int) -> Tensor:
        """The same of a state of one row, in less time: its next token -> logits [vocab]."""
        noted = self._noted
        if noted is not None and noted.row is not None and self._replays(noted, (token_id,)):
            return noted.row
        with torch.no_grad():
            return self.feed(torch.tensor([[token_id]]).to(self._model.device))[0]

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
        yield from one_by_one(self.step, logits, sampler)

    def _replays(self, noted: _Noted, tokens: Sequence[int]) -> bool:
        """Run the noted step for the next tokens, one a row; False, and nothing done, where it does not fit them.

        Without a function of torch: each that is called once a step waits for its code to come through caches that the
        weights have just passed.
        """
        state = self._state
        if not 0 < state.length < noted.room or state.lengths is not None:
            return False
        if not 0 <= min(tokens) <= max(tokens) < self._vocabulary:
            return False
        if not all(map(operator.is_, self._buffers(), noted.buffers)) or not noted.call.follow(state.length):
            return False
        for row, token_id in enumerate(tokens):
            noted.tokens[row] = token_id
        noted.tape.replay()
        state.length += 1
        return True

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
        tokens = (ctypes.c_int64 * len(ids)).from_address(ids.data_ptr())
        row = kept[0] if kept is not None and len(ids) == 1 else None
        self._noted = _Noted(tape, call, ids, tokens, kept, row, hidden, self._buffers(), room) if whole else None
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


def one_by_one(step: Callable[[int], Tensor], logits: Tensor, sampler: Sampler) -> Generator[Chosen, None, None]:
    """Choose from logits [vocab], take a step with the token to those of the next, and so on without end."""
    while True:
        chosen = Chosen(*sampler.next(logits))
        yield chosen
        logits = step(chosen.token_id)


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
