"""The trained checkpoints of ../shared: tokens, logits and likelihoods that transformers wrote down in float32."""

import json
from functools import cache
from typing import Any

import pytest
import torch
from parity.families import FAMILIES, FamilyRow
from support import SHARED, needs_shared
from torch import Tensor

from lmx.core.checkpoint import Checkpoint
from lmx.core.loader import load_model
from lmx.core.model import LanguageModel

pytestmark = [needs_shared, pytest.mark.parametrize("row", FAMILIES, ids=str)]

NEW_TOKENS = 48


@cache
def trained(row: FamilyRow, dtype: torch.dtype) -> LanguageModel:
    return load_model(Checkpoint.open(SHARED / "checkpoints" / row.model_type), dtype=dtype)


@cache
def expected(row: FamilyRow) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((SHARED / "checkpoints" / row.model_type / "expected.json").read_text())
    return found


@cache
def eval_logits(row: FamilyRow, dtype: torch.dtype) -> list[Tensor]:
    """The logits of every evaluated sequence, [length, vocab]."""
    with torch.inference_mode():
        return [trained(row, dtype)(torch.tensor([ids])).logits[0] for ids in expected(row)["eval_ids"]]


def greedy(model: LanguageModel, prompt: list[int], stop_ids: list[int]) -> list[int]:
    state, ids, answer = model.make_state(), torch.tensor([prompt]), list[int]()
    with torch.inference_mode():
        while len(answer) < NEW_TOKENS and (not answer or answer[-1] not in stop_ids):
            token = model(ids, state=state, logits_to_keep=1).logits[0, -1].argmax()
            answer.append(int(token))
            ids = token.view(1, 1)
    return answer


def test_greedy_tokens(row: FamilyRow) -> None:
    model, want = trained(row, torch.float32), expected(row)
    for conversation in want["conversations"]:
        assert greedy(model, conversation["prompt_ids"], want["stop_ids"]) == conversation["greedy_ids"]


def test_last_logits(row: FamilyRow) -> None:
    want = expected(row)
    with torch.inference_mode():
        ids = torch.tensor([want["conversations"][0]["prompt_ids"]])
        logits = trained(row, torch.float32)(ids).logits[0, -1]
    assert (logits - torch.tensor(want["last_logits_float32"])).abs().max() < 1e-3


def test_likelihood(row: FamilyRow) -> None:
    total = tokens = 0.0
    for ids, logits in zip(expected(row)["eval_ids"], eval_logits(row, torch.float32), strict=True):
        total += float(torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="sum"))
        tokens += len(ids) - 1
    assert total / tokens == pytest.approx(expected(row)["eval_nll"], abs=1e-4)


def test_bfloat16_keeps_the_choice(row: FamilyRow) -> None:
    exact = torch.cat(eval_logits(row, torch.float32)).argmax(-1)
    rounded = torch.cat(eval_logits(row, torch.bfloat16)).argmax(-1)
    assert (exact == rounded).float().mean() >= 0.99
