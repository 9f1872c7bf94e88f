"""Which part of a model lies on which device: planned from bytes alone, then put into the model.

What fits one card lies there whole. Else the layers are shared among the cards in proportion to what may be taken of
each, and what does not fit at all stays on the host: of a mixture of experts first the banks of experts, whose layers
stay on a card, of any other model whole layers. Those are the first ones, beside the embedding, so that the stream of
hidden states changes its device as rarely as can be:

    host   embedding  layer 0  layer 1
    cuda:0                              layer 2  layer 3
    cuda:1                                                layer 4  layer 5  norm and head
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lmx.core.heads import CausalHead
from lmx.core.layers.moe import ExpertBank
from lmx.core.model import LanguageModel
from lmx.core.state import LayerState

HOST = torch.device("cpu")
STATE_CONTEXT = 4096
"""The tokens of one conversation whose state a plan leaves room for, or the model's context if that is shorter."""

_LAYERS = "decoder.layers."
_EMBEDDING = "decoder.embed."


@dataclass(frozen=True)
class Budget:
    """How many bytes of weights and states a card may hold."""

    device: torch.device
    nbytes: int


@dataclass(frozen=True)
class LayerBytes:
    """Bytes of one layer. bank: of its experts, 0 where it has none; rest: all its other weights; state: its memory."""

    rest: int
    bank: int = 0
    state: int = 0

    @property
    def without_bank(self) -> int:
        """What lies where the layer does, wherever its bank is."""
        return self.rest + self.state

    @property
    def total(self) -> int:
        """All of it."""
        return self.without_bank + self.bank


@dataclass(frozen=True)
class ModelBytes:
    """Bytes of a model's parts. head: the last norm with the output matrix; tied: that matrix is the embedding."""

    embed: int
    layers: tuple[LayerBytes, ...]
    head: int
    tied: bool = False

    @property
    def total(self) -> int:
        """All of it."""
        return self.embed + self.head + sum(layer.total for layer in self.layers)


@dataclass(frozen=True)
class Share:
    """What one device holds: whole layers or all but their banks, the banks there, and the bytes of it all."""

    device: str
    layers: int
    banks: int
    embed: bool
    head: bool
    nbytes: int


@dataclass(frozen=True)
class Placement:
    """The device of each part. banks: of each layer's experts, the layer's own where it has none."""

    embed: torch.device
    layers: tuple[torch.device, ...]
    banks: tuple[torch.device, ...]
    head: torch.device

    @classmethod
    def whole(cls, device: torch.device, layers: int) -> "Placement":
        """Everything on one device."""
        return cls(device, (device,) * layers, (device,) * layers, device)

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """Those that hold anything, in the order of the stream of hidden states."""
        return tuple(dict.fromkeys((self.embed, *self.layers, self.head, *self.banks)))

    def shares(self, sizes: ModelBytes) -> tuple[Share, ...]:
        """What each device holds."""
        return tuple(self._share(device, sizes) for device in self.devices)

    def _share(self, device: torch.device, sizes: ModelBytes) -> Share:
        layers = [layer for layer, here in zip(sizes.layers, self.layers, strict=True) if here == device]
        banks = [layer.bank for layer, here in zip(sizes.layers, self.banks, strict=True) if here == device]
        ends = sizes.embed * (self.embed == device) + sizes.head * (self.head == device)
        return Share(
            device=str(device),
            layers=len(layers),
            banks=sum(bank > 0 for bank in banks),
            embed=self.embed == device,
            head=self.head == device,
            nbytes=ends + sum(layer.without_bank for layer in layers) + sum(banks),
        )


def plan_placement(sizes: ModelBytes, budgets: Sequence[Budget], host: torch.device = HOST) -> Placement:
    """Where each part goes; no card gets more than its budget, and the host what is left.

    The embedding goes with the first layers, or, where it is the output matrix too, with the head. Where something is
    left to the host it goes there first, since only one row of it is read for a token.
    """
    for budget in budgets:
        if sizes.total <= budget.nbytes:
            return Placement.whole(budget.device, len(sizes.layers))
    return _spread_whole(sizes, budgets) or _spill(sizes, budgets, host)


