"""The dialogues that the demo model learns from, made from the grammars in `demo/*.toml` and a seed.

Nothing here is taken from anyone's text: every user line is a random walk through a grammar, every name is drawn from
a list or made up, every answer is written in the grammar files. Lines and names of `demo/heldout.toml` never occur.
"""

import random
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

DATA = Path(__file__).parent / "demo"
KINDS = {"command": 0.37, "fact": 0.25, "talk": 0.1, "sum": 0.14, "unknown": 0.14}


def normalise(text: str) -> str:
    """What makes two lines the same: letters, digits and signs of arithmetic, without case and spacing."""
    return " ".join(re.findall(r"[\w+*/=-]+", text.lower()))


def load(name: str) -> dict:
    """One of the grammar files."""
    return tomllib.loads((DATA / f"{name}.toml").read_text(encoding="utf-8"))


@dataclass
class Turn:
    """One question and its answer. kind: command, fact, talk, sum, unknown or memory."""

    user: str
    answer: str
    kind: str


@dataclass
class Dialogue:
    """A conversation; system may be empty."""

    turns: list[Turn]
    system: str = ""

    @property
    def messages(self) -> list[dict[str, str]]:
        """As chat templates take them."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns:
            messages += [{"role": "user", "content": turn.user}, {"role": "assistant", "content": turn.answer}]
        return messages


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


@dataclass
class Maker:
    """Makes dialogues from a seed."""

    seed: int
    rng: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.other = load("other")
        self.grammar = Grammar(self.rng, self.other)
        self.intents: dict[str, list[dict]] = {"command": [], "fact": [], "talk": [], "unknown": []}
        for name in ("commands", "facts", "unknown"):
            data = load(name)
            self.grammar.slots.update(data.get("slots", {}))
            for intent in data["intent"]:
                self.intents[intent["kind"]].append(intent)
        self.memory = load("memory")
        self.grammar.slots.update(self.memory.pop("slots"))
        grammars = [(DATA / f"{name}.toml").read_text(encoding="utf-8") for name in ("commands", "facts", "unknown")]
        self.words = sorted(set(re.findall("[a-z]{4,}", " ".join(grammars))))
        heldout = load("heldout")
        self.hidden = {normalise(line) for part in ("dev", "test") for line in heldout_lines(heldout[part])}
        self.hidden_values = {value.lower() for values in heldout["values"].values() for value in values}

    def dialogue(self, memories: float = 0.6, echoes: float = 0.0, sums: float = 0.0, most_turns: int = 6) -> Dialogue:
        """A conversation of 1 to 6 turns, or of 7 to `most_turns`, that mixes everything.

        memories: how likely it is that the user tells and asks facts about themselves; echoes: how many turns
        ask to repeat made-up words, which teaches to copy; sums: how many turns are sums beyond the usual.
        """
        rng, known = self.rng, {}
        system = ""
        if rng.random() < 0.15:
            if rng.random() < 0.3:
                known["name"] = self.value("name", lower=False)
                system = self.grammar.expand(rng.choice(self.other["system_name"]), value=known["name"])
            else:
                system = self.grammar.expand(rng.choice(self.other["system"]))
        remembers = rng.random() < memories
        count = rng.choices(range(1, 7), [20, 18, 20, 18, 13, 11])[0] if most_turns == 6 else rng.randint(7, most_turns)
        turns: list[Turn] = []
        for number in range(count):
            drill = rng.random()
            if drill < echoes:
                turns.append(self.echo_turn())
            elif drill < echoes + sums:
                turns.append(self.sum_turn())
            else:
                turns.append(self.memory_turn(known, number) if remembers and rng.random() < 0.62 else self.turn())
        return Dialogue(turns, system)

    def turn(self) -> Turn:
        """A question that needs no memory."""
        kind = self.rng.choices(list(KINDS), list(KINDS.values()))[0]
        if kind == "sum":
            return self.sum_turn()
        intent = self.rng.choice(self.intents[kind])
        return Turn(self.question(intent), intent["answer"], kind)

    def question(self, intent: dict) -> str:
        """A way to ask for an intent that is not held out."""
        phrases = [(phrase, False) for phrase in intent.get("ask", [])] + [(p, True) for p in intent.get("do", [])] * 2
        while True:
            phrase, action = self.rng.choice(phrases)
            if action and self.rng.random() < 0.85:
                phrase = "{how} " + phrase
            line = self.rough(self.grammar.expand(phrase))
            typed = self.typed(line, ends="!!.. ?" if intent["kind"] == "talk" else "????.!  ")
            if self.may_be_seen(line, typed):
                return typed

    def may_be_seen(self, *lines: str) -> bool:
        """Whether none of these is held out."""
        return not any(normalise(line) in self.hidden for line in lines)

    def echo_turn(self) -> Turn:
        """Some made-up words to repeat."""
        words = " ".join(self.value("name", lower=self.rng.random() < 0.3) for _ in range(self.rng.randint(1, 5)))
        return Turn(self.grammar.expand(self.rng.choice(self.other["echo"]), value=words), words, "echo")

    def sum_turn(self) -> Turn:
        """An addition of two numbers from 0 to 20."""
        a, b = self.rng.randint(0, 20), self.rng.randint(0, 20)
        words = self.rng.random() < 0.15
        shown = {name: self.other["numbers"][value] if words else str(value) for name, value in (("a", a), ("b", b))}
        while True:
            pattern = self.rng.choice(self.other["sum"])
            line = self.grammar.expand(pattern, **shown)
            if self.may_be_seen(line) and not (words and "{tight}" in pattern):
                return Turn(self.typed(line, typos=False), f"{a} + {b} = {a + b}.", "sum")

    def memory_turn(self, known: dict[str, str], number: int) -> Turn:
        """Tell a new fact, change the name, or ask for a fact."""
        rng = self.rng
        missing = [kind for kind in self.memory if kind not in known]
        if missing and rng.random() < (0.75 if not number else 0.35):
            return self.tell(known, "name" if "name" in missing and rng.random() < 0.5 else rng.choice(missing))
        if "name" in known and rng.random() < 0.06:
            return self.tell(known, "name", "change", "changed")
        kind = rng.choice(list(known) if known and rng.random() < 0.85 else list(self.memory))
        return self.ask(known, kind)

    def tell(self, known: dict[str, str], kind: str, tell: str = "tell", told: str = "told") -> Turn:
        """The user says something about themselves, perhaps with a question in the same line."""
        rng, form = self.rng, self.memory[kind]
        lower = rng.random() < 0.2
        value = self.value(kind, lower)
        line = self.telling(form[tell], value, lower)
        answer = form[told].format(value=value)
        known[kind] = value
        if rng.random() < 0.05:
            after = self.turn()
            if after.kind in ("command", "fact", "sum"):
                line = line.rstrip(".!") + ". " + after.user
                answer += " " + after.answer
        return Turn(line, answer, "memory")

    def ask(self, known: dict[str, str], kind: str) -> Turn:
        """The user asks for something that they may have said."""
        form = self.memory[kind]
        answer = form["answer"].format(value=known[kind]) if kind in known else form["unknown"]
        while True:
            line = self.rough(self.grammar.expand(self.rng.choice(form["ask"])))
            typed = self.typed(line)
            if self.may_be_seen(line, typed):
                return Turn(typed, answer, "memory")

    def telling(self, patterns: list[str], value: str, lower: bool) -> str:
        """A line that tells something about the user; the value is never mistyped."""
        while True:
            line = self.rough(self.grammar.expand(self.rng.choice(patterns), value="{value}"))
            if self.may_be_seen(line):
                break
        line = line.lower() if lower else line[0].upper() + line[1:] if self.rng.random() < 0.6 else line
        return line.replace("{value}", value) + self.rng.choice(["", "", ".", ".", "!"])

    def value(self, kind: str, lower: bool) -> str:
        """A name, colour, city or pet that is not held out; mostly made up, so that copying is learned, not a list."""
        rng, listed = self.rng, self.memory[kind]["values"]
        while True:
            name = (
                rng.choice(self.memory["name"]["values"])
                if rng.random() < 0.15
                else made_up_name(rng, self.other, self.words)
            )
            value = name
            if kind == "name" and rng.random() < 0.06:
                value += " " + made_up_name(rng, self.other, self.words)
            elif kind == "pet":
                value = rng.choice(listed)
                value += "" if rng.random() < 0.15 else f" {rng.choice(['called', 'named'])} {name}"
            elif kind in ("colour", "city") and rng.random() < 0.6:
                value = rng.choice(listed)
            elif kind == "colour":
                value = made_up_word(rng, self.other)
            if not {value.lower(), name.lower()} & self.hidden_values:
                return value.lower() if lower else value

    def rough(self, line: str) -> str:
        """Now and then a word that means little is put in or left out, never beside a value: wordings are endless."""
        rng, words = self.rng, line.split(" ")
        if rng.random() < 0.08:
            small = [at for at, word in enumerate(words) if word.lower() in self.other["droppable"]]
            if small and len(words) > 2:
                del words[rng.choice(small)]
        while rng.random() < 0.2:
            at = rng.randint(0, len(words))
            if not any("{" in word for word in words[max(0, at - 1) : at + 1]):
                words.insert(at, rng.choice(self.other["fillers"]))
        return " ".join(words)

    def typed(self, line: str, typos: bool = True, ends: str = "????.!  ") -> str:
        """As people type: with or without capitals, question marks, courtesies; now and then a slip."""
        rng = self.rng
        if rng.random() < 0.1:
            line = rng.choice(self.other["courtesy_before"]) + rng.choice([" ", ", "]) + line
        if rng.random() < 0.05:
            line += rng.choice(self.other["courtesy_after"])
        if typos and rng.random() < 0.06 and len(line) > 8:
            line = slip(line, rng)
        style = rng.random()
        line = line.lower() if style < 0.2 else line[0].upper() + line[1:] if style < 0.65 else line
        return line + rng.choice(ends).strip()


def slip(line: str, rng: random.Random) -> str:
    """One letter left out, doubled, or swapped with the next."""
    at = rng.randrange(1, len(line) - 1)
    before, letter, after = line[:at], line[at], line[at + 1 :]
    return before + rng.choice([after, letter + letter + after, after[0] + letter + after[1:]])


def heldout_lines(part: dict) -> list[str]:
    """Every line of a held-out part."""
    lines: list[str] = []
    for entry in part.values():
        for value in entry.values() if isinstance(entry, dict) else [entry]:
            lines += value
    return lines
