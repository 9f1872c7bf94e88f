"""Weights to begin training from."""

import torch
from torch import nn

from lmx.core.layers.moe import ExpertBank
from lmx.core.layers.norm import OffsetRMSNorm, RMSNorm


@torch.no_grad()
def initialise_normal(module: nn.Module, std: float) -> None:
    """Normal weights of that deviation for every matrix, zero biases; the embedding of padding is zero.

    Norms begin as the identity. It is what transformers calls `_init_weights` for decoder-only models.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            part.weight.normal_(0.0, std)
            if part.bias is not None:
                part.bias.zero_()
        elif isinstance(part, nn.Embedding):
            part.weight.normal_(0.0, std)
            if part.padding_idx is not None:
                part.weight[part.padding_idx].zero_()
        elif isinstance(part, RMSNorm | nn.LayerNorm):
            part.weight.fill_(1.0)
        elif isinstance(part, OffsetRMSNorm):
            part.weight.zero_()
        elif isinstance(part, ExpertBank):
            for weight in part.parameters():
                weight.normal_(0.0, std)
