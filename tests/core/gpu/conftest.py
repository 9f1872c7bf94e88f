"""Where the tests of the CUDA kernels run."""

import pytest
import torch
from gpu_paths import needs_card, needs_interpreter, needs_triton


@pytest.fixture(
    params=[
        pytest.param("cpu", id="interpreter", marks=[needs_triton, needs_interpreter]),
        pytest.param("cuda", id="cuda", marks=[needs_triton, needs_card, pytest.mark.cuda]),
    ]
)
def device(request, monkeypatch):
    """Where the tensors of a test lie. The CPU's own kernels, which come first there, are out of the way."""
    monkeypatch.setattr("lmx.core.native.norm.library", lambda: None)
    return torch.device(request.param)
