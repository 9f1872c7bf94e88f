"""One token a row at a time: a model's step of generation with as little between its kernels as can be.

The first step runs as any call does, while its kernels are noted (`lmx.core.native.tape`); the following ones only call
the kernels again (`benchmarks/step_profile.py` says what that saves). Where anything but kernels takes part, or a
caller watches the modules, every step runs as any call does. The numbers are the same to the bit either way.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lmx.core.decoder import Call, Decoder, Inputs
from lmx.core.heads import CausalHead
from lmx.core.native.library import library
from lmx.core.native.tape import Tape, recording
from lmx.core.sampling import Chosen, Sampler
from lmx.core.state import Span

if TYPE_CHECKING:
    from lmx.core.model import AnyState, LanguageModel


@dataclass(frozen=True)
class _Noted:
    """All layers of one step. entry, exit: the stream before and behind them; places: where the state lay."""

    tape: Tape
    call: Call
    entry: Tensor
    exit: Tensor
    places: tuple[int, ...]


class Stepper:
    """Continues one state with one model. Keep it no longer than the weights stay as they are."""

    def __init__(self, model: "LanguageModel", state: "AnyState") -> None:
        self._model = model
        self._state = state
        self._noted: _Noted | None = None
        # The first step may compute what layers keep of their weights, and so is not kernels alone.
        self._tries = 2 if _can_note(model) else 0

    # no_grad rather than inference_mode: a state that grew in inference mode could not be continued outside of it.
    @torch.no_grad()
    def feed(self, input_ids: Tensor) -> Tensor:
        """Advance the state by one token a row: input_ids [rows, 1] -> logits [rows, vocab]."""
        state, head = self._state, self._model.head
        # The first token of a text may be special to a layer; and rows of different lengths are.
        if not (self._tries and state.length and state.lengths is None and isinstance(head, CausalHead)):
            output = self._model(input_ids=input_ids, state=state, logits_to_keep=1, output_router_logits=False)
            return output.logits[:, -1]
        decoder = self._model.decoder
        embeds = decoder.embed(input_ids)
        span = state.span(1, None)
        call = decoder.plan(Inputs(embeds, None, None, self._model.attention), span, state)
        hidden = decoder.norm(self._run_layers(decoder, decoder.scaled(embeds), call, span))
        state.advance(span)
        logits: Tensor = head(hidden, decoder.embed.weight)
        return logits[:, -1]

    def choices(self, logits: Tensor, sampler: Sampler, limit: int | None = None) -> Generator[Chosen, None, None]:
        """Choose tokens one after another, the first from the logits [vocab] of the state's last token.

        limit: how many there may be, so that nothing is computed for more; None for no end. Once the generator is
        closed or exhausted, the state holds all tokens chosen but the last one. Raises InputError if the model produces
        NaN.
        """
        yield from one_by_one(lambda ids: self.feed(ids.to(self._model.device)), logits, sampler)

    def _run_layers(self, decoder: Decoder[Any], x: Tensor, call: Call, span: Span) -> Tensor:
        for layer in self._state.layers:
            layer.make_room(span)
        places, noted = self._places(), self._noted
        if noted is None or noted.places != places or not noted.call.follow(call):
            return self._note(decoder, x, call, places)
        noted.entry.copy_(x)
        noted.tape.replay()
        return noted.exit

    def _note(self, decoder: Decoder[Any], x: Tensor, call: Call, places: tuple[int, ...]) -> Tensor:
        with recording() as tape:
            out = decoder.run_layers(x, call, self._state)
        whole = tape.foreign is None and self._places() == places
        self._noted = _Noted(tape, call, x, out, places) if whole else None
        self._tries = 2 if whole else self._tries - 1
        return out

    def _places(self) -> tuple[int, ...]:
        return tuple(buffer.data_ptr() for layer in self._state.layers for buffer in layer.buffers)


def one_by_one(feed: Callable[[Tensor], Tensor], logits: Tensor, sampler: Sampler) -> Generator[Chosen, None, None]:
    """Choose from logits [vocab], feed the token as [1, 1] for those of the next, and so on without end."""
    while True:
        chosen = Chosen(*sampler.next(logits))
        yield chosen
        with torch.no_grad():
            logits = feed(torch.tensor([[chosen.token_id]]))[0]


def _can_note(model: "LanguageModel") -> bool:
    """Whether a step of this model may consist of kernels alone, and nobody wants to see its modules called."""
    if model.device.type != "cpu" or model.decoder.placement is not None or library() is None:
        return False
    if model.training or model.attention != "sdpa":
        return False
    return not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
