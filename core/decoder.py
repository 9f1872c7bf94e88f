"""What every family's stack of layers shares: the loop over them, from the embedding to the last norm."""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmx.core.call import Call, Inputs
from lmx.core.config import ModelConfig
from lmx.core.state import LayerState, Span, State

if TYPE_CHECKING:
    from lmx.core.placement import Placement

L = TypeVar("L", bound=LayerState)


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Make a card the current one: Triton launches there, whatever card its tensors lie on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class Decoder(nn.Module, ABC, Generic[L]):
    """A family's embedding, layers and last norm.

    A family supplies `embed`, `layers`, `norm`, its plan of a call and its empty layer states.
    """

    FAMILY: ClassVar[str]

    embed: nn.Embedding
    layers: nn.ModuleList
    norm: nn.Module
    embed_scale: float | None = None
    embed_dropout: float = 0.0
    placement: "Placement | None" = None
    """Where the parts lie; None where all lie on one device, the current one."""

    @abstractmethod
    def plan(self, inputs: Inputs, span: Span, state: State[L] | None) -> Call:
        """Work out what all layers of this call share."""

    @abstractmethod
    def empty_layers(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> list[L]:
        """Each layer's state before the first token."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """Initialise all weights as the config says, so that training can begin from nothing."""

    @property
    @abstractmethod
    def config(self) -> ModelConfig:
        """The config that the decoder was built from."""

    def make_state(self, batch_size: int) -> State[L]:
        """An empty state, each layer's on the layer's device, in the model's dtype."""
        weight = self.embed.weight
        state = State(self.FAMILY, self.empty_layers(batch_size, weight.dtype, weight.device), batch_size)
        if self.placement is not None:
            state.settle(self.placement.layers)
        return state

    def forward(self, inputs: Inputs, state: State[L] | None) -> Tensor:
        """Run all layers; the state, if any, is advanced in place.

        Returns the last norm's output [batch, length, hidden].
        """
        if self.placement is not None:
            inputs = inputs.to(self.placement.layers[0])
        length = inputs.embeds.shape[1]
        span = state.span(length, inputs.mask) if state is not None else Span.stateless(length, inputs.mask)
        call = self.plan(inputs, span, state)
        x = self.norm(self.run_layers(self.scaled(inputs.embeds), call, state))
        inputs.record.hidden(x)
        if state is not None:
            state.advance(span)
        return x

    def scaled(self, embeds: Tensor) -> Tensor:
        """The embeddings as the first layer takes them."""
        x = embeds if self.embed_scale is None else embeds * self.embed_scale
        return F.dropout(x, self.embed_dropout) if self.training and self.embed_dropout else x

    def run_layers(self, x: Tensor, call: Call, state: State[L] | None) -> Tensor:
        """All layers, one after another: x [batch, length, hidden] -> the same. The layers' states are written to."""
        if self.placement is not None:
            return self._run_apart(x, call, state, self.placement)
        for index, layer in enumerate(self.layers):
            call.record.hidden(x)
            x = layer(x, call, state.layers[index] if state is not None else None)
        return x

    def _run_apart(self, x: Tensor, call: Call, state: State[L] | None, placement: "Placement") -> Tensor:
        """`run_layers` over several devices: the stream moves where they change, and ends where the last norm lies."""
        calls: dict[torch.device, Call] = {}
        for index, (layer, device) in enumerate(zip(self.layers, placement.layers, strict=True)):
            call.record.hidden(x)
            x = x.to(device)
            if device not in calls:
                calls[device] = call.to(device)
            with _current(device):
                x = layer(x, calls[device], state.layers[index] if state is not None else None)
        return x.to(placement.head)
