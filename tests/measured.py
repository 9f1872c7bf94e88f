"""Processes whose time and memory are measured, children of their own included."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from support import ROOT

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


class Commands:
    """Runs `lmx ARGS`, with nothing on stdin, in forks of one process: nothing is imported anew for each."""

    def __init__(self) -> None:
        path = os.pathsep.join([str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH", "")])
        self._server = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "command_forks.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        with self._server:
            self._server.kill()

    def __call__(self, *args: object) -> Ran:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder) / "out", Path(folder) / "err"
            self._server.stdin.write(json.dumps([[str(arg) for arg in args], str(out), str(err)]) + "\n")
            self._server.stdin.flush()
            code, seconds, peak = json.loads(self._server.stdout.readline())
            return Ran(code, out.read_text(), err.read_text(), seconds, peak * RSS_UNIT)
