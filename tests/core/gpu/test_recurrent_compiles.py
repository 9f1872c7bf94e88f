"""Every kernel of the recurrent layers, in the ways in which the published models call it, for the cards of today."""

import pytest
from gpu_compile import Kernel, compile_kernels
from gpu_paths import needs_triton

from lmx.core.gpu.launch import interpreted

BF16, F32, I64, BOOL = "*bf16", "*fp32", "*i64", "*i1"
SCAN = {
    **dict.fromkeys(("raw", "bias", "x", "gate", "D", "y"), BF16),
    **dict.fromkeys(("A", "state", "new_state"), F32),
}
LRU = {
    **dict.fromkeys(("x", "input_gate", "recurrent_gate", "gate", "y"), BF16),
    **dict.fromkeys(("input_weight", "input_bias", "recurrent_weight", "recurrent_bias"), BF16),
    **dict.fromkeys(("rate", "state", "new_state"), F32),
    "reset": BOOL,
}
CONV = dict.fromkeys(("x", "weight", "bias", "state", "new_state", "y"), BF16)
ALL_ROWS = {"HAS_LENGTHS": False, "lengths": None}
TAPS = {"KERNEL": 4, "REACH": 4, "HAS_BIAS": True}
TILE = {"STATES": 16, "CHANNELS": 16, "STEPS": 8}


KERNELS = [
    Kernel("scan", "_scan", {**SCAN, "B": F32, "C": F32}, {**TILE, **ALL_ROWS}, warps=1),
    Kernel("scan", "_scan", {**SCAN, "B": F32, "C": F32, "lengths": I64}, {**TILE, "HAS_LENGTHS": True}, warps=1),
    Kernel("scan", "_step", {**SCAN, "B": BF16, "C": BF16}, {"STATES": 16, "CHANNELS": 32}),
    Kernel("norm", "_normalise_parts", {"x": BF16, "y": BF16, "eps": "fp32"}, {"BLOCK": 512}),
    Kernel("rg_lru", "_recur", LRU, {"HAS_GATE": True, "STEPS": 64, "CHANNELS": 16, **ALL_ROWS}),
    Kernel(
        *("rg_lru", "_recur", {**LRU, "lengths": I64}),
        {"HAS_GATE": False, "gate": None, "HAS_LENGTHS": True, "STEPS": 1, "CHANNELS": 128},
    ),
    Kernel("rg_lru", "_step_with_gates", LRU, {"HAS_GATE": True, "COLUMNS": 32, "INPUTS": 64}),
    Kernel("conv", "_convolve", CONV, {**TAPS, "SILU": True, "STEPS": 1, "CHANNELS": 128, **ALL_ROWS}),
    Kernel(
        *("conv", "_convolve", {**CONV, "lengths": I64}),
        {**TAPS, "SILU": False, "STEPS": 32, "CHANNELS": 64, "HAS_LENGTHS": True},
    ),
]


@needs_triton
@pytest.mark.skipif(interpreted(), reason="the process that started this one compiles them")
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_without_a_card_and_keep_to_registers(capability, tmp_path):
    for made in compile_kernels(KERNELS, capability, tmp_path):
        assert made["bytes"] > 0
        assert made["stack"] == 0
