"""Markdown as it comes: what is left in the scrollback is the whole answer, each word once and in order."""

import io
import re

import pyte
import pytest
from rich.console import Console

from lmx.cli.screen import MarkdownScreen

# Counting lines makes drawing at each character three times as slow.
no_cover = pytest.mark.no_cover
COLUMNS, LINES = 60, 12
CODE_LINES = 18  # more than the screen has
ANSWER = """# Title here

A first paragraph with **bold** words
and a line break that the model made.

- one
- two
  - nested

1. first
2. second

```python
""" + "\n".join(f"line_{n} = {n}  # <stdio.h>" for n in range(CODE_LINES)) + """
```

| name | value |
|------|-------|
| left | right |

<think>kept</think> and [a link](http://example.org/x) at the end &lt;.
"""  # fmt: skip
WORDS = [
    "Title here",
    "first paragraph",
    "line break",
    "one",
    "nested",
    "second",
    "line_0 =",
    f"line_{CODE_LINES - 1} =",
    "name",
    "left",
]


class Watched(pyte.HistoryScreen):
    """A terminal that keeps all that scrolls off."""

    def everything(self) -> str:
        above = ["".join(line[column].data for column in range(COLUMNS)) for line in self.history.top]
        return "\n".join(line.rstrip() for line in [*above, *self.display])


def show(size: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Watched, list[str]]:
    """Stream the answer in pieces of `size` characters, drawing at each; return the terminal and the screens seen."""
    monkeypatch.setattr("lmx.cli.screen._REDRAW_SECONDS", 0)
    terminal = Watched(COLUMNS, LINES, history=1000, ratio=1.0)
    feed = pyte.Stream(terminal)
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=COLUMNS, height=LINES, highlight=False)
    seen = []
    with MarkdownScreen(console) as screen:
        for start in range(0, len(ANSWER), size):
            screen.add(ANSWER[start : start + size])
            feed.feed(out.getvalue().replace("\n", "\r\n"))
            out.seek(0)
            out.truncate()
            seen.append("\n".join(terminal.display))
    feed.feed(out.getvalue().replace("\n", "\r\n"))
    return terminal, seen


@pytest.fixture(scope="module")
def at_once() -> str:
    """What is left when it comes in one piece."""
    with pytest.MonkeyPatch.context() as patch:
        return show(len(ANSWER), patch)[0].everything().strip()


@pytest.mark.parametrize("size", [pytest.param(1, marks=no_cover), 3, 7, 50])
def test_each_word_is_in_the_scrollback_once(size: int, at_once: str, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, _ = show(size, monkeypatch)
    everything = terminal.everything()
    places = [everything.index(word) for word in WORDS]
    assert places == sorted(places)
    for word in WORDS:
        assert len(re.findall(rf"(?<!\w){re.escape(word)}(?!\w)", everything)) == 1, word
    for number in range(CODE_LINES):
        assert everything.count(f"line_{number} =") == 1
    assert "<think>kept</think>" in everything, "HTML is text"
    assert "<stdio.h>" in everything
    assert "http://example.org/x" in everything, "where a link goes is seen"
    assert "end <." in everything
    assert re.search(r"bold words\n\s*and a line break", everything), "line breaks stay"
    assert everything.strip() == at_once, "however it came"


def test_the_end_of_a_tall_block_is_seen_while_it_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    _, seen = show(5, monkeypatch)
    assert any("line_16" in screen and "line_2 " not in screen for screen in seen)
    assert any("Title" in screen for screen in seen[:8]), "an unfinished block is shown, too"
