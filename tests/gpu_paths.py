"""What the tests of the CUDA kernels share: Triton's interpreter on the CPU, and a real card."""

from importlib.util import find_spec

import pytest
import torch

from lmx.core.gpu.launch import interpreted

_HAS_TRITON = find_spec("triton") is not None

needs_triton = pytest.mark.skipif(not _HAS_TRITON, reason="Triton is not installed: pip install 'lmx[gpu]'")
needs_interpreter = pytest.mark.skipif(
    not interpreted(), reason="Triton's interpreter is off: set TRITON_INTERPRET=1 before Triton is imported"
)
needs_card = pytest.mark.skipif(
    interpreted() or not torch.cuda.is_available(), reason="no CUDA device, or TRITON_INTERPRET=1 keeps Triton off it"
)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative_error(got, expected):
    return ((got.double().cpu() - expected.double().cpu()).norm() / expected.double().norm().cpu()).item()


def tolerance(dtype, device):
    """Of a relative error; the interpreter cuts a bfloat16's digits off instead of rounding."""
    if dtype == torch.float32:
        return 2e-6
    return 3e-3 if device.type == "cuda" else 6e-3
