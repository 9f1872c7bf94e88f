"""The command line in a process whose time and memory are measured, children of its own included."""

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes


@dataclass(frozen=True)
class Ran:
    """seconds: of CPU, which other work on the machine does not change; peak_bytes: of the largest process."""

    code: int
    out: str
    err: str
    seconds: float
    peak_bytes: int


def run_measured(*args: str, cwd: Path | None = None) -> Ran:
    """Run `lmx ARGS`, with nothing on stdin."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = subprocess.Popen(
            [sys.executable, "-m", "lmx", *args], stdin=subprocess.DEVNULL, stdout=out, stderr=err, cwd=cwd
        )
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
    return Ran(child.returncode, *texts, used.ru_utime + used.ru_stime, used.ru_maxrss * RSS_UNIT)
