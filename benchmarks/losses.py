"""What quantizing loses, scheme by scheme and head by head: losses, divergences and replies beside the plain model's.

    python benchmarks/losses.py                # the demo, on dialogues that it was not trained on
    python benchmarks/losses.py FOLDER...      # checkpoints that bring an expected.json, as the tests' do

expected.json holds `eval_ids`, sequences of token ids, and `conversations` with `prompt_ids` and `greedy_ids`. Models
run in float32; heads are compared in bfloat16, on an NF4 model, with a plain head. KL is KL(plain || quantized) in nats
a token; replies are greedy answers that stay the same.
"""

import argparse
import json
import random
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import geometric_mean

import torch

from lmx.api import demo_path
from lmx.core.checkpoint import Checkpoint
from lmx.core.evaluate import Evaluation, evaluate
from lmx.core.loader import load_model
from lmx.core.model import LanguageModel
from lmx.core.text.tokenizer import Tokenizer
from lmx.core.text.types import Message
from lmx.quant.apply import HeadScheme, load_quantized
from lmx.quant.spec import QuantSpec, Scheme

SCHEMES: tuple[Scheme, ...] = ("int8", "qint8", "qfloat8", "nf4", "qint4", "fp4", "qint2")
HEADS: tuple[HeadScheme, ...] = ("int8", "nf4")
DEMO_DIALOGUES = 100

Reply = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Subject:
    """A checkpoint and what it is asked: sequences to predict, and prompts with the answers that are expected."""

    folder: Path
    sequences: list[list[int]]
    replies: list[Reply]

    @classmethod
    def open(cls, folder: Path) -> "Subject":
        """A folder with an expected.json, or the demo."""
        if folder == demo_path():
            replies = demo_replies(folder)
            return cls(folder, [prompt + answer for prompt, answer in replies], replies)
        expected = json.loads((folder / "expected.json").read_text())
        replies = [(said["prompt_ids"], said["greedy_ids"]) for said in expected["conversations"]]
        return cls(folder, expected["eval_ids"], replies)

    @cached_property
    def plain(self) -> LanguageModel:
        """The model in float32."""
        return load_model(Checkpoint.open(self.folder), dtype=torch.float32)

    def lost(self, scheme: Scheme) -> tuple[Evaluation, float, int]:
        """The comparison with the plain model, the change of loss, and how many replies stay."""
        model = load_quantized(Checkpoint.open(self.folder), spec=QuantSpec(scheme), dtype=torch.float32)
        found = evaluated(model, self.sequences, self.plain)
        stay = sum(is_greedy(model, *reply) for reply in self.greedy)
        return found, found.nll - self.loss, stay

    @cached_property
    def loss(self) -> float:
        """Of the plain model, nats a token."""
        return evaluated(self.plain, self.sequences).nll

    @cached_property
    def greedy(self) -> list[Reply]:
        """The replies that the plain model gives."""
        return [reply for reply in self.replies if is_greedy(self.plain, *reply)]

    def with_head(self, head: HeadScheme | None) -> LanguageModel:
        """The model in NF4, in bfloat16, its head quantized so."""
        source = Checkpoint.open(self.folder)
        return load_quantized(source, spec=QuantSpec("nf4"), head_scheme=head, dtype=torch.bfloat16)


def demo_replies(folder: Path) -> list[Reply]:
    """Dialogues whose last question is one of the held-out ones, each with the answer that is right."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
    from demo_dialogues import Maker, load
    from demo_evaluate import questions

    tokenizer, rng = Tokenizer.load(folder), random.Random(1)
    asked = questions(load("heldout")["test"], Maker(1), rng)
    ends = list(tokenizer.info.end_of_turn_ids[:1])
    replies = []
    for _, dialogue in rng.sample(asked, DEMO_DIALOGUES):
        *before, answer = (Message(role=said["role"], content=said["content"]) for said in dialogue.messages)
        ids = tokenizer.encode(answer["content"], add_special_tokens=False)
        replies.append((tokenizer.encode_chat(before).ids, ids + ends))
    return replies


def evaluated(model: LanguageModel, sequences: list[list[int]], base: LanguageModel | None = None) -> Evaluation:
    """The result over all sequences."""
    *_, result = evaluate(model, sequences, base)
    if not isinstance(result, Evaluation):
        raise TypeError("an evaluation ends with its result")
    return result


@torch.no_grad()
def is_greedy(model: LanguageModel, prompt: list[int], answer: list[int]) -> bool:
    """Whether each token of an answer is the likeliest after those before it: then greedy decoding finds it."""
    logits = model(torch.tensor([prompt + answer]), logits_to_keep=len(answer) + 1).logits[0, :-1]
    return logits.argmax(-1).tolist() == answer


def report(subjects: list[Subject], schemes: list[Scheme]) -> None:
    """Print a table for each scheme, then the loss of each head."""
    for subject in subjects:
        print(f"{subject.folder.name}: loss {subject.loss:.5f}, {len(subject.greedy)} replies")
    for scheme in schemes:
        print(f"{scheme:12}    loss        KL    same top  same experts  drift  replies")
        found = {subject.folder.name: subject.lost(scheme) for subject in subjects}
        for (name, (result, change, stay)), subject in zip(found.items(), subjects, strict=True):
            shares = (result.top1_agreement, result.routing_agreement, result.state_drift)
            top, experts, drift = ("" if share is None else f"{share:.3f}" for share in shares)
            kept = f"{stay} of {len(subject.greedy)}"
            print(f"  {name:16}{change:+.5f}  {result.kl_divergence:.1e}  {top:>6}  {experts:>6}  {drift:>6}  {kept}")
        mean = geometric_mean(result.kl_divergence or 0 for result, _, _ in found.values())
        print(f"  {'mean KL, worst':16}{max(change for _, change, _ in found.values()):+.5f}  {mean:.1e}", flush=True)
    for subject in subjects:
        report_heads(subject)


def report_heads(subject: Subject) -> None:
    """Print what each scheme of the head costs, beside a plain one on the same layers."""
    base, said = subject.with_head(None), []
    loss = evaluated(base, subject.sequences).nll
    for head in HEADS:
        found = evaluated(subject.with_head(head), subject.sequences, base)
        said.append(f"{head} {found.nll - loss:+.5f} (KL {found.kl_divergence:.1e})")
    print(f"heads of {subject.folder.name}: {', '.join(said)}", flush=True)


def main() -> None:
    """Measure the demo or the folders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*", metavar="FOLDER")
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=SCHEMES)
    parser.add_argument("--threads", type=int, default=1, help="small models gain nothing from more")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report([Subject.open(folder) for folder in options.folders or [demo_path()]], list(options.schemes))


if __name__ == "__main__":
    main()
