"""A bank of experts in plain torch that needs nothing of the host, to capture the families that have one."""

import torch
from torch import Tensor

from lmx.core.layers.activation import ACTIVATIONS
from lmx.core.layers.moe import Bank, ExpertBank
from lmx.core.model import LanguageModel


class DeviceBank(Bank):
    """Gathers the matrices of the chosen experts: a copy of them each step, which is no way to run a large model."""

    def __init__(self, bank: ExpertBank) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[bank.activation]
        for name in ("gate", "up", "down"):
            self.register_buffer(name, torch.stack(list(getattr(bank, name))).detach())

    @property
    def capturable(self) -> bool:
        return True

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        tokens, top_k = ids.shape
        chosen = ids.flatten()
        inputs = x.repeat_interleave(top_k, 0)[:, :, None]  # [tokens * top_k, hidden, 1]
        gate, up = self.gate.index_select(0, chosen) @ inputs, self.up.index_select(0, chosen) @ inputs
        answers = self.down.index_select(0, chosen) @ (self.activation(gate) * up)  # [tokens * top_k, hidden, 1]
        return (answers.view(tokens, top_k, -1) * weights[..., None].to(x.dtype)).sum(1)


def with_device_banks(model: LanguageModel) -> LanguageModel:
    """Replace the banks of a model, if it has any."""
    for layer in model.decoder.layers:
        if hasattr(layer, "mlp") and isinstance(getattr(layer.mlp, "experts", None), ExpertBank):
            layer.mlp.experts = DeviceBank(layer.mlp.experts)
    return model
