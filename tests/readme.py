"""The commands that the README shows, so that tests and continuous integration run what a reader would type."""

import re
import sys
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"


def commands() -> list[str]:
    """Every command of the README's `sh` blocks, one a line, comments left out."""
    blocks = re.findall(r"^```sh\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = [re.split(r"\s{2,}#", line)[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def command(which: str) -> str:
    """The one command that installs and chats, or the one that runs the tests."""
    starts = {"install": "pip install . &&", "test": "pip install -e '.[dev]' &&"}[which]
    (found,) = [line for line in commands() if line.startswith(starts)]
    return found


if __name__ == "__main__":
    sys.stdout.write(command(sys.argv[1]) + "\n")
