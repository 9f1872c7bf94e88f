"""Every kernel between a step's products, in the ways in which the published models call it: no card needed."""

import pytest
from gpu_compile import compile_in_a_child
from gpu_paths import needs_triton

from lmx.core.gpu.launch import interpreted


@needs_triton
@pytest.mark.skipif(interpreted(), reason="under the interpreter nothing compiles")
def test_kernels_compile_and_keep_to_their_registers(tmp_path):
    kernels = compile_in_a_child("compile_stream.py", tmp_path)
    names = {made["name"].removeprefix("lmx.core.gpu.") for made in kernels}
    assert names == {"heads._keep_heads", "norm._rms_norm", "router._route"}
    for made in kernels:
        assert made["bytes"] > 0
        assert made["shared"] <= 48 * 1024, made
        assert made["stack"] == 0, made  # nothing spilled
