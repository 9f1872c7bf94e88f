import contextlib
import io
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
from small_checkpoint import write_checkpoint


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


Lmx = Callable[..., Ran]


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny-mixtral")


@pytest.fixture(scope="session")
def lmx() -> Lmx:
    """Run `lmx ARGS` in this process, which has torch already, and return the code and both streams."""
    from lmx.cli.main import app
    from lmx.cli.run import run

    def call(*args: object, stdin: str = "", terminal: bool = False) -> Ran:
        out, err = Screen() if terminal else io.StringIO(), io.StringIO()
        given = io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding="utf-8")
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), mock.patch.object(sys, "stdin", given):
            code = run(app, [str(arg) for arg in args])
        return Ran(code, out.getvalue(), err.getvalue())

    return call
