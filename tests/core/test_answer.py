"""Stop strings against a plain definition, tried with every way to cut the text into pieces."""

import itertools
import random

import pytest

from lmx.core.answer import StopStrings
from lmx.core.errors import UsageError


def cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """Character by character: at the first stop string that is complete, the earliest begun one cuts."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


def pieces(text: str, borders: tuple[int, ...]) -> list[str]:
    return [text[a:b] for a, b in itertools.pairwise((0, *borders, len(text)))]


@pytest.mark.parametrize(
    ("text", "stops"),
    [
        ("so stop now", ["stop"]),
        ("ababac", ["abac"]),
        ("aaab", ["aab"]),
        ("xxab", ["ab", "xab"]),
        ("xabx", ["xabx", "ab"]),
        ("no end", ["end!"]),
        ("abcabd", ["abd", "bca"]),
        ("a\nUser:", ["\nUser:", "\n\n"]),
    ],
)
def test_every_cut_into_pieces_gives_the_same_text(text: str, stops: list[str]) -> None:
    expected = cut(text, stops)
    for count in range(len(text)):
        for borders in itertools.combinations(range(1, len(text)), count):
            filtered = StopStrings(stops)
            shown = "".join(filtered.push(piece) for piece in pieces(text, borders)) + filtered.finish()
            assert (shown, filtered.found) == expected


def test_random_texts_and_stops() -> None:
    rng = random.Random(0)
    for _ in range(500):
        text = "".join(rng.choices("ab", k=rng.randint(0, 14)))
        stops = ["".join(rng.choices("ab", k=rng.randint(1, 4))) for _ in range(rng.randint(0, 3))]
        borders = tuple(sorted(rng.sample(range(1, len(text)), rng.randint(0, len(text) - 1)))) if len(text) > 1 else ()
        filtered = StopStrings(stops)
        shown = "".join(filtered.push(piece) for piece in pieces(text, borders)) + filtered.finish()
        assert (shown, filtered.found) == cut(text, stops)


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    stops = StopStrings(["<end>"])
    assert [stops.push(piece) for piece in ("a <", "e", "x", " <en")] == ["a ", "", "<ex", " "]
    assert stops.finish() == "<en"


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(UsageError, match="empty"):
        StopStrings(["fine", ""])
