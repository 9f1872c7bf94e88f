"""What the demo model is trained on: nothing held out, the same for the same seed, as its template renders it."""

import sys
from pathlib import Path

import pytest
from support import ROOT
from tokenizers import Tokenizer as RawTokenizer

import lmx
from lmx.core.text.tokenizer import Tokenizer

sys.path.insert(0, str(ROOT / "examples"))

from demo_dialogues import Maker, heldout_lines, load, normalise
from train_demo import IGNORED, Stage, batches, encode

DEMO = Path(lmx.__file__).parent / "demo"


@pytest.fixture(scope="module")
def maker() -> Maker:
    return Maker(5)


def test_nothing_held_out_is_trained(maker: Maker) -> None:
    heldout = load("heldout")
    lines = {normalise(line) for part in ("dev", "test") for line in heldout_lines(heldout[part]) if "{" not in line}
    values = {value for kind in heldout["values"].values() for value in kind}
    assert len(lines) > 300
    for _ in range(1500):
        for turn in maker.dialogue(memories=0.9, echoes=0.1, sums=0.1).turns:
            assert normalise(turn.user) not in lines
            assert not any(f" {value}." in turn.answer or f" {value}!" in turn.answer for value in values)


def test_held_out_questions_ask_for_what_is_taught(maker: Maker) -> None:
    known = {intent["name"] for kind in maker.intents.values() for intent in kind}
    heldout = load("heldout")
    for part in ("dev", "test"):
        for kind in ("command", "fact", "unknown"):
            assert set(heldout[part][kind]) <= known


def test_a_seed_decides_everything() -> None:
    one, same, other = ([maker.dialogue() for _ in range(50)] for maker in (Maker(3), Maker(3), Maker(4)))
    assert one == same
    assert one != other


def test_answers_follow_from_what_was_said(maker: Maker) -> None:
    """In each dialogue, the last name that was told is the one that is given back; sums are right."""
    asked = 0
    for _ in range(1500):
        dialogue = maker.dialogue()
        name = None
        for turn in dialogue.turns:
            if turn.kind == "sum":
                a, _, b, _, total = turn.answer.rstrip(".").split()
                assert int(a) + int(b) == int(total)
            if turn.answer.startswith("Nice to meet you, "):
                name = turn.answer.removeprefix("Nice to meet you, ").split("!")[0]
                assert name in turn.user
            if turn.answer.startswith("All right, I will call you "):
                name = turn.answer.removeprefix("All right, I will call you ").split(".")[0]
                assert name in turn.user
            if turn.answer.startswith("Your name is "):
                given = turn.answer.removeprefix("Your name is ").rstrip(".")
                assert given == name or (name is None and given in dialogue.system)
                asked += 1
    assert asked > 100


def test_training_reads_a_dialogue_as_the_template_renders_it(maker: Maker) -> None:
    raw = RawTokenizer.from_file(str(DEMO / "tokenizer.json"))
    codec = Tokenizer.load(DEMO)
    end = codec.info.eos_id
    for _ in range(100):
        dialogue = maker.dialogue()
        ids, labels = encode(dialogue, raw)
        assert ids == codec.encode_chat(dialogue.messages, add_generation_prompt=False).ids
        answers = [codec.encode(turn.answer, add_special_tokens=False) for turn in dialogue.turns]
        assert [label for label in labels if label != IGNORED] == [i for answer in answers for i in [*answer, end]]


def test_batches_keep_to_their_size(maker: Maker) -> None:
    raw = RawTokenizer.from_file(str(DEMO / "tokenizer.json"))
    stream = batches(maker, raw, Stage(1, 64, 1000))
    for _ in range(30):
        ids, labels = next(stream)
        assert ids.shape == labels.shape
        assert ids.shape[1] <= 64
        assert ids.numel() <= 1000
