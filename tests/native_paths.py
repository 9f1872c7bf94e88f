"""What the tests of kernels share: every path of this CPU in turn, and numbers to feed them."""

import pytest
import torch
from support import needs_kernels as needs_kernels

from lmx.core.native.compiled import forced_path


@pytest.fixture(params=("amx", "avx512", "avx2", "neon", "portable"))
def path(request):
    with forced_path(request.param) as there:
        if not there:
            pytest.skip(f"this CPU has no {request.param}")
        yield request.param


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
