"""The smallest kernel: it shows that Triton can compile and launch on a device."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _store_one(out):
    tl.store(out, 1)


def launch(device: torch.device) -> Tensor:
    """Launch it. Raises what Triton raises where it cannot."""
    out = torch.empty(1, dtype=torch.int32, device=device)
    with torch.cuda.device(device):
        _store_one[(1,)](out)
    return out
