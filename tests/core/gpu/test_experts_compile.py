"""Every kernel of the banks of experts, as banks of published sizes call it, for the cards of today: no card needed."""

from importlib.util import find_spec

import pytest
from gpu_compile import compile_in_a_child

from lmx.core.gpu.launch import interpreted

# What a block may take on a card of compute capability 8.6, 8.9 or 12.0; 8.0 and 9.0 have more.
SHARED_MEMORY = 99 * 1024


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed: pip install 'lmx[gpu]'")
@pytest.mark.skipif(interpreted(), reason="under the interpreter nothing compiles")
def test_kernels_compile_and_fit(tmp_path):
    kernels = compile_in_a_child("compile_experts.py", tmp_path)
    assert len({(made["name"], made["form"]) for made in kernels}) == 17
    for made in kernels:
        assert made["bytes"] > 0
        assert made["shared"] <= SHARED_MEMORY, made
        assert made["stack"] == 0, made  # nothing spilled
