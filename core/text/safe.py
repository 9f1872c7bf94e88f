"""Foreign text made fit for a terminal: nothing in it can move the cursor, change colours or reorder what is read.

A terminal obeys control characters: ESC sequences rewrite the screen, the title or the clipboard, and the bidirectional
controls let a text look other than it is (CVE-2021-42574). All text of models, files and templates passes here.
"""

import re

# C0 but for tab and newline, DEL, C1; marks, embeddings, overrides and isolates of direction; lone surrogates.
_UNSAFE = re.compile(
    "[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u061c\\u200e\\u200f\\u202a-\\u202e\\u2066-\\u2069\\ud800-\\udfff]"
)
_PICTURES = 0x2400  # "Control Pictures": a visible sign for each C0 character
_DELETE_PICTURE = "\N{SYMBOL FOR DELETE}"
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def safe_text(text: str) -> str:
    r"""`text` with every control character replaced by one that shows, so that nothing is lost in silence.

    ESC becomes U+241B, and what followed it stays plain text. A carriage return is left out. Each character is judged
    alone, so a sequence that arrives in several pieces is as harmless as a whole one: call it on each piece.

    >>> safe_text("red \x1b[31mtext")
    'red ␛[31mtext'
    """
    return _UNSAFE.sub(_visible, text)


def safe_line(text: str, limit: int = 2000) -> str:
    """As `safe_text`, on one line: all white space becomes single spaces. Longer text is cut at `limit` characters."""
    line = " ".join(safe_text(text[: 4 * limit]).split())
    return line if len(line) <= limit else line[:limit] + "..."


def _visible(match: re.Match[str]) -> str:
    character = match[0]
    if character == "\r":
        return ""
    if character < " ":
        return chr(_PICTURES + ord(character))
    return _DELETE_PICTURE if character == "\x7f" else _REPLACEMENT
