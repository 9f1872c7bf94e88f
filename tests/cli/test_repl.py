"""What a terminal cannot show in time: Ctrl-C pressed twice, while the model reads a prompt."""

from collections.abc import Generator
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import pytest

from lmx.cli.repl import Repl
from lmx.core.answer import Event, Finished, Token
from lmx.core.session import Message


class Session:
    """Answers the second message; the first is interrupted inside the model."""

    system_merged, context_used, context_length, left_out, is_nearly_full = False, 3, None, 0, False
    waiting: ClassVar[list[Message]] = []
    save_error = None

    def __init__(self) -> None:
        self.asked: list[str] = []

    def ask(self, text: str, cancel: object) -> Generator[Event, None, None]:
        self.asked.append(text)
        if len(self.asked) == 1:
            raise KeyboardInterrupt
        yield Token(5, "Yes", -0.1)
        yield Finished("stop", (5,), (-0.1,), "Yes", "", 2, 2, 0.1, 0.1)


def test_a_second_ctrl_c_keeps_the_chat(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(["first", "second"])

    class Reader:
        def read(self, offered: str = "") -> str:
            try:
                return next(lines)
            except StopIteration:
                raise EOFError from None

    monkeypatch.setattr("lmx.cli.repl.open_reader", lambda **_: Reader())
    session = Session()
    Repl(cast(Any, SimpleNamespace()), cast(Any, session), plain=True, quiet=True).run()
    assert session.asked == ["first", "second"]
    shown = capsys.readouterr().out
    assert "as it was before your message" in shown
    assert shown.endswith("Yes\n")
