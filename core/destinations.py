"""Putting a planned model together: where each weight goes while it is loaded, and how its stream then travels."""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from lmx.core.model import LanguageModel
from lmx.core.placement import (
    EMBEDDING,
    HOST,
    Budget,
    Placement,
    Share,
    bank_paths,
    layer_of,
    measure_parts,
    plan_placement,
    state_bytes,
)


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
        index = layer_of(name)
        if index is None:
            return self.placement.embed if name.startswith(EMBEDDING) else self.placement.head
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
        if len(placement.devices) == 1 and _is_current(placement.head):
            return
        model.decoder.placement = placement
        for index, path in self._banks.items():
            if placement.banks[index] != placement.layers[index]:
                _visit(model.get_submodule(path), placement.banks[index], placement.layers[index])


def _is_current(device: torch.device) -> bool:
    """Whether kernels go to this device without being told."""
    return device.type != "cuda" or device.index in (None, torch.cuda.current_device())


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
