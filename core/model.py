"""A language model: a family's decoder and a head, with the arguments and outputs of the transformers classes."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from lmx.core.call import Inputs, Record
from lmx.core.config import ModelConfig
from lmx.core.decoder import Decoder
from lmx.core.errors import UsageError
from lmx.core.graph_stepper import GraphStepper, reason_against
from lmx.core.heads import (
    CausalHead,
    ClassHead,
    HeadKind,
    last_real_token,
    sequence_loss,
    token_loss,
)
from lmx.core.layers.attention import Implementation
from lmx.core.layers.moe import balance_loss
from lmx.core.state import LayerState, State, StateError
from lmx.core.state_file import load_state
from lmx.core.stepper import Stepper

if TYPE_CHECKING:
    from lmx.core.placement import Share

AnyState = State[LayerState]


@dataclass
class Output:
    """What a call returns; what was not asked for is None.

    logits: [batch, kept, vocab]; with head `sequence` [batch, labels], `token` [batch, length, labels], `none` the
    last hidden states [batch, length, hidden]. state: the one passed in, advanced. hidden_states: layers + 1 of
    [batch, length, hidden], the embeddings first, the last after the final norm. attentions: one
    [batch, heads, length, keys] for each attention layer. router_logits: [batch * length, experts] a layer.
    """

    logits: Tensor
    state: AnyState | None = None
    loss: Tensor | None = None
    aux_loss: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None


class LanguageModel(nn.Module):
    """One of the five families with a head. It holds weights only: what it remembers lies in the caller's State."""

    def __init__(self, decoder: Decoder[Any], kind: HeadKind = "causal", *, tied: bool | None = None) -> None:
        """tied: whether the output matrix is the embedding; by default as the config says."""
        super().__init__()
        config = decoder.config
        self.decoder = decoder
        self.kind: HeadKind = kind
        self.attention: Implementation = "sdpa"
        self.shares: tuple[Share, ...] = ()
        """What lies on which device, where cards were shared out; empty where nobody asked."""
        self.head: CausalHead | ClassHead | None = None
        if kind == "causal":
            self.head = CausalHead(config, tied=config.tie_word_embeddings if tied is None else tied)
        elif kind != "none":
            self.head = ClassHead(config, of_tokens=kind == "token")

    @property
    def config(self) -> ModelConfig:
        """The family's config."""
        return self.decoder.config

    @property
    def family(self) -> str:
        """The family's `model_type`."""
        return self.decoder.FAMILY

    @property
    def context_length(self) -> int | None:
        """The number of tokens the model was made for; None where the architecture has no such limit."""
        return self.config.context_length

    @property
    def device(self) -> torch.device:
        """Where the embedding lies: token ids go there."""
        return self.decoder.embed.weight.device

    def make_state(self, batch_size: int = 1) -> AnyState:
        """An empty state for `batch_size` conversations."""
        return cast(AnyState, self.decoder.make_state(batch_size))

    def stepper(self, state: AnyState) -> Stepper:
        """What continues a state by one token a row at a time, faster than calling the model does."""
        return Stepper(self, state) if reason_against(self) is not None else GraphStepper(self, state)

    def load_state(self, path: Path) -> AnyState:
        """A state saved by `State.save`, each layer's on the layer's device; it continues to the same bits.

        Raises InputError for a damaged file, StateError for a state of another model, dtype or window.
        """
        state = load_state(path, self.device)
        # On no device: what a hostile file says of its batch must not be allocated.
        weight = self.decoder.embed.weight
        state.check_fits(self.family, self.decoder.empty_layers(1, weight.dtype, torch.device("meta")))
        if self.decoder.placement is not None:
            state.settle(self.decoder.placement.layers)
        return state

    def reset_parameters(self) -> None:
        """Initialise all weights as the config says."""
        self.decoder.reset_parameters()
        if self.head is not None:
            self.head.reset_parameters(self.config.initializer_range)

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        state: AnyState | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        output_router_logits: bool | None = None,
    ) -> Output:
        """Run the model over new tokens.

        input_ids: [batch, length], or inputs_embeds: [batch, length, hidden] instead. attention_mask: [batch, length],
        0 for padding anywhere in a row; columns of earlier calls may stand before it and are not needed. position_ids:
        [batch or 1, length]; by default real tokens are counted from where the state ends. state: advanced in place; a
        call with one records no gradient. labels: as the head wants them. logits_to_keep: the last so many positions,
        or their indices, [kept] or [batch, kept]; 0 for all. output_router_logits: None for what the config says.
        Raises UsageError for arguments that do not fit together.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise UsageError("give either input_ids or inputs_embeds", "Pass exactly one of the two.")
        embeds = self.decoder.embed(input_ids) if inputs_embeds is None else inputs_embeds
        if embeds.dim() != 3:
            raise UsageError(
                f"the input has shape {list(embeds.shape[:-1])}", "Give [batch, length], a row for a text."
            )
        if state is not None and (state.family, state.batch_size) != (self.family, embeds.shape[0]):
            raise StateError(
                f"a state of {state.batch_size} rows of {state.family}, an input of {embeds.shape[0]} of {self.family}",
                "Make a state with model.make_state(batch_size).",
            )
        _check_positions(position_ids, embeds)
        mask = _real_columns(attention_mask, embeds)
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        record = Record(
            [] if output_hidden_states else None,
            [] if output_attentions else None,
            [] if output_router_logits else None,
        )
        implementation: Implementation = "eager" if output_attentions else self.attention
        inputs = Inputs(embeds, mask, position_ids, implementation, record)
        with torch.set_grad_enabled(torch.is_grad_enabled() and state is None):
            hidden = self.decoder(inputs, state)
            logits = self._answer(hidden, input_ids, attention_mask, logits_to_keep)
        output = Output(
            logits,
            state,
            hidden_states=_frozen(record.hidden_states),
            attentions=_frozen(record.attentions),
            router_logits=_frozen(record.router_logits),
        )
        if output.router_logits:
            output.aux_loss = balance_loss(output.router_logits, self.config.experts_to_choose, mask)
        if labels is not None:
            output.loss = self._loss(logits, labels, mask, output.aux_loss)
        return output

    def _answer(self, hidden: Tensor, input_ids: Tensor | None, mask: Tensor | None, keep: int | Tensor) -> Tensor:
        if isinstance(self.head, CausalHead):
            return cast(Tensor, self.head(_kept(hidden, keep), self.decoder.embed.weight))
        if self.head is None:
            return hidden
        if self.kind == "token":
            return cast(Tensor, self.head(hidden))
        batch, length = hidden.shape[:2]
        column = last_real_token(input_ids, mask, self.config.pad_id, length, batch).to(hidden.device)
        return cast(Tensor, self.head(hidden[torch.arange(batch, device=hidden.device), column]))

    def _loss(self, logits: Tensor, labels: Tensor, mask: Tensor | None, aux_loss: Tensor | None) -> Tensor:
        if self.kind == "none":
            raise UsageError("labels were given to a model without a head", "Load it with head='causal'.")
        if self.kind == "sequence":
            return sequence_loss(logits, labels, self.config.problem_type)
        if self.kind == "token":
            return token_loss(logits, labels)
        if logits.shape[:2] != labels.shape:
            raise UsageError(
                f"labels have shape {list(labels.shape)}, the logits {list(logits.shape)}",
                "Give a label for every token (-100 where none counts) and leave logits_to_keep at 0.",
            )
        loss = CausalHead.loss(logits, labels, mask)
        return loss if aux_loss is None else loss + self.config.router_aux_loss_coef * aux_loss


def _real_columns(attention_mask: Tensor | None, embeds: Tensor) -> Tensor | None:
    """The mask of this call's columns as bool, or None where nothing is padded."""
    if attention_mask is None:
        return None
    batch, length = embeds.shape[:2]
    if attention_mask.dim() != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] < length:
        raise UsageError(
            f"attention_mask has shape {list(attention_mask.shape)}, the input [{batch}, {length}]",
            "Give one column a token; columns of earlier calls may stand before them.",
        )
    mask = attention_mask[:, attention_mask.shape[1] - length :].to(embeds.device).bool()
    return None if bool(mask.all()) else mask


def _check_positions(position_ids: Tensor | None, embeds: Tensor) -> None:
    batch, length = embeds.shape[:2]
    if position_ids is not None and tuple(position_ids.shape) not in ((batch, length), (1, length)):
        raise UsageError(
            f"position_ids has shape {list(position_ids.shape)}, the input [{batch}, {length}]",
            "Give one position a token, for all rows or for each.",
        )


def _kept(hidden: Tensor, keep: int | Tensor) -> Tensor:
    """The positions that logits are wanted of: the last so many, or those of an index for all rows or for each row."""
    if isinstance(keep, int):
        return hidden[:, -keep:]
    if keep.dim() == 2:
        return torch.take_along_dim(hidden, keep[..., None], dim=1)
    return hidden[:, keep]


def _frozen(tensors: list[Tensor] | None) -> tuple[Tensor, ...] | None:
    return None if tensors is None else tuple(tensors)
