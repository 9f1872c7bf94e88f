"""The router's choice of experts in one call."""

import torch
from torch import Tensor

from lmx.core.native.compiled import INT, LONG, POINTER, c_function
from lmx.core.native.norm import serves
from lmx.core.native.operation import DTYPE_CODES
from lmx.core.native.tape import call

# The p-norms that the kernel knows, by what it calls them.
NORM_CODES = {None: 0, 1.0: 1, 2.0: 2}
_route = c_function("lmx_route", POINTER, INT, LONG, LONG, LONG, INT, POINTER, POINTER)


def can_route(router_logits: Tensor, normalize: float | None) -> bool:
    """Whether the kernel serves these logits [tokens, experts]: on the CPU, nothing recorded, a norm it knows."""
    return normalize in NORM_CODES and serves(router_logits)


def route_natively(router_logits: Tensor, top_k: int, normalize: float | None) -> tuple[Tensor, Tensor]:
    """What `lmx.core.layers.moe.route` says, for logits that `can_route`; ties fall as in torch.topk."""
    logits = router_logits.contiguous()
    tokens, experts = logits.shape
    ids = torch.empty(tokens, top_k, dtype=torch.int64)
    weights = torch.empty(tokens, top_k)
    given = logits.data_ptr(), DTYPE_CODES[logits.dtype], tokens, experts, top_k, NORM_CODES[normalize]
    call(_route(), *given, ids.data_ptr(), weights.data_ptr())
    return ids, weights
