"""A running `lmx chat` in a pseudo-terminal, and the screen that it draws."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pexpect
import pyte

COLUMNS, LINES = 120, 60
EDITING = r">[^\n]*\x1b\[\?25h"  # prompt_toolkit has drawn its prompt and shows the cursor


WHERE = r"\x1b\[6n"  # asks where the cursor is; without an answer, prompt_toolkit does not know the height


class Terminal:
    """Keys in, screen out. tells_cursor: whether it answers when it is asked where its cursor is."""

    def __init__(self, args: list[str], env: dict[str, str], *, tells_cursor: bool = False) -> None:
        cursor = {} if tells_cursor else {"PROMPT_TOOLKIT_NO_CPR": "1"}
        self.child = pexpect.spawn(
            sys.executable,
            ["-m", "lmx", "chat", *args],
            env={**os.environ, "TERM": "xterm-256color", **cursor, **env},
            encoding="utf-8",
            timeout=60,
            dimensions=(LINES, COLUMNS),
        )
        self.raw: list[str] = []
        self._screen = pyte.HistoryScreen(COLUMNS, LINES, history=10_000, ratio=1.0)
        self._stream = pyte.Stream(self._screen)
        self._drawn = 0  # how many of `raw` the screen has

    def until(self, pattern: str) -> str:
        """Read until `pattern` comes; return what it matched."""
        while self.child.expect([WHERE, pattern]) == 0:
            self.raw.append(self.child.before or "")
            cursor = self._draw().cursor
            self.child.send(f"\x1b[{cursor.y + 1};{cursor.x + 1}R")
        self.raw.append((self.child.before or "") + self.child.match.group(0))
        return str(self.child.match.group(0))

    def send(self, text: str) -> None:
        self.child.send(text)

    def leave(self) -> int:
        self.child.expect(pexpect.EOF)
        self.raw.append(self.child.before or "")
        self.child.close()
        assert self.child.exitstatus is not None
        return int(self.child.exitstatus)

    @property
    def screen(self) -> str:
        """What is seen now."""
        return "\n".join(line.rstrip() for line in self._draw().display)

    @property
    def scrollback(self) -> str:
        """All that was ever shown, the lines that went out at the top first."""
        screen = self._draw()
        above = ["".join(line[column].data for column in range(COLUMNS)) for line in screen.history.top]
        return "\n".join(line.rstrip() for line in [*above, *screen.display])

    def _draw(self) -> pyte.HistoryScreen:
        """The screen with all that came."""
        self._stream.feed("".join(self.raw[self._drawn :]))
        self._drawn = len(self.raw)
        return self._screen


@contextmanager
def closing(terminals: list[Terminal]) -> Iterator[None]:
    """End what still runs."""
    try:
        yield
    finally:
        for terminal in terminals:
            terminal.child.close(force=True)
