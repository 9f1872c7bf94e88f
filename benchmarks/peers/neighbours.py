"""What a virtual machine's neighbours take of its cores."""

import os
import time
from pathlib import Path


def stolen_seconds() -> float:
    """Seconds in which this machine's cores were given to others, all cores together; 0 where nobody says."""
    try:
        counts = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    except OSError:
        return 0.0
    return int(counts[8]) / os.sysconf("SC_CLK_TCK")  # cpu user nice system idle iowait irq softirq steal


class Stolen:
    """The share of the cores' time that others had since this was made."""

    def __init__(self) -> None:
        self._stolen, self._start = stolen_seconds(), time.perf_counter()

    def share(self) -> float:
        """From 0 to 1."""
        seconds = time.perf_counter() - self._start
        return (stolen_seconds() - self._stolen) / seconds / (os.cpu_count() or 1)
