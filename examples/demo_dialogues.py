"""The dialogues that the demo model learns from, made from the grammars in `demo/*.toml` and a seed.

Nothing here is taken from anyone's text: every user line is a random walk through a grammar, every name is drawn from
a list or made up, every answer is written in the grammar files. Lines and names of `demo/heldout.toml` never occur.
"""

import random
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

from demo_grammar import Grammar, made_up_name, normalise, slip

DATA = Path(__file__).parent / "demo"
KINDS = {"command": 0.37, "fact": 0.25, "talk": 0.1, "sum": 0.14, "unknown": 0.14}


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


@dataclass
class Maker:
    """Makes dialogues from a seed."""

    seed: int
    rng: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.other = load("other")
        self.synonyms = {word: group for group in self.other["synonyms"] for word in group}
        words = "|".join(re.escape(word) for word in sorted(self.synonyms, key=len, reverse=True))
        self.replaceable = re.compile(rf"(?<![\w/-])(?:{words})(?![\w'])")
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
            line = self.rough(self.reworded(self.grammar.expand(phrase)))
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
            elif kind in ("colour", "city") and rng.random() < 0.4:
                value = rng.choice(listed)
            elif kind == "colour":
                value = name.lower()
            if not {value.lower(), name.lower()} & self.hidden_values:
                return value.lower() if lower else value

    def reworded(self, line: str) -> str:
        """Some of the words replaced by others that mean the same; options and slash commands stay as they are."""
        rng = self.rng
        return self.replaceable.sub(
            lambda found: rng.choice(self.synonyms[found[0]]) if rng.random() < 0.2 else found[0], line
        )

    def rough(self, line: str) -> str:
        """Now and then a word that means little is put in or left out, never beside a value: wordings are endless."""
        rng, words = self.rng, line.split(" ")
        if rng.random() < 0.08:
            small = [at for at, word in enumerate(words) if word.lower() in self.other["droppable"]]
            if small and len(words) > 2:
                del words[rng.choice(small)]
        if rng.random() < 0.08 and len(words) > 4:
            any_word = [at for at, word in enumerate(words) if "{" not in word]
            del words[rng.choice(any_word)]
        while rng.random() < 0.12:
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
        if rng.random() < 0.03:
            line = rng.choice(self.other["contexts"]) + " " + line
        if typos and rng.random() < 0.06 and len(line) > 8:
            line = slip(line, rng)
        style = rng.random()
        line = line.lower() if style < 0.2 else line[0].upper() + line[1:] if style < 0.65 else line
        return line + rng.choice(ends).strip()


def heldout_lines(part: dict) -> list[str]:
    """Every line of a held-out part."""
    lines: list[str] = []
    for entry in part.values():
        for value in entry.values() if isinstance(entry, dict) else [entry]:
            lines += value
    return lines
