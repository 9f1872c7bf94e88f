"""The smallest kernel: it shows that Triton can compile and launch on a device."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError


@triton.jit
def _store_one(out):
    tl.store(out, 1)


def launch(device: torch.device) -> Tensor:
    """Launch it. Raises RuntimeError where Triton's compiler fails, and what its launcher raises where that does."""
    out = torch.empty(1, dtype=torch.int32, device=device)
    try:
        with torch.cuda.device(device):
            _store_one[(1,)](out)
    except TritonError as error:
        raise RuntimeError(str(error)) from error
    return out
