import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from lmx.cli.run import Terminated, outcome_of, run
from lmx.core import errors

OUTCOMES = [
    (errors.UsageError("m", "h"), 2),
    (errors.InputError("m", "h"), 3),
    (errors.NotFoundError("m", "h"), 4),
    (errors.NetworkError("m", "h"), 5),
    (errors.ResourceError("m", "h"), 6),
    (errors.ConflictError("m", "h"), 7),
    (typer.BadParameter("m"), 2),
    (KeyboardInterrupt(), 130),
    (BrokenPipeError(), 141),
    (Terminated(), 143),
    (MemoryError(), 6),
    (torch.OutOfMemoryError("CUDA out of memory"), 6),
    (OSError(errno.ENOSPC, "No space left on device"), 6),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), 6),
    (ValueError("oops"), 1),
    (OSError(errno.EIO, "Input/output error"), 1),
]


@pytest.mark.parametrize(("error", "code"), OUTCOMES, ids=lambda value: repr(value)[:40])
def test_exit_codes(error: BaseException, code: int) -> None:
    assert outcome_of(error).code == code


def test_torchs_own_failure_to_allocate_is_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 46)
    assert outcome_of(caught.value).code == 6


def _raising(error: BaseException) -> typer.Typer:
    app = typer.Typer()

    @app.command()
    def go(debug: bool = False) -> None:
        raise error

    return app


def test_an_error_is_two_lines_and_a_traceback_only_with_debug(capsys: pytest.CaptureFixture[str]) -> None:
    app = _raising(errors.InputError("the file 'x'\nis \x1b[31mbroken", "mend it"))
    assert run(app, []) == 3
    assert capsys.readouterr().err == "lmx: error: the file 'x' is ␛[31mbroken\nlmx: hint: mend it\n"
    assert run(app, ["--debug"]) == 3
    assert "Traceback" in capsys.readouterr().err


def test_a_bug_is_one_line_and_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(_raising(ZeroDivisionError("division by zero")), []) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first == "lmx: error: ZeroDivisionError: division by zero"
    assert "--debug" in second


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    run(_raising(KeyboardInterrupt()), [])
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_help_version_and_unknown_commands(lmx: Any) -> None:
    import lmx as package

    assert lmx("--version").out == f"lmx {package.__version__}\n"
    assert lmx().out == lmx("--help").out != ""
    for command in ("chat", "generate", "show"):
        ran = lmx(command, "--help")
        assert ran.code == 0
        assert f"Example: lmx {command}" in ran.out
        assert "--debug" in ran.out
        assert "--quiet" in ran.out
        assert "--json" in ran.out
    ran = lmx("dance")
    assert ran.code == 2
    assert "dance" in ran.err.splitlines()[0]


@contextmanager
def _started(*args: str) -> Iterator["subprocess.Popen[bytes]"]:
    process = subprocess.Popen(
        [sys.executable, "-m", "lmx", *args], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def endless(checkpoint: Path) -> tuple[str, ...]:
    return ("generate", str(checkpoint), "--prompt-ids", "7,7", "-n", "2000", "--dtype", "fp32")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_quietly(endless: tuple[str, ...], number: signal.Signals, code: int) -> None:
    with _started(*endless) as process:
        assert process.stdout is not None
        assert process.stdout.read(1)
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
        assert (process.returncode, err) == (code, b"")


def test_a_closed_pipe_ends_a_run_quietly_and_a_pipe_gets_no_colour(checkpoint: Path) -> None:
    turns = " ".join(["-p Hello"] * 20)
    script = f"{sys.executable} -m lmx chat {checkpoint} {turns} -n 8 | head -n 1; echo ${{PIPESTATUS[0]}}"
    ran = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, env={**os.environ, "FORCE_COLOR": "1"}, timeout=60
    )
    *answer, code = ran.stdout.splitlines()
    assert (code, ran.stderr) == ("141", "")
    assert answer
    assert "\x1b" not in ran.stdout


LEAVE = """
import atexit, sys, threading, time
from lmx.cli.run import leave
atexit.register(lambda: print("registered", end=" "))
if {threads}:
    threading.Thread(target=lambda: (time.sleep(0.2), print("worked", end=" "))).start()
print("said", end=" ")
leave(7)
"""


@pytest.mark.parametrize(("threads", "words"), [(False, "said registered "), (True, "said worked registered ")])
def test_leaving_forgets_nothing(threads: bool, words: str) -> None:
    ran = subprocess.run([sys.executable, "-c", LEAVE.format(threads=threads)], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout, ran.stderr) == (7, words, "")
