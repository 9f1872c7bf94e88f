"""The trained checkpoints of ../shared on a card: the answers that transformers wrote down."""

import json
from typing import Any

import pytest
import torch
from card import CARD, greedy, run
from support import SHARED, needs_shared

import lmx
from lmx.core.checkpoint import Checkpoint
from lmx.core.loader import load_model
from lmx.core.placement import Budget
from lmx.core.registry import MODEL_TYPES
from lmx.core.sampling import Sampling
from lmx.quant.apply import load_quantized
from lmx.quant.spec import QuantSpec

pytestmark = [pytest.mark.cuda, needs_shared, pytest.mark.parametrize("family", MODEL_TYPES)]
NEW_TOKENS = 48


def expected(family: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((SHARED / "checkpoints" / family / "expected.json").read_text())
    return found


def check_answers(model: Any, family: str) -> None:
    want = expected(family)
    for conversation in want["conversations"]:
        assert greedy(model, conversation["prompt_ids"], NEW_TOKENS, want["stop_ids"]) == conversation["greedy_ids"]


def test_greedy_ids_of_the_whole_model(family: str) -> None:
    model = load_model(Checkpoint.open(SHARED / "checkpoints" / family), dtype=torch.float32, device=CARD)
    check_answers(model, family)
    ids = torch.tensor([expected(family)["conversations"][0]["prompt_ids"]])
    apart = run(model, ids)[0, -1] - torch.tensor(expected(family)["last_logits_float32"])
    assert apart.abs().max() < 2e-3


@pytest.mark.parametrize("part", [0.35, 0.7])
def test_greedy_ids_of_a_split_model(family: str, part: float) -> None:
    source = Checkpoint.open(SHARED / "checkpoints" / family)
    whole = load_model(source, dtype=torch.float32, budgets=[Budget(CARD, 1 << 34)])
    total = sum(share.nbytes for share in whole.shares)
    model = load_model(source, dtype=torch.float32, budgets=[Budget(CARD, int(part * total))])
    assert model.decoder.placement is not None
    check_answers(model, family)


@pytest.mark.parametrize("scheme", ["bf16", "nf4", "int8"])
def test_rounding_keeps_the_choice(family: str, scheme: str) -> None:
    """The likeliest token of nearly every position is that of the CPU in float32."""
    source = Checkpoint.open(SHARED / "checkpoints" / family)
    exact = load_model(source, dtype=torch.float32)
    rounded = (
        load_model(source, dtype=torch.bfloat16, device=CARD)
        if scheme == "bf16"
        else load_quantized(source, spec=QuantSpec(scheme), dtype=torch.bfloat16, device=CARD)  # type: ignore[arg-type]
    )
    sequences = [torch.tensor([ids]) for ids in expected(family)["eval_ids"]]
    same = torch.cat([run(rounded, ids).argmax(-1)[0] == run(exact, ids).argmax(-1)[0] for ids in sequences])
    assert same.float().mean() >= (0.99 if scheme == "bf16" else 0.95)


def test_the_library_generates_on_the_card(family: str) -> None:
    """Through `lmx.load` and `generate`, as the command line does, whole and with little of the card's memory."""
    want = expected(family)
    for gpu_memory in (None, 3 << 20):
        folder = SHARED / "checkpoints" / family
        with lmx.load(folder, device="cuda", dtype="float32", gpu_memory=gpu_memory) as model:
            assert model.shares
            for conversation in want["conversations"]:
                prompt = conversation["prompt_ids"]
                *_, finished = model.generate(prompt, sampling=Sampling(), max_new_tokens=NEW_TOKENS)
                assert list(finished.token_ids) == conversation["greedy_ids"]