def _spread_whole(sizes: ModelBytes, budgets: Sequence[Budget]) -> Placement | None:
    """All of the model over all of the cards; None where they do not hold it."""
    if not budgets:
        return None
    room = [budget.nbytes for budget in budgets]
    first, last = 0, len(room) - 1
    embed = last if sizes.tied else first
    room[embed] -= sizes.embed
    room[last] -= sizes.head
    cards = _share_out([layer.total for layer in sizes.layers], room)
    if cards is None or min(room) < 0:
        return None
    layers = tuple(budgets[card].device for card in cards)
    return Placement(budgets[embed].device, layers, layers, budgets[last].device)


def _spill(sizes: ModelBytes, budgets: Sequence[Budget], host: torch.device) -> Placement:
    """As much as the cards hold: the head, the layers from the last one on, and then their banks."""
    room, last = [budget.nbytes for budget in budgets], len(budgets) - 1
    ending = sizes.head + sizes.embed * sizes.tied
    has_head = bool(budgets) and ending <= room[last]
    if has_head:
        room[last] -= ending
    needs = [layer.without_bank for layer in sizes.layers]
    cards = _share_out(needs, room) or _fill(needs, room, room)
    for need, card in zip(needs, cards, strict=True):
        if card is not None:
            room[card] -= need
    head = budgets[last].device if has_head else host
    layers = tuple(host if card is None else budgets[card].device for card in cards)
    banks = list(layers)
    for index in reversed(range(len(layers))):
        card, bank = cards[index], sizes.layers[index].bank
        if card is not None and bank <= room[card]:
            room[card] -= bank
        elif bank:
            banks[index] = host
    return Placement(head if sizes.tied else host, layers, tuple(banks), head)


def _share_out(needs: Sequence[int], room: Sequence[int]) -> list[int] | None:
    """A card for each layer, in proportion to the cards' room, else as they come; None where not all fit."""
    whole = max(1, sum(room))
    for quotas in ([sum(needs) * each / whole for each in room], room):
        cards = [card for card in _fill(needs, room, quotas) if card is not None]
        if len(cards) == len(needs):
            return cards
    return None


def _fill(needs: Sequence[int], room: Sequence[int], quotas: Sequence[float]) -> list[int | None]:
    """Give layers to cards, the last ones to the last card, until each has its quota; None for those left over."""
    cards: list[int | None] = []
    card, used = len(room) - 1, 0
    for need in reversed(needs):
        while card >= 0 and (used + need > room[card] or (card > 0 and used >= quotas[card])):
            card, used = card - 1, 0
        used += need
        cards.append(card if card >= 0 else None)
    return cards[::-1]


def measure_parts(model: LanguageModel, weights: Mapping[str, int], state: Sequence[int]) -> ModelBytes:
    """The bytes of a model's parts, from those of its parameters by name and of each layer's state.

    weights may name parameters that the model does not have yet, as the output matrix that a tied head gets of its own
    when it is quantized.
    """
    banks = bank_paths(model)
    rest, experts, embed, head = [0] * len(state), [0] * len(state), 0, 0
    for name, nbytes in weights.items():
        index = _layer_of(name)
        if index is None:
            is_embedding = name.startswith(_EMBEDDING)
            embed, head = embed + nbytes * is_embedding, head + nbytes * (not is_embedding)
        elif index in banks and name.startswith(f"{banks[index]}."):
            experts[index] += nbytes
        else:
            rest[index] += nbytes
    layers = tuple(LayerBytes(*each) for each in zip(rest, experts, state, strict=True))
    tied = isinstance(model.head, CausalHead) and not any(name.startswith("head.") for name in weights)
    return ModelBytes(embed, layers, head, tied)


