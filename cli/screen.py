"""How an answer appears while it comes: as plain text, or as Markdown whose finished blocks are printed for good.

Only the last block, which is not finished, is drawn again and again; nothing above it ever moves, so the scrollback
holds each word once. Nothing of this runs while the prompt is up.
"""

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol, Self

from lmx.cli.console import may_decorate, write
from lmx.core.text.safe import safe_text

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.token import Token
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.live import Live
    from rich.segment import Segment

_REDRAW_SECONDS = 1 / 12


class Screen(Protocol):
    """Shows one answer; used as a context manager, so that an interrupt leaves the terminal in order."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def add(self, text: str) -> None:
        """The next piece of the answer, as the model wrote it."""
        ...


def open_screen(*, plain: bool) -> Screen:
    """The screen for one answer: Markdown where stdout is a terminal that can show it, unless `plain`."""
    return PlainScreen() if plain or not may_decorate(sys.stdout) else MarkdownScreen()


class PlainScreen:
    """Text as it comes."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        write("\n")

    def add(self, text: str) -> None:
        """Write it."""
        write(text)


class MarkdownScreen:
    """Blocks of Markdown."""

    def __init__(self, console: "Console | None" = None) -> None:
        from rich.console import Console

        self._console = console or Console(highlight=False)
        self._parser = _parser()
        self._pending = ""
        self._printed = False
        self._drawn = 0.0
        self._live: Live | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        self._print(self._pending)
        self._pending = ""

    def add(self, text: str) -> None:
        """Take more text; print what is finished, and draw the rest if it is time to."""
        self._pending += safe_text(text)
        now = time.monotonic()
        if now - self._drawn < _REDRAW_SECONDS:
            return
        self._drawn = now
        *finished, rest = _blocks(self._parser, self._pending)
        if finished:
            self._stop()
            self._print("".join(finished))
            self._pending = rest
        if self._pending.strip():
            self._draw()

    def _print(self, text: str) -> None:
        """Print blocks, each on its own, so that they look the same however they came."""
        for block in _blocks(self._parser, text):
            if block.strip():
                if self._printed:
                    self._console.print()
                self._console.print(_Markdown(self._parser, block))
                self._printed = True

    def _draw(self) -> None:
        """Show the unfinished block, of a tall one its end."""
        from rich.live import Live

        room = self._console.height - 2
        view = _Markdown(self._parser, self._pending, last_lines=room, space_above=self._printed)
        if self._live is None:
            self._live = Live(
                view,
                console=self._console,
                auto_refresh=False,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start(refresh=True)
        else:
            self._live.update(view, refresh=True)

    def _stop(self) -> None:
        """Take the unfinished block off the screen."""
        if self._live is not None:
            self._live.stop()
            self._live = None


class _Markdown:
    """A text as Rich shows Markdown, with every line break kept, HTML as text, and no control character.

    Rich decodes entities after we made the text safe (`&#x202e;`), so that what it makes is made safe once more.
    """

    def __init__(
        self, parser: "MarkdownIt", text: str, last_lines: int | None = None, space_above: bool = False
    ) -> None:
        from rich.markdown import Markdown

        self._markdown = Markdown("", code_theme="ansi_dark", hyperlinks=False)
        self._markdown.parsed = _breaking(parser.parse(text))
        self._last_lines = last_lines
        self._space_above = space_above

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        from rich.segment import Segment

        lines = list(Segment.split_lines(console.render(self._markdown, options)))
        while lines and _is_blank(lines[0]):
            lines.pop(0)
        while lines and _is_blank(lines[-1]):
            lines.pop()
        if self._space_above:
            lines.insert(0, [])
        for line in lines[-self._last_lines :] if self._last_lines else lines:
            for segment in line:
                yield segment if segment.control else Segment(safe_text(segment.text), segment.style)
            yield Segment.line()


def _is_blank(line: "list[Segment]") -> bool:
    return not "".join(segment.text for segment in line).strip()


def _parser() -> "MarkdownIt":
    """CommonMark with tables, and with HTML as the text that it is: models write `<think>` and `<stdio.h>`."""
    from markdown_it import MarkdownIt

    return MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])


def _blocks(parser: "MarkdownIt", text: str) -> list[str]:
    """A text cut into its blocks. Nothing that is to come can change any of them but the last."""
    starts = [token.map[0] for token in parser.parse(text) if token.level == 0 and token.map is not None]
    lines = text.split("\n")
    borders = [0, *sorted(set(starts) - {0}), len(lines)] if len(starts) > 1 else [0, len(lines)]
    pieces = ["\n".join(lines[a:b]) for a, b in pairwise(borders)]
    return [*(piece + "\n" for piece in pieces[:-1]), pieces[-1]]


def _breaking(tokens: "Iterable[Token]") -> "list[Token]":
    """A line break that the model wrote is one on the screen, too."""
    found = list(tokens)
    for token in found:
        for child in token.children or ():
            if child.type == "softbreak":
                child.type = "hardbreak"
    return found


@contextmanager
def quiet_keys() -> Iterator[None]:
    """Do not show what is typed meanwhile: it would stand in the middle of an answer. It is read at the next prompt."""
    import termios

    try:
        descriptor = sys.stdin.fileno()
        before = termios.tcgetattr(descriptor)
    except (termios.error, OSError, ValueError):  # no terminal
        yield
        return
    silent = [*before]
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(descriptor, termios.TCSADRAIN, silent)
    try:
        yield
    finally:
        with suppress(termios.error):
            termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
