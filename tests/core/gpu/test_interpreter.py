"""The tests of this folder under Triton's interpreter, in a child: it must be chosen before Triton is imported."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from support import ROOT

from lmx.core.gpu.launch import interpreted


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed: pip install 'lmx[gpu]'")
@pytest.mark.skipif(interpreted(), reason="this is the child")
def test_all_of_this_folder_under_the_interpreter():
    options = ("-q", "-x", "-p", "no:cacheprovider", "-m", "not slow and not cuda")
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""},
    )
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
    assert " passed" in ran.stdout
