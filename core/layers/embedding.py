"""The embedding of tokens, before its weights are known."""

import torch
from torch import nn


def empty_embedding(tokens: int, width: int, pad_id: int | None = None) -> nn.Embedding:
    """An embedding [tokens, width] whose weights are not set.

    `nn.Embedding(...)` would draw them at random, for which torch, on the meta device, imports its compiler: that takes
    a second, more than all else that loading computes.
    """
    return nn.Embedding.from_pretrained(torch.empty(tokens, width), freeze=False, padding_idx=pad_id)
