"""Record a real chat in a real terminal and draw its last screen as docs/chat.svg.

    python examples/record_chat.py

Types each line below into `lmx chat` through a pseudo-terminal, waits for the answer, and renders what the terminal
shows. Needs the packages of the `dev` extra (pexpect, pyte).
"""

import argparse
import copy
import os
import re
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pexpect
import pyte
from rich.console import Console
from rich.style import Style
from rich.text import Text

COLUMNS, ROWS = 108, 26
TURNS = (
    "Hello! My name is Ada.",
    "How do I make a model smaller?",
    "And what is NF4?",
    "What is 7 + 5?",
    "What is my name?",
)
DONE = "prompt tokens computed"
PATIENCE_SECONDS = 60.0


def record(command: list[str]) -> pyte.Screen:
    """Type the turns and return the terminal's screen after the last answer."""
    environment = {**os.environ, "TERM": "xterm-256color"}
    child = pexpect.spawn(command[0], command[1:], dimensions=(ROWS, COLUMNS), encoding="utf-8", env=environment)
    screen = pyte.Screen(COLUMNS, ROWS)
    screen.write_process_input = child.send  # a terminal answers when it is asked where the cursor is
    stream = pyte.Stream(screen)
    wait(child, stream, lambda: at_prompt(screen))
    for number, turn in enumerate(TURNS, 1):
        child.send(turn)
        wait(child, stream, lambda turn=turn: turn in "\n".join(screen.display))
        child.send("\r")
        wait(child, stream, lambda number=number: "\n".join(screen.display).count(DONE) >= number and at_prompt(screen))
    shown = pyte.Screen(COLUMNS, ROWS)
    shown.buffer = copy.deepcopy(screen.buffer)
    child.close(force=True)
    return shown


def at_prompt(screen: pyte.Screen) -> bool:
    """Whether the cursor waits behind an empty prompt."""
    return screen.display[screen.cursor.y].rstrip() == ">"


def wait(child: "pexpect.spawn[str]", stream: pyte.Stream, done: Callable[[], bool]) -> None:
    """Give the terminal what the program writes until it shows what is waited for."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not done():
        if time.monotonic() > end:
            raise SystemExit("the chat did not answer in time")
        with suppress(pexpect.TIMEOUT):
            stream.feed(child.read_nonblocking(size=4096, timeout=0.2))


def draw(screen: pyte.Screen, path: Path) -> None:
    """Write the screen as an SVG that needs no other file."""
    with open("/dev/null", "w", encoding="utf-8") as nowhere:
        console = Console(record=True, width=COLUMNS, file=nowhere, force_terminal=True)
        lines = [_line(screen, row) for row in range(ROWS)]
        while lines and not lines[-1].plain.strip():
            lines.pop()
        for line in lines:
            console.print(line, no_wrap=True, overflow="crop")
        svg = console.export_svg(title="lmx chat")
    svg = re.sub(r"@font-face\s*\{.*?\}\s*", "", svg, flags=re.DOTALL)  # fonts from elsewhere: take the reader's own
    svg = re.sub(r"Fira Code, monospace", "ui-monospace, Menlo, Consolas, monospace", svg)
    path.write_text("\n".join(line.rstrip() for line in svg.splitlines()) + "\n", encoding="utf-8")


def _line(screen: pyte.Screen, row: int) -> Text:
    text = Text()
    for column in range(COLUMNS):
        char = screen.buffer[row][column]
        # pyte does not keep the terminal's dim attribute: our own remarks are the lines that it would dim.
        text.append(char.data, Style(bold=char.bold, italic=char.italics))
    return text


def main() -> None:
    """Record and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a checkpoint instead of the embedded demo")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent.parent / "docs" / "chat.svg")
    options = parser.parse_args()
    command = [sys.executable, "-m", "lmx", "chat", *([options.model] if options.model else [])]
    draw(record(command), options.out)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
