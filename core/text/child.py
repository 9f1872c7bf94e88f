"""One child process that serves a folder's tokenizer, and the line to it."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import weakref
from pathlib import Path

from lmx.core.errors import InputError, LmxError
from lmx.core.text.types import TemplateError

_GRACE_SECONDS = 0.5  # the child's own timer is for when its parent is gone; it fires this much later
_MAX_ANSWER_BYTES = 256 << 20
_STDERR_KEPT = 2000
_NO_SIGPIPE = getattr(socket, "MSG_NOSIGNAL", 0)  # a dead child is an error here, no signal for the program
_BOOTSTRAP = (
    "import json, sys; first, last = json.loads(sys.argv[1]); sys.path[:0] = [first]; sys.path += last;"
    "from lmx.core.text.worker import main; main(sys.argv[2])"
)
# What the child may see of the environment: no tokens, no paths to import from
SAFE_ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT")
# One thread: the address space is limited, and each thread reserves its share of it
_SINGLE_THREADED = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}


class ChildError(Exception):
    """The child is dead: it took too long, crashed, or broke the protocol."""


class Child:
    """A started worker. One request is answered at a time; a failure in between kills it, so that no answer is late.

    The line is a pair of sockets rather than pipes: they know deadlines, and writing to a dead child raises no SIGPIPE.
    """

    def __init__(self, folder: Path) -> None:
        """Start the worker for `folder` without waiting for it."""
        self.ready = False
        self._line, theirs = socket.socketpair()
        self._errors, errors = os.pipe()
        # Nobody reads what the child writes there until it has died: past the pipe's size it is dropped
        os.set_blocking(self._errors, False)
        os.set_blocking(errors, False)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-c", _BOOTSTRAP, json.dumps(_import_roots()), str(folder)],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=errors,
                cwd="/",
                env={**{key: os.environ[key] for key in SAFE_ENVIRONMENT if key in os.environ}, **_SINGLE_THREADED},
                process_group=0,
            )
        finally:
            theirs.close()
            os.close(errors)
        self._end = weakref.finalize(self, _end, self._process, self._line, self._errors)
        self._buffer = bytearray()
        self._number = 0
        self._deadline = 0.0

    @property
    def dead(self) -> bool:
        """Whether the process was ended or lost."""
        return not self._end.alive

    def send(self, call: str, arguments: list[object], seconds: float) -> None:
        """Ask for `call`; the answer is due in `seconds`. Raises `ChildError`."""
        self._number += 1
        self._deadline = time.monotonic() + seconds
        request = {"id": self._number, "call": call, "seconds": seconds + _GRACE_SECONDS, "arguments": arguments}
        self._line.settimeout(seconds)
        try:
            self._line.sendall(json.dumps(request).encode() + b"\n", _NO_SIGPIPE)
        except OSError as error:
            raise self._lost() from error
        except BaseException:
            self.kill()  # half a request may have gone out
            raise

    def receive(self) -> object:
        """The value of the last request's answer. Raises the worker's error, or `ChildError`."""
        try:
            answer = self._answer(json.loads(self._read_line()))
        except (OSError, ValueError, RecursionError) as error:
            raise self._lost() from error
        except BaseException:
            self.kill()  # the answer will come when nobody waits for it
            raise
        if isinstance(fault := answer.get("error"), dict):
            raise _error(fault)
        if "bug" in answer:
            raise RuntimeError(f"the text process failed:\n{answer['bug']}")
        return answer.get("value")

    def kill(self) -> None:
        """End the process; safe to call twice."""
        self._end()

    def _answer(self, answer: object) -> dict[str, object]:
        if not isinstance(answer, dict) or answer.get("id") != self._number:
            raise ValueError("an answer to nothing that was asked")
        return answer

    def _read_line(self) -> bytes:
        buffer = self._buffer
        while not buffer.endswith(b"\n"):
            # After the deadline, an answer that lies ready still counts: the caller may have come late
            self._line.settimeout(max(self._deadline - time.monotonic(), 0.001))
            chunk = self._line.recv(1 << 16)
            if not chunk:
                raise ConnectionResetError("the child has closed its end")
            buffer += chunk
            if len(buffer) > _MAX_ANSWER_BYTES:
                raise ValueError("an endless answer")
        line = bytes(buffer)
        buffer.clear()
        return line

    def _lost(self) -> ChildError:
        late = time.monotonic() >= self._deadline
        if not late:
            # It closed its end on its own: let it die of what it was dying of
            self._wait()
        stderr = _read_errors(self._errors)
        self.kill()
        status = self._process.returncode
        if late or status == -signal.SIGALRM:
            error = ChildError("the tokenizer or the chat template took too long, and was stopped")
        else:
            how = signal.Signals(-status).name if status < 0 else f"exit code {status}"
            error = ChildError(f"the process of the tokenizer and the chat template died ({how})")
        if stderr:
            error.add_note(stderr)
        return error

    def _wait(self) -> None:
        try:
            self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            return


def _end(process: subprocess.Popen[bytes], line: socket.socket, errors: int) -> None:
    line.close()
    process.kill()
    process.wait()
    os.close(errors)


def _read_errors(descriptor: int) -> str:
    try:
        return os.read(descriptor, 1 << 16).decode(errors="replace")[-_STDERR_KEPT:]
    except BlockingIOError:
        return ""


def _error(fault: dict[str, object]) -> LmxError:
    message, hint, refusal = str(fault["message"]), str(fault["hint"]), fault["refusal"]
    if fault["kind"] == "TemplateError":
        return TemplateError(message, hint, None if refusal is None else str(refusal))
    return InputError(message, hint)


def _import_roots() -> tuple[str, list[str]]:
    """Where the child finds lmx (installed, editable or a checkout), and, last, the libraries that it imports.

    It runs isolated (`-I`): no PYTHONPATH, no user packages, nothing of the current folder.
    """
    return import_root("lmx"), [import_root(name) for name in ("tokenizers", "jinja2", "markupsafe")]


def import_root(package: str) -> str:
    """The folder that a child must have on its path to import `package`. Raises InputError where there is none."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise InputError(f"the Python package {package} is missing", "Install lmx again: `pip install lmx`.")
    return str(Path(spec.origin).resolve().parent.parent)
