"""How a kernel becomes a torch operation: one schema, one function on CPU tensors, one on shapes alone."""

from collections.abc import Callable
from typing import Any

import torch

F32, BF16, F16 = 0, 1, 2
# `Dtype` of lmx_native.h.
DTYPE_CODES = {torch.float32: F32, torch.bfloat16: BF16, torch.float16: F16}

_FRAGMENT = torch.library.Library("lmx", "FRAGMENT")


def define(schema: str, on_cpu: Callable[..., Any], on_shapes: Callable[..., Any]) -> Callable[..., Any]:
    """Register `torch.ops.lmx.NAME`, opaque to torch.compile; returns the overload to call.

    schema: "name(Tensor x, ...) -> Tensor", with `Tensor(a!)` for what is written to; on_shapes returns empty tensors
    of the right shapes and dtypes.
    """
    name = schema.partition("(")[0]
    _FRAGMENT.define(schema)
    _FRAGMENT.impl(name, on_cpu, "CPU")
    torch.library.register_fake(f"lmx::{name}", on_shapes, lib=_FRAGMENT)
    return getattr(torch.ops.lmx, name).default