def state_bytes(model: LanguageModel, dtype: torch.dtype) -> list[int]:
    """The bytes of each layer's state after `STATE_CONTEXT` tokens of one conversation."""
    length = min(STATE_CONTEXT, model.context_length or STATE_CONTEXT)
    layers: list[LayerState] = model.decoder.empty_layers(1, dtype, torch.device("meta"))
    return [layer.nbytes_at(length) for layer in layers]


def bank_paths(model: LanguageModel) -> dict[int, str]:
    """The module of each layer's bank of experts, by the number of the layer."""
    found = (path for path, module in model.named_modules() if isinstance(module, ExpertBank))
    return {index: path for path in found if (index := _layer_of(path)) is not None}


def _layer_of(name: str) -> int | None:
    """`decoder.layers.3.mlp.router.weight` -> 3; None outside of the layers."""
    return int(name[len(_LAYERS) :].partition(".")[0]) if name.startswith(_LAYERS) else None


class Destinations:
    """Where each weight of a model goes while it is loaded. The model's banks are those that it was built with."""

    def __init__(self, model: LanguageModel, placement: Placement, shares: tuple[Share, ...] = ()) -> None:
        self.placement = placement
        self._model, self._shares, self._banks = model, shares, bank_paths(model)

    @classmethod
    def plan(
        cls,
        model: LanguageModel,
        weights: Mapping[str, int],
        dtype: torch.dtype,
        device: torch.device | None,
        budgets: Sequence[Budget],
    ) -> "Destinations":
        """Everything on one device (None is the host), or by a plan for the cards' budgets, if there are any.

        weights: the bytes of each parameter as it will be held; dtype: of the states.
        """
        if not budgets:
            return cls(model, Placement.whole(device or HOST, len(model.decoder.layers)))
        sizes = measure_parts(model, weights, state_bytes(model, dtype))
        placement = plan_placement(sizes, budgets)
        return cls(model, placement, placement.shares(sizes))

    def of(self, name: str) -> torch.device:
        """The device of a parameter, by its name in the model."""
        index = _layer_of(name)
        if index is None:
            return self.placement.embed if name.startswith(_EMBEDDING) else self.placement.head
        in_bank = index in self._banks and name.startswith(f"{self._banks[index]}.")
        return self.placement.banks[index] if in_bank else self.placement.layers[index]

    def host_bytes(self, nbytes: int) -> int:
        """What of a model's `nbytes` will lie in the host's memory."""
        if self._shares:
            return sum(share.nbytes for share in self._shares if share.device == str(HOST))
        return nbytes if self.placement.embed == HOST else 0

    def settle(self) -> None:
        """Tell the model, once all its weights are there, how its hidden states travel."""
        model, placement = self._model, self.placement
        model.shares = self._shares
        if len(placement.devices) == 1:
            return
        model.decoder.placement = placement
        for index, path in self._banks.items():
            if placement.banks[index] != placement.layers[index]:
                _visit(model.get_submodule(path), placement.banks[index], placement.layers[index])


def _visit(bank: nn.Module, there: torch.device, home: torch.device) -> None:
    """Let a bank of experts take its tokens from, and answer to, another device than its own."""
    bank.register_forward_pre_hook(partial(_carry, there))
    bank.register_forward_hook(partial(_bring_back, home))


def _carry(there: torch.device, bank: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(each.to(there) for each in inputs)


def _bring_back(home: torch.device, bank: nn.Module, inputs: tuple[Tensor, ...], answer: Tensor) -> Tensor:
    return answer.to(home)


def move_weight(weight: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A weight in another place and form, with as few bytes between the two as can be: narrowed here, widened there."""
    if dtype.itemsize <= weight.dtype.itemsize:
        return weight.to(dtype).to(device)
    return weight.to(device).to(dtype)
