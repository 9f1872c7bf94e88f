"""The benchmarks whose limits are promises run, and keep them."""

import subprocess
import sys

import pytest
from support import ROOT


@pytest.mark.slow
def test_recurrences_keep_their_limits() -> None:
    """A share of the layer's time and a peak of memory, for both recurrent families at their published widths.

    One thread: with more, other work on the cores makes the many short calls of a recurrence wait for each other.
    """
    command = [sys.executable, str(ROOT / "benchmarks" / "scan.py"), "--threads", "1", "--repetitions", "3"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ran.stdout.count("-> kept") == 6, ran.stdout
    assert "BROKEN" not in ran.stdout, ran.stdout
