"""Captured steps on a card: those of `test_graph_stepper`, with the graph itself in place of its stand-in."""

import itertools
from contextlib import closing

import pytest
import torch
from families import FAMILIES, config_of
from graph_steps import GREEDY, assert_same, called, graphed, prompt, read, small

from lmx.core.device_sampling import DeviceSampler
from lmx.core.gpu.launch import why_not
from lmx.core.graph_stepper import CudaGraph, GraphStepper, reason_against
from lmx.core.model import LanguageModel
from lmx.core.sampling import Sampler, Sampling
from lmx.core.static_step import StaticStep
from lmx.presets import build_dummy

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here, or a build of torch without CUDA"),
]


def on_card(family: str, scheme: str | None = None, dtype: str = "fp32", **changes: object) -> LanguageModel:
    return small(family, scheme, dtype, **changes).to("cuda")


def graphed_on_card(
    model: LanguageModel, columns: int, sampler: Sampler, count: int, limit: int | None = None
) -> tuple[list[int], object]:
    state, logits = read(model, prompt(columns))
    return graphed(model, state, logits, sampler, count, limit, make_graph=CudaGraph), state


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("columns", [9, 250])
def test_tokens_and_the_state_are_those_of_calls(family: str, columns: int) -> None:
    model = on_card(family)
    tokens, one = graphed_on_card(model, columns, Sampler(GREEDY, []), 40)
    other, logits = read(model, prompt(columns))
    assert tokens == called(model, other, logits, Sampler(GREEDY, []), 40)
    assert_same(one, other, 1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_replays_are_steps_to_the_bit(family: str) -> None:
    model = on_card(family, dtype="bf16")
    one, other = read(model, prompt(9))[0], read(model, prompt(9))[0]
    stepper, static = GraphStepper(model, one), StaticStep(model, other, None)
    with torch.no_grad():
        for seed in range(12):
            static.tokens.copy_(prompt(1, 1, seed))
            static.run()
            static.count()
            assert torch.equal(stepper.feed(prompt(1, 1, seed).cuda()), static.logits)
    assert stepper.refusal is None
    assert_same(one, other, 0.0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stop", [1, 2, 3, 7])
def test_a_step_that_ran_ahead_is_taken_back_to_the_bit(family: str, stop: int) -> None:
    model = on_card(family)
    tokens, one = graphed_on_card(model, 14, Sampler(GREEDY, []), stop)
    again, other = graphed_on_card(model, 14, Sampler(GREEDY, []), stop, limit=stop)
    assert tokens == again
    assert_same(one, other, 0.0)


@pytest.mark.parametrize("family", ["falcon_mamba", "recurrent_gemma"])
def test_four_bit_layers_are_captured(family: str) -> None:
    model = on_card(family, "nf4", "bf16")
    assert reason_against(model) is None
    tokens, one = graphed_on_card(model, 9, Sampler(GREEDY, []), 30)
    assert len(tokens) == 30
    assert one.length == 9 + 29


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "dbrx"])
@pytest.mark.parametrize("scheme", [None, "nf4"])
def test_banks_of_triton_are_captured(family: str, scheme: str | None) -> None:
    torch.manual_seed(0)
    model = build_dummy(config_of(family), scheme, dtype="bf16").to("cuda")
    if (obstacle := why_not(model.device)) is not None:
        pytest.skip(obstacle)
    assert reason_against(model) is None
    one, other = read(model, prompt(9))[0], read(model, prompt(9))[0]
    stepper = GraphStepper(model, one)
    apart = []
    with torch.no_grad():
        for seed in range(8):
            token = prompt(1, 1, seed).cuda()
            expected = model(token, state=other).logits[:, -1]
            apart.append(float((stepper.feed(token) - expected).norm() / expected.norm()))
    assert sorted(apart)[4] < 0.02, apart  # of a typical token: an expert may be chosen by a hair
    assert stepper.refusal is None


def test_llm_int8_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where our own kernel does not serve few vectors."""
    monkeypatch.setattr("lmx.quant.modules.serves_few", lambda matrix: False)
    monkeypatch.setattr("lmx.quant.matmul.device_matrix", lambda matrix: None)
    model = build_dummy(config_of("falcon_mamba"), "int8", dtype="fp16").to("cuda")
    assert "host" in (reason_against(model) or "")
    state, logits = read(model, prompt(9))
    with closing(model.stepper(state).choices(logits[0], Sampler(GREEDY, []), 6)) as choices:
        assert len(list(itertools.islice(choices, 6))) == 6


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_never_waits_for_the_device(family: str) -> None:
    model = on_card(family)
    state, logits = read(model, prompt(9))
    step = StaticStep(model, state, Sampler(Sampling(temperature=1.0, top_k=9, top_p=0.9, seed=1), [1]))
    with torch.no_grad():
        step.prepare()
        step.choose(logits[0])
        step.run()  # may make what it keeps
        torch.cuda.set_sync_debug_mode("error")
        try:
            step.run()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0, seed=1),
        Sampling(temperature=1.2, top_k=30, top_p=0.9, min_p=0.02, repeat_penalty=1.2, seed=2),
        GREEDY,
    ],
    ids=str,
)
def test_a_seed_means_the_same_as_on_the_host(sampling: Sampling) -> None:
    device = torch.device("cuda")
    here, there = Sampler(sampling, [1, 2]), DeviceSampler(Sampler(sampling, [1, 2]), 32000, device)
    same = 0
    for seed in range(200):
        logits = torch.randn(32000, generator=torch.Generator().manual_seed(seed)) * 3
        there.prepare()
        same += int(there.choose(logits.to(device))[0]) == here.next(logits)[0]
    assert same >= 198  # an exponential that is rounded differently may move a border
