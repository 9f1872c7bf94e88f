"""What tests share: where the optional real data lies, and how to run the command line in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lmx.core.native.compiled import kernel_path

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"

needs_shared = pytest.mark.skipif(
    not (SHARED / "data" / "SOURCES.md").exists(),
    reason="the folder ../shared with real tokenizers, configs and trained checkpoints is not here",
)

needs_kernels = pytest.mark.skipif(
    kernel_path() == "torch",
    reason="the CPU kernels were not built here, or LMX_KERNELS=torch: a C++ compiler and a fresh install are needed",
)


def run_lmx(
    *args: str,
    stdin: str | None = None,
    timeout: float = 60,
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run `lmx ARGS` and return its exit code and both streams."""
    return subprocess.run(
        [sys.executable, "-m", "lmx", *args],
        input=stdin if stdin is not None else "",
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "PYTHONPATH": os.environ.get("PYTHONPATH", ""), **(env or {})},
        cwd=cwd,
    )
