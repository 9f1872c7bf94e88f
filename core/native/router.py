"""The router's choice of experts in one call."""

import ctypes
from functools import cache

import torch
from torch import Tensor

from lmx.core.native.library import library
from lmx.core.native.operation import DTYPE_CODES
from lmx.core.native.tape import call

# The p-norms that the kernel knows, by what it calls them.
_NORMS = {None: 0, 1.0: 1, 2.0: 2}


def can_route(router_logits: Tensor, normalize: float | None) -> bool:
    """Whether the kernel serves these logits [tokens, experts]: on the CPU, nothing recorded, a norm it knows."""
    return (
        router_logits.is_cpu
        and router_logits.dtype in (torch.float32, torch.bfloat16)
        and normalize in _NORMS
        and not (torch.is_grad_enabled() and router_logits.requires_grad)
        and not torch.compiler.is_compiling()
        and library() is not None
    )


def route_natively(router_logits: Tensor, top_k: int, normalize: float | None) -> tuple[Tensor, Tensor]:
    """What `lmx.core.layers.moe.route` says, for logits that `can_route`; ties fall as in torch.topk."""
    logits = router_logits.contiguous()
    tokens, experts = logits.shape
    ids = torch.empty(tokens, top_k, dtype=torch.int64)
    weights = torch.empty(tokens, top_k)
    given = logits.data_ptr(), DTYPE_CODES[logits.dtype], tokens, experts, top_k, _NORMS[normalize]
    call(_function(), *given, ids.data_ptr(), weights.data_ptr())
    return ids, weights


@cache
def _function() -> "ctypes._NamedFuncPointer":
    found = library()
    if found is None:
        raise RuntimeError("the kernels are not there: ask library() first")
    pointer, number, long = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    found.lmx_route.argtypes = [pointer, number, long, long, long, number, pointer, pointer]
    found.lmx_route.restype = None
    return found.lmx_route
