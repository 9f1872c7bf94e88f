"""The other end of turns.py's `Program`: a line when the program is ready, then an answer for each test asked for."""

import json
import sys
from collections.abc import Callable


def serve(run: Callable[[str, int], dict[str, float]]) -> None:
    """Answer `tg 4` or `pp 512`, line by line, with run("tg", 4) or run("pp", 512) as JSON, until the input ends."""
    _say({})
    for line in sys.stdin:
        kind, count = line.split()
        _say(run(kind, int(count)))


def _say(answer: dict[str, float]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
