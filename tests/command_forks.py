"""Runs command lines of `lmx`, each in a fork of this process, which has imported what they import.

A line of JSON on stdin, `[arguments, file for stdout, file for stderr]`, is answered with one on stdout: the exit code,
seconds of CPU, and what the largest process took, children of the fork included, in the units of `ru_maxrss`.
"""

import json
import os
import sys
from typing import NoReturn

import torch
from families import config_of

from lmx import conversion, verification
from lmx.cli.main import app
from lmx.cli.run import run
from lmx.core.loader import build

PRELOADED = (conversion, verification)

# What torch imports at the first model on the meta device takes seconds: here once, not in every child.
with torch.device("meta"):
    build(config_of("mixtral"))


def serve() -> None:
    """One command at a time, until stdin ends."""
    while line := sys.stdin.readline():
        arguments, *files = json.loads(line)
        child = os.fork()
        if not child:
            _be_the_command(arguments, files)
        _, status, used = os.wait4(child, 0)
        answer = [os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime, used.ru_maxrss]
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _be_the_command(arguments: list[str], files: list[str]) -> NoReturn:
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for stream, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
    code = 1
    try:
        code = run(app, arguments)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


if __name__ == "__main__":
    serve()
