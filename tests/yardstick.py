"""llama.cpp as a yardstick, in a process of its own: LMX_LLAMA_PYTHON names a Python that can import llama_cpp."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

_CHILD = Path(__file__).parent / "parity" / "llama_child.py"
_PYTHON = os.environ.get("LMX_LLAMA_PYTHON") or (sys.executable if importlib.util.find_spec("llama_cpp") else None)

needs_llama_cpp = pytest.mark.skipif(
    _PYTHON is None, reason="llama_cpp (llama-cpp-python) is not here; LMX_LLAMA_PYTHON can name a Python that has it"
)


def ask_llama_cpp(task: str, **arguments: object) -> Any:
    """Have llama.cpp do a task of `parity/llama_child.py`."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    run = subprocess.run(
        [str(_PYTHON), str(_CHILD)],
        input=json.dumps({task: arguments}),
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)
