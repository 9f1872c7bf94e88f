"""Processes whose time and memory are measured, children of their own included."""

import json
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


# A process begins with the peak of the one that it was forked from, here that of all tests: so a small one starts it.
_START = """if True:
    import json, os, sys
    report, *command = sys.argv[1:]
    _, status, used = os.wait4(os.posix_spawn(command[0], command, os.environ), 0)
    with open(report, "w") as file:
        json.dump([os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime, used.ru_maxrss], file)
"""


def measure(*command: str, cwd: Path | None = None) -> Ran:
    """Run COMMAND, with nothing on stdin."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        starter = [sys.executable, "-I", "-S", "-c", _START, str(report)]
        ran = subprocess.run(
            [*starter, *command], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True, cwd=cwd
        )
        code, seconds, peak = json.loads(report.read_text())
    return Ran(code, ran.stdout, ran.stderr, seconds, peak * RSS_UNIT)


def run_measured(*args: str, cwd: Path | None = None) -> Ran:
    """Run `lmx ARGS`."""
    return measure(sys.executable, "-m", "lmx", *args, cwd=cwd)
