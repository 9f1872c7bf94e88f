"""The one place where errors end: what a command raises becomes one line, a hint and an exit code (docs/cli.md)."""

import atexit
import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import NoReturn

import typer
from typer.exceptions import TyperException

from lmx.cli.console import accept_any_text, note
from lmx.core.errors import LmxError, ResourceError

INTERRUPTED, CLOSED_PIPE, TERMINATED = 130, 141, 143
_EXHAUSTED = (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM)
_REPORT = "this is a bug in lmx: run it again with --debug and report what it prints"


class Terminated(BaseException):
    """SIGTERM came: unwind, so that nothing is left half done."""


@dataclass(frozen=True)
class Outcome:
    """How a process ends: its exit code, and for stderr what is wrong and what to do, if there is anything to say."""

    code: int
    message: str | None = None
    hint: str | None = None


def run(app: typer.Typer, arguments: Sequence[str]) -> int:
    """Run the command line and return the exit code; errors are told on stderr, tracebacks only with `--debug`."""
    accept_any_text()
    try:
        with _sigterm_raises():
            code = _invoke(app, arguments)
            sys.stdout.flush()
            return code
    except BaseException as error:
        outcome = outcome_of(error)
        if outcome.code == CLOSED_PIPE:
            _drop_output()
        _tell(outcome, error if "--debug" in arguments else None)
        return outcome.code


def leave(code: int) -> NoReturn:
    """End the process with this code, without taking the interpreter apart: torch's modules alone take 0.4 seconds.

    What was registered for the end runs. Where threads still work, the interpreter waits for them and ends as usual.
    """
    if any(not thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread()):
        sys.exit(code)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        # Closed, or nobody reads on: `run` has said what there was to say.
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _invoke(app: typer.Typer, arguments: Sequence[str]) -> int:
    """Typer's own main loop would catch and print; its command is called directly instead."""
    command = typer.main.get_command(app)
    try:
        with command.make_context("lmx", list(arguments)) as context:
            command.invoke(context)
    except typer.Exit as leave:
        return leave.exit_code
    return 0


def outcome_of(error: BaseException) -> Outcome:
    """The exit code and the words for what a command raised."""
    if isinstance(error, LmxError):
        return Outcome(error.exit_code, error.message, error.hint)
    if isinstance(error, TyperException):
        return Outcome(error.exit_code, error.format_message().replace("Value error, ", ""), _usage_hint(error))
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return Outcome(INTERRUPTED)
    if isinstance(error, Terminated):
        return Outcome(TERMINATED)
    if isinstance(error, BrokenPipeError):
        return Outcome(CLOSED_PIPE)
    if _is_exhausted(error):
        what = "disk" if isinstance(error, OSError) and error.errno != errno.ENOMEM else "memory"
        return Outcome(ResourceError.exit_code, f"out of {what}: {error or 'no more could be had'}", _MAKE_ROOM[what])
    return Outcome(LmxError.exit_code, f"{type(error).__name__}: {error}", _REPORT)


_MAKE_ROOM = {
    "disk": "free some space, or choose another disk",
    "memory": "close other programs, or use a smaller model or a shorter context",
}


def _is_exhausted(error: BaseException) -> bool:
    """Memory or disk ran out. torch has an error class for its devices, and on the CPU a RuntimeError by its text."""
    if isinstance(error, OSError):
        return error.errno in _EXHAUSTED
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "you tried to allocate" in str(error)


def _usage_hint(error: TyperException) -> str:
    context = error.__dict__.get("ctx")
    command = context.command_path if context is not None else "lmx"
    return f"see {command} --help"


def _tell(outcome: Outcome, debugged: BaseException | None) -> None:
    # stderr itself may be the closed pipe: then there is nobody to tell
    with suppress(BrokenPipeError):
        if debugged is not None:
            traceback.print_exception(debugged)
        if outcome.message is not None:
            note(f"lmx: error: {outcome.message}")
        if outcome.hint is not None:
            note(f"lmx: hint: {outcome.hint}")


def _drop_output() -> None:
    """Nobody reads on: let the interpreter's last flush go nowhere instead of failing."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    def stop(_number: int, _frame: FrameType | None) -> NoReturn:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
