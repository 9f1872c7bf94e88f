"""The memory of this process, and what it can still take. Imports no torch."""

import os
import resource
import sys
from pathlib import Path


def peak_memory_bytes() -> int:
    """The largest resident set of this process so far, mapped pages included."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss begins with the peak of the process that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak_memory() -> bool:
    """Let `peak_memory_bytes` count from now on; whether this system can (Linux: proc(5), clear_refs)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def resident_memory_bytes() -> int:
    """The resident set of this process now; where the system does not tell it simply, the largest so far."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return peak_memory_bytes()


def available_memory_bytes() -> int | None:
    """What this process can still take without swapping: of the machine, or of its control group; None if unknown."""
    free = _meminfo_available() or _physical_bytes()
    group = _group_available()
    return min(free, group) if free is not None and group is not None else free


def _meminfo_available() -> int | None:
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    found = (line.split() for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:"))
    return next((int(words[1]) * 1024 for words in found), None)


def _physical_bytes() -> int | None:
    """All memory of a system that does not say how much of it is free."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None


def _group_available(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What a container may still take (control groups, version 2); pages of files that can be dropped do not count."""
    try:
        limit, used = (root / "memory.max").read_text().strip(), int((root / "memory.current").read_text())
        stat = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return None if limit == "max" else max(0, int(limit) - used + int(stat.get("inactive_file", 0)))
