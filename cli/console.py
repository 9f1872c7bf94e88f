"""The three streams: data to stdout, everything else to stderr, and nothing but text to either."""

import json
import os
import sys
from collections.abc import Mapping
from typing import TextIO

from lmx.core.text.safe import safe_line, safe_text


def is_terminal(stream: TextIO) -> bool:
    """Whether a person reads or types here."""
    try:
        return stream.isatty()
    except ValueError:  # closed
        return False


def may_decorate(stream: TextIO) -> bool:
    """Whether colours and animation are welcome: a terminal that can, and no NO_COLOR (https://no-color.org)."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def may_animate() -> bool:
    """Whether progress may be drawn on stderr."""
    return may_decorate(sys.stderr)


def accept_any_text() -> None:
    """Let the streams replace what their encoding cannot say: an old locale is no reason to fail."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def write(text: str) -> None:
    """Write foreign text to stdout, made safe, and show it at once. Raises BrokenPipeError."""
    sys.stdout.write(safe_text(text))
    sys.stdout.flush()


def write_json(value: Mapping[str, object]) -> None:
    """One object on one line. ASCII with escapes, which is safe in any encoding and on any terminal."""
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def note(text: str, *, quiet: bool = False) -> None:
    """One line on stderr for a person, unless `quiet`."""
    if not quiet:
        sys.stderr.write(safe_line(text) + "\n")
        sys.stderr.flush()


def dim(text: str) -> str:
    """A side remark for the terminal: grey where stdout may have colours. `text` must be safe already."""
    return f"\x1b[2m{text}\x1b[0m" if may_decorate(sys.stdout) else text
