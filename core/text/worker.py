"""The child process that meets a checkpoint's tokenizer files: limited, torch-free, one JSON line for each call.

A request is `{"id", "call", "seconds", "arguments"}`; the answer is `{"id", "value"}`, `{"id", "error": {"message",
"hint", "refusal"}}`, or `{"id", "bug"}` with a traceback. A call that takes longer than its seconds ends the process
by SIGALRM, even if the parent is gone.
"""

import contextlib
import json
import resource
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from lmx.core.errors import InputError, LmxError
from lmx.core.text.tokenizer import Tokenizer
from lmx.core.text.types import TemplateError

MEMORY_LIMIT = 4 << 30  # address space; the largest published vocabularies need a part of it
_DISTRUST = "The checkpoint's tokenizer files ask for more than any real model's; do not trust them."

Answer = dict[str, object]


class Worker:
    """Answers requests about one folder's tokenizer."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tokenizer: Tokenizer | None = None

    def answer(self, request: dict[str, object]) -> Answer:
        """Do what `request` asks for; errors become part of the answer."""
        try:
            return {"id": request["id"], "value": self._value(str(request["call"]), request["arguments"])}
        except LmxError as error:
            return {"id": request["id"], "error": _describe(error)}
        except MemoryError:
            full = InputError(f"{self._folder}: the tokenizer reached its memory limit", _DISTRUST)
            return {"id": request["id"], "error": _describe(full)}
        except Exception:
            return {"id": request["id"], "bug": traceback.format_exc()[-4000:]}

    def _value(self, call: str, arguments: object) -> object:
        if self._tokenizer is None:
            self._tokenizer = Tokenizer.load(self._folder)
        return _CALLS[call](self._tokenizer, *_list(arguments))


def main(folder: str) -> None:
    """Serve requests from file descriptor 0, a socket, until its other end closes."""
    _limit_itself()
    worker = Worker(Path(folder))
    with open(0, "rb", closefd=False) as requests, open(0, "wb", closefd=False) as answers:
        _serve(worker, requests, answers)


def _serve(worker: Worker, requests: BinaryIO, answers: BinaryIO) -> None:
    for line in requests:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, request["seconds"])
        line = json.dumps(worker.answer(request)).encode()
        signal.setitimer(signal.ITIMER_REAL, 0)
        try:
            answers.write(line + b"\n")
            answers.flush()
        except BrokenPipeError:
            return


def _limit_itself() -> None:
    # The terminal's Ctrl-C is for the parent
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    limits = ((resource.RLIMIT_AS, MEMORY_LIMIT), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0))
    for kind, limit in limits:
        # macOS refuses a limit of the address space
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(kind, (limit, limit))


def _describe(error: LmxError) -> dict[str, object]:
    refusal = error.refusal if isinstance(error, TemplateError) else None
    return {"kind": type(error).__name__, "message": error.message, "hint": error.hint, "refusal": refusal}


def _facts(tokenizer: Tokenizer, chat: bool) -> dict[str, object]:
    if chat:
        with contextlib.suppress(InputError):  # the first conversation says it
            tokenizer.prepare_chat()
    facts = vars(tokenizer.facts)
    return {key: list(value) if isinstance(value, frozenset | tuple) else value for key, value in facts.items()}


def _list(value: object) -> list[object]:
    if not isinstance(value, list):
        raise TypeError(f"arguments are a list, not {type(value).__name__}")
    return value


_CALLS: dict[str, Callable[..., object]] = {
    "facts": _facts,
    "prepare_chat": Tokenizer.prepare_chat,
    "end_of_turn_id": Tokenizer.end_of_turn_id,
    "encode": Tokenizer.encode,
    "encode_chat": lambda *arguments: vars(Tokenizer.encode_chat(*arguments)),
    "decode": Tokenizer.decode,
    "token_to_id": Tokenizer.token_to_id,
}
