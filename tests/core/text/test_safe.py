import unicodedata

import pyte
import pytest

from lmx.core.text.safe import safe_line, safe_text

ALLOWED = {"\n", "\t"}


def test_every_control_and_direction_character_is_gone() -> None:
    hostile = [chr(i) for i in range(0x110000) if unicodedata.category(chr(i)) in ("Cc", "Cs")]
    hostile += [chr(i) for i in range(0x110000) if unicodedata.bidirectional(chr(i)) in _CONTROL_DIRECTIONS]
    hostile += ["\u061c", "\u200e", "\u200f"]
    for character in set(hostile) - ALLOWED:
        assert character not in safe_text(f"a{character}b"), hex(ord(character))


_CONTROL_DIRECTIONS = ("LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI")


def test_ordinary_text_is_untouched() -> None:
    text = "Grüße,\tש 你好 👩‍👩‍👧 e\u0301 \u200b\n\n  done"
    assert safe_text(text) == text


ATTACKS = ["\x1b[2J\x1b[H", "\x1b]0;title\x07", "\x9b31mred", "\x1b]52;c;aGk=\x07", "abc\rxyz", "\x1bc", "a\x08\x08b"]


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("size", [1, 2, 100])
def test_a_terminal_sees_only_text(attack: str, size: int) -> None:
    screen = pyte.Screen(60, 3)
    pyte.Stream(screen).feed("kept " + "".join(safe_text(attack[i : i + size]) for i in range(0, len(attack), size)))
    assert screen.display[0].startswith("kept ")
    assert screen.title == ""
    assert all(screen.buffer[0][x].fg == "default" for x in range(60))


def test_safe_line_is_one_bounded_line() -> None:
    assert safe_line("a\n b\tc\x1b[0m") == "a b c␛[0m"
    assert len(safe_line("x" * 10**6)) == 2003
