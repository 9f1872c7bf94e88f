"""The trained checkpoints of ../shared lose the same with the CPU's kernels as with plain torch."""

import json
import os
import subprocess
import sys

import pytest
from kernel_losses import DTYPES, losses
from support import ROOT, needs_kernels, needs_shared

from lmx.core.registry import MODEL_TYPES

pytestmark = [needs_shared, needs_kernels]


@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_losses_are_those_of_torch(every):
    """To 1e-3 nats a token in bfloat16, where rounding shows, and far closer in float32."""
    child = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "kernel_losses.py"), str(every)],
        stdout=subprocess.PIPE,
        env={**os.environ, "LMX_KERNELS": "torch"},
        text=True,
    )
    by_kernels = losses(every)
    by_torch = json.loads(child.communicate()[0])
    assert len(by_kernels) == 4 * len(MODEL_TYPES) * len(DTYPES)
    assert by_kernels.keys() == by_torch.keys()
    away = {name: abs(loss - by_torch[name]) for name, loss in by_kernels.items()}
    assert max(away.values()) < 1e-3, away
    assert max(far for name, far in away.items() if "float32" in name) < 1e-6, away
    assert any(away.values())  # or both were the same code
