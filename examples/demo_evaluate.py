"""How good the demo model is: greedy answers to wordings and values that were never trained, compared letter by letter.

python examples/demo_evaluate.py lmx/demo
"""

import argparse
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from demo_dialogues import Dialogue, Maker, Turn, load

from lmx.core.checkpoint import Checkpoint
from lmx.core.generate import generate_batch
from lmx.core.loader import load_model
from lmx.core.model import LanguageModel
from lmx.core.sampling import Sampling
from lmx.core.text.tokenizer import Tokenizer

MOST_TOKENS = 64
PARTS = ("dev", "test")


@dataclass
class Demo:
    """A checkpoint folder, ready to answer; it computes in the stored bfloat16, as `lmx chat` does."""

    model: LanguageModel
    tokenizer: Tokenizer

    @classmethod
    def open(cls, folder: Path) -> "Demo":
        """Load the model and its tokenizer."""
        return cls(load_model(Checkpoint.open(folder)), Tokenizer.load(folder))

    def answers(self, talks: list[list[dict[str, str]]], batch_size: int = 32) -> list[str]:
        """The greedy answer to each conversation's last message."""
        prompts = [self.tokenizer.encode_chat(messages).ids for messages in talks]
        order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
        results = generate_batch(
            self.model,
            self.tokenizer,
            [prompts[row] for row in order],
            batch_size=batch_size,
            sampling=Sampling(),
            max_new_tokens=MOST_TOKENS,
            stop_ids=frozenset(self.model.config.eos_ids),
        )
        found = {order[result.index]: result.finished.text for result in results}
        return [found[row] for row in range(len(talks))]

    def play(self, dialogues: list[Dialogue]) -> list[str]:
        """Type each dialogue's lines one after another, as a user would; returns the model's own last answers."""
        talks = [[m for m in dialogue.messages if m["role"] == "system"] for dialogue in dialogues]
        last = [""] * len(dialogues)
        for turn in range(max(len(dialogue.turns) for dialogue in dialogues)):
            rows = [row for row, dialogue in enumerate(dialogues) if turn < len(dialogue.turns)]
            for row in rows:
                talks[row].append({"role": "user", "content": dialogues[row].turns[turn].user})
            for row, answer in zip(rows, self.answers([talks[row] for row in rows]), strict=True):
                talks[row].append({"role": "assistant", "content": answer})
                last[row] = answer
        return last


def questions(part: dict, maker: Maker, rng: random.Random) -> list[tuple[str, Dialogue]]:
    """Dialogues whose last turn is held out, by what it asks. A turn before it is like those trained."""
    answers = {intent["name"]: intent["answer"] for kind in maker.intents.values() for intent in kind}
    asked: list[tuple[str, Dialogue]] = []
    for kind in ("command", "fact", "unknown"):
        for name, lines in part[kind].items():
            for line in lines:
                asked += [(kind, Dialogue([Turn(line, answers[name], name)]))]
                asked += [(f"{kind}, later turn", Dialogue([maker.turn(), Turn(line, answers[name], name)]))]
    for _ in range(200):
        a, b = rng.randint(0, 20), rng.randint(0, 20)
        line = rng.choice(part["sum"]["sum"]).format(a=a, b=b)
        asked.append(("sum", Dialogue([Turn(line, f"{a} + {b} = {a + b}.", "sum")])))
    return asked + [("memory", memory_dialogue(part["memory"], maker, rng)) for _ in range(200)]


def memory_dialogue(part: dict, maker: Maker, rng: random.Random) -> Dialogue:
    """One or two facts with held-out wording and value, up to three other turns, then a held-out question for one."""
    values = load("heldout")["values"]
    told = {kind: rng.choice(values[kind]) for kind in rng.sample(list(values), rng.choice([1, 2]))}
    if rng.random() < 0.5:
        told.setdefault("name", rng.choice(values["name"]))
    turns = []
    for kind, value in told.items():
        line = rng.choice(part[f"{kind}-tell"]).format(value=value)
        turns.append(Turn(line, maker.memory[kind]["told"].format(value=value), "memory"))
    turns += [maker.turn() for _ in range(rng.randint(0, 3))]
    if len(turns) > len(told):
        rng.shuffle(turns)
    kind = rng.choice(list(told))
    answer = maker.memory[kind]["answer"].format(value=told[kind])
    return Dialogue([*turns, Turn(rng.choice(part[f"{kind}-ask"]), answer, kind)])


def measure(demo: Demo, part: dict, seed: int) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """(right, asked) by kind, and a line for each failure. Right is the whole answer, letter by letter."""
    asked = questions(part, Maker(seed + 1000), random.Random(seed))
    replies = demo.play([dialogue for _, dialogue in asked])
    score: dict[str, list[bool]] = defaultdict(list)
    failures: list[str] = []
    for (kind, dialogue), reply in zip(asked, replies, strict=True):
        last = dialogue.turns[-1]
        score[kind].append(reply == last.answer)
        if reply != last.answer:
            failures.append(f"{kind}/{last.kind}: {last.user!r} -> {reply!r}, not {last.answer!r}")
    return {kind: (sum(right), len(right)) for kind, right in score.items()}, failures


def report(folder: Path, seed: int = 1, *, parts: Sequence[str] = PARTS, show: bool = False) -> None:
    """Print the share of right answers on the wordings that were looked at (dev) and on those that were not (test)."""
    demo = Demo.open(folder)
    heldout = load("heldout")
    for part in parts:
        score, failures = measure(demo, heldout[part], seed)
        print(f"held out, {part}:")
        for kind, (right, count) in score.items():
            print(f"  {kind:22} {right:3}/{count:3}  {right / count:6.1%}")
        if show and part == "dev":
            print("\n".join(failures))


def main() -> None:
    """Measure a folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--part", choices=PARTS, help="only this part (default both)")
    parser.add_argument("--show", action="store_true", help="print the failures of the part that may be looked at")
    options = parser.parse_args()
    report(options.folder, options.seed, parts=[options.part] if options.part else PARTS, show=options.show)


if __name__ == "__main__":
    main()
