"""The trained checkpoints of ../shared by captured steps: the tokens that transformers wrote down in float32."""

import json
from collections.abc import Iterator
from contextlib import closing

import pytest
import torch
from device_bank import with_device_banks
from frozen_graph import FrozenGraph
from graph_steps import MakeGraph, assert_same, read, torch_alone
from parity.families import FAMILIES, FamilyRow
from support import SHARED, needs_shared

from lmx.core.checkpoint import Checkpoint
from lmx.core.graph_stepper import CudaGraph, GraphStepper
from lmx.core.loader import load_model
from lmx.core.sampling import Sampler, Sampling

NEW_TOKENS = 48
DEVICES = [
    pytest.param("cpu", FrozenGraph, id="cpu"),
    pytest.param(
        "cuda",
        CudaGraph,
        id="cuda",
        marks=[
            pytest.mark.cuda,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU, or a torch without CUDA"),
        ],
    ),
]


@pytest.fixture(autouse=True)
def _torch_alone() -> Iterator[None]:
    with torch_alone():
        yield


@needs_shared
@pytest.mark.parametrize("row", FAMILIES, ids=str)
@pytest.mark.parametrize(("device", "make_graph"), DEVICES)
def test_greedy_tokens(row: FamilyRow, device: str, make_graph: MakeGraph) -> None:
    folder = SHARED / "checkpoints" / row.model_type
    model = with_device_banks(load_model(Checkpoint.open(folder), dtype=torch.float32)).to(device)
    want = json.loads((folder / "expected.json").read_text())
    for conversation in want["conversations"][:3]:
        ids, answer = conversation["prompt_ids"], list[int]()
        state, logits = read(model, torch.tensor([ids]))
        stepper = GraphStepper(model, state, make_graph)
        with closing(stepper.choices(logits[0], Sampler(Sampling(), ids), NEW_TOKENS)) as choices:
            for chosen in choices:
                answer.append(chosen.token_id)
                if chosen.token_id in want["stop_ids"]:
                    break
        assert answer == conversation["greedy_ids"]
        assert stepper.refusal is None
        assert_same(state, read(model, torch.tensor([[*ids, *answer[:-1]]]))[0], 1e-3)
