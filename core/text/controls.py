"""Keeps control tokens that a template writes apart from text of a message that only looks like them.

The way of a conversation (`StandIns` and `ControlTokens`, put together in `lmx.core.text.chat`):

1. In the messages, every spelling of a control token is replaced by one private-use character that occurs nowhere in
   the conversation: its stand-in.
2. The template renders that. Whatever control token is spelled in the result, the template wrote.
3. These get their sealed names: random private-use strings, under which a second copy of the tokenizer knows them.
4. The stand-ins become what the user typed, which is ordinary text to that copy. One encoding of the whole follows,
   so that leading spaces, stripping and the like come out exactly as for the plain tokenizer.
"""

import re
import secrets
from collections.abc import Iterable, Sequence

from lmx.core.errors import InputError
from lmx.core.text.files import AddedToken

# The two supplementary private-use planes: a stand-in must not be a character of a sealed name
_STAND_INS = range(0xF0000, 0xFFFFE)
_NAMES = range(0x100000, 0x10FFFE)
_SEALED_LENGTH = 8  # 8 characters of 16 random bits


class StandIns:
    """Private-use characters that stand for pieces of text during one rendering."""

    def __init__(self, texts: Iterable[str]) -> None:
        """`texts`: everything that will be rendered; none of its characters is taken."""
        self._taken = {character for text in texts for character in text if ord(character) in _STAND_INS}
        self._next = secrets.randbelow(len(_STAND_INS))
        self._originals: dict[int, str] = {}
        self._by_original: dict[str, str] = {}

    def fresh(self) -> str:
        """A character that occurs nowhere yet."""
        for _ in _STAND_INS:
            character = chr(_STAND_INS[self._next])
            self._next = (self._next + 1) % len(_STAND_INS)
            if character not in self._taken:
                self._taken.add(character)
                return character
        raise InputError("the text uses up the private-use characters", "Take some of them out of the messages.")

    def of(self, original: str) -> str:
        """The character that stands for `original`."""
        if original not in self._by_original:
            character = self.fresh()
            self._by_original[original] = character
            self._originals[ord(character)] = original
        return self._by_original[original]

    def restore(self, text: str) -> str:
        """`text` with the originals back in their places."""
        return text.translate(self._originals) if self._originals else text


class ControlTokens:
    """The control tokens of a tokenizer and their sealed names, made anew in every process."""

    def __init__(self, tokens: Sequence[AddedToken]) -> None:
        self.sealed = {token.content: _random_name() for token in tokens}
        self._ids = {token.content: token.id for token in tokens}
        self._any = _longest_first(self.sealed)
        # The tokenizer looks for tokens of the raw text first, for those of the normalized text in what is left
        self._passes = [
            _longest_first(token.content for token in tokens if token.normalized is normalized)
            for normalized in (False, True)
        ]
        self._beginnings = {name[:end] for name in self.sealed for end in range(1, len(name))}
        self._endings = {name[start:] for name in self.sealed for start in range(1, len(name))}
        self._longest = max(map(len, self.sealed), default=0)

    def escape(self, text: str, stand_ins: StandIns) -> str:
        """A message's text that spells no control token, nor completes one with what stands beside it."""
        text = self._any.sub(lambda match: stand_ins.of(match[0]), text)
        core = text.strip()  # templates trim
        if not core:
            return text
        start = text.index(core)
        end = start + len(core) - 1
        sizes = range(1, min(self._longest, len(core) + 1))
        opens = any(core[:size] in self._endings for size in sizes) or any(core in name for name in self.sealed)
        closes = any(core[-size:] in self._beginnings for size in sizes)
        if closes:
            text = text[:end] + stand_ins.of(text[end]) + text[end + 1 :]
        if opens and not (closes and start == end):
            text = text[:start] + stand_ins.of(text[start]) + text[start + 1 :]
        return text

    def seal(self, rendered: str) -> str:
        """A rendering with every control token under its sealed name."""
        for pattern in self._passes:
            rendered = pattern.sub(lambda match: self.sealed[match[0]], rendered)
        return rendered

    def opening_id(self, text: str) -> int | None:
        """The id of the control token that `text` begins with, after white space."""
        match = self._any.match(text.lstrip())
        return None if match is None else self._ids[match[0]]


def _random_name() -> str:
    return "".join(chr(secrets.choice(_NAMES)) for _ in range(_SEALED_LENGTH))


def _longest_first(names: Iterable[str]) -> re.Pattern[str]:
    ordered = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) or "(?!)")  # (?!) matches nothing
