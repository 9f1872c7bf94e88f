"""The gate activations that the five families' configs may name."""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

Activation = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Activation] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}

ACTIVATION_NAMES = tuple(ACTIVATIONS)
SILU_NAMES = tuple(name for name, activation in ACTIVATIONS.items() if activation is F.silu)
