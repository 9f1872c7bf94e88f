"""Random sentences from patterns, made-up words and typing slips: what the demo model's dialogues are made from."""

import random
import re
from collections.abc import Callable


def normalise(text: str) -> str:
    """What makes two lines the same: letters, digits and signs of arithmetic, without case and spacing."""
    return " ".join(re.findall(r"[\w+*/=-]+", text.lower()))


class Grammar:
    """Random sentences: `(a|b|)` is a choice, `{slot}` a choice among the slot's phrases, `,?` a comma or none."""

    def __init__(self, rng: random.Random, sounds: dict) -> None:
        self.rng = rng
        self.slots: dict[str, list[str] | Callable[[], str]] = {
            "number": lambda: str(rng.randint(0, 100)),
            "large": lambda: str(rng.randint(100, 9999)),
            "nonsense": lambda: made_up_word(rng, sounds),
            "plus": ["+", "+", "plus", "and", "added to"],
            "tight": ["+", " +", "+ "],
        }

    def expand(self, pattern: str, **values: str) -> str:
        """One sentence of the pattern; values fill slots as they are."""
        text = pattern
        while found := re.search(r"\(([^()]*)\)|\{(\w+)\}", text):
            if found[1] is not None:
                piece = self.rng.choice(found[1].split("|"))
            elif found[2] in values:
                piece = "\0" + found[2] + "\0"  # put in last, so that nothing in a value is read as grammar
            else:
                slot = self.slots[found[2]]
                piece = slot() if callable(slot) else self.rng.choice(slot)
            text = text[: found.start()] + piece + text[found.end() :]
        text = re.sub(r",\?", lambda _: self.rng.choice([",", ""]), text)
        text = re.sub(r" +", " ", text).strip()
        return re.sub("\0(\\w+)\0", lambda match: values[match[1]], text)


def made_up_word(rng: random.Random, sounds: dict) -> str:
    """A pronounceable word that probably does not exist."""
    syllables = []
    for _ in range(rng.choice([1, 2, 2, 3])):
        onset = rng.choice(sounds["onsets"]) if rng.random() < 0.9 else ""
        syllables.append(
            onset + rng.choice(sounds["vowels"]) + (rng.choice(sounds["codas"]) if rng.random() < 0.5 else "")
        )
    return "".join(syllables)


def made_up_name(rng: random.Random, sounds: dict, words: list[str]) -> str:
    """A name: from syllables, halves of two ordinary words, or any letters; some with accents or a hyphen."""
    kind = rng.random()
    if kind < 0.2:
        word = "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(2, 9)))
    elif kind < 0.55:
        first, last = rng.choice(words), rng.choice(words)
        word = first[: rng.randint(1, len(first))] + last[rng.randint(0, len(last) - 1) :]
    else:
        word = made_up_word(rng, sounds)
    if rng.random() < 0.08:
        at = rng.randrange(len(word))
        word = word[:at] + rng.choice(sounds["accents"]) + word[at + 1 :]
    if rng.random() < 0.04:
        word += "-" + made_up_word(rng, sounds)
    return word[0].upper() + word[1:]


def slip(line: str, rng: random.Random) -> str:
    """One letter left out, doubled, or swapped with the next."""
    at = rng.randrange(1, len(line) - 1)
    before, letter, after = line[:at], line[at], line[at + 1 :]
    return before + rng.choice([after, letter + letter + after, after[0] + letter + after[1:]])
