"""Numbers of tokens as llama-bench takes them: 512, 128,512, 0-4096+1024, 8-128*2."""

import re
from collections.abc import Iterator, Sequence

from lmx.core.errors import UsageError

_MOST_TOKENS = 1 << 24
_MOST_COUNTS = 1000
_RANGE = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9})(?:([+*])([0-9]{1,9}))?)?", re.ASCII)


def parse_counts(option: str, texts: Sequence[str]) -> list[int]:
    """All numbers of an option that may be repeated, each value a list of numbers and ranges, without duplicates.

    A range A-B goes up by 1, A-B+S by S, A-B*F by the factor F; B is in it where a step falls on it. Raises UsageError.
    """
    counts: dict[int, None] = {}
    for part in ",".join(texts).split(","):
        for count in _expand(option, part.strip()):
            counts[count] = None
            if len(counts) > _MOST_COUNTS:
                raise UsageError(f"{option}: {part!r:.40} makes more than {_MOST_COUNTS} tests", "take larger steps")
    return list(counts)


def parse_pair(option: str, text: str) -> tuple[int, int]:
    """`512,128`: a prompt's tokens and an answer's. Raises UsageError."""
    parts = [count for part in text.split(",") for count in _expand(option, part.strip())]
    if len(parts) != 2 or 0 in parts:
        raise UsageError(f"{option}: {text!r:.40} is no pair", "write it like 512,128")
    return parts[0], parts[1]


def _expand(option: str, part: str) -> Iterator[int]:
    match = _RANGE.fullmatch(part)
    if match is None:
        raise UsageError(f"{option}: {part!r:.40} is no number of tokens", "write it like 512, 128,512 or 0-4096+1024")
    first, last = int(match[1]), int(match[2] or match[1])
    step, factor = (int(match[4]), 1) if match[3] == "+" else (0, int(match[4])) if match[3] else (1, 1)
    if last > _MOST_TOKENS:
        raise UsageError(f"{option}: {part!r:.40} is more than {_MOST_TOKENS:,} tokens", "give less")
    if last < first or (first < last and first * factor + step <= first):
        raise UsageError(f"{option}: {part!r:.40} does not go up", "write ranges like 0-4096+1024 or 8-128*2")
    while first <= last:
        yield first
        first = first * factor + step if last > int(match[1]) else last + 1
