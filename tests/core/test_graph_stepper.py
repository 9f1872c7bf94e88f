"""Captured steps: token for token what calling the model gives, for every family, with nothing of the host in them.

The CPU has no graphs; `FrozenGraph` stands in for one, and bakes in whatever Python did at capture, as a graph does.
"""

import itertools
from collections.abc import Iterator
from contextlib import closing

import pytest
import torch
from device_bank import with_device_banks
from families import CONFIGS, FAMILIES, config_of
from frozen_graph import FrozenGraph
from graph_steps import GREEDY, PLAIN, assert_same, called, graphed, prompt, read, small, torch_alone

from lmx.core.errors import InputError
from lmx.core.graph_stepper import GraphStepper, reason_against
from lmx.core.loader import build
from lmx.core.recurrent_state import RecurrentState
from lmx.core.sampling import Sampler, Sampling
from lmx.core.state import StateError
from lmx.core.static_step import slots_for
from lmx.presets import build_dummy
from lmx.quant.modules import QuantLinear


@pytest.fixture(autouse=True)
def _torch_alone() -> Iterator[None]:
    """The paths that a card takes: kernels of the CPU would not be seen by the stand-in."""
    with torch_alone():
        yield


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("sampling", "limit"), [(PLAIN, None), (GREEDY, None), (GREEDY, 30)])
def test_tokens_and_the_state_are_those_of_calls(family: str, sampling: Sampling, limit: int | None) -> None:
    model = small(family)
    (one, logits), (other, _) = read(model, prompt(9)), read(model, prompt(9))
    tokens = graphed(model, one, logits, Sampler(sampling, []), 30, limit)
    assert tokens == called(model, other, logits, Sampler(sampling, []), 30)
    assert len(set(tokens)) > 12 or sampling is PLAIN
    assert_same(one, other)
    # and the state goes on
    again = read(model, prompt(9))[0]
    with torch.no_grad():
        rest = torch.tensor([tokens[-1:]])
        model(torch.tensor([tokens[:-1]]), state=again)
        torch.testing.assert_close(model(rest, state=one).logits, model(rest, state=again).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "dbrx"])
@pytest.mark.parametrize("start", [250, 505])
def test_over_the_border_of_a_size(family: str, start: int) -> None:
    model = small(family)
    (one, logits), (other, _) = read(model, prompt(start)), read(model, prompt(start))
    assert graphed(model, one, logits, Sampler(GREEDY, []), 14) == called(model, other, logits, Sampler(GREEDY, []), 14)
    assert_same(one, other)


@pytest.mark.parametrize(
    ("family", "changes"),
    [("recurrent_gemma", {}), ("recurrent_gemma", {"attention_window_size": 300}), ("mixtral", {"sliding_window": 8})],
)
@pytest.mark.parametrize("start", [3, 252, 296])
def test_around_a_ring(family: str, changes: dict[str, object], start: int) -> None:
    model = small(family, **changes)
    (one, logits), (other, _) = read(model, prompt(start)), read(model, prompt(start))
    assert graphed(model, one, logits, Sampler(GREEDY, []), 25) == called(model, other, logits, Sampler(GREEDY, []), 25)
    assert_same(one, other)


SAMPLINGS = [
    Sampling(temperature=0.9, seed=1),
    Sampling(temperature=1.3, top_k=12, seed=2),
    Sampling(temperature=1.0, top_p=0.7, seed=3),
    Sampling(temperature=1.0, min_p=0.3, seed=4),
    Sampling(temperature=1.5, top_k=30, top_p=0.9, min_p=0.05, repeat_penalty=1.2, seed=5),
    Sampling(repeat_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.4),
]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("family", ["falcon_mamba", "olmoe"])
def test_sampled_tokens_are_those_of_the_host(family: str, sampling: Sampling) -> None:
    model = small(family)
    (one, logits), (other, _) = read(model, prompt(9)), read(model, prompt(9))
    ids = prompt(9)[0].tolist()
    tokens = graphed(model, one, logits, Sampler(sampling, ids), 40)
    assert tokens == called(model, other, logits, Sampler(sampling, ids), 40)
    assert len(set(tokens)) > 5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stop", [1, 2, 3, 9])
def test_a_step_that_ran_ahead_is_taken_back_to_the_bit(family: str, stop: int) -> None:
    """An answer that is given up after some tokens leaves what one with that limit leaves, which never ran ahead."""
    model = small(family)
    (one, logits), (other, _) = read(model, prompt(14)), read(model, prompt(14))
    tokens = graphed(model, one, logits, Sampler(GREEDY, []), stop)
    assert tokens == graphed(model, other, logits, Sampler(GREEDY, []), stop, limit=stop)
    assert one.length == other.length == 14 + stop - 1
    assert_same(one, other, 0.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_at_every_token_the_state_is_whole(family: str) -> None:
    model = small(family)
    state, logits = read(model, prompt(9))
    held = prompt(9)[0].tolist()
    with closing(GraphStepper(model, state, FrozenGraph).choices(logits[0], Sampler(GREEDY, []), 12)) as choices:
        for chosen in choices:
            held.append(chosen.token_id)
            assert state.length in (len(held), len(held) - 1)
            assert_same(state.clone(), read(model, torch.tensor([held[: state.length]]))[0])
    assert state.length == len(held) - 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", [1, 3])
def test_fed_tokens_give_the_logits_of_calls(family: str, rows: int) -> None:
    model = small(family)
    (one, _), (other, _) = read(model, prompt(5, rows)), read(model, prompt(5, rows))
    stepper = GraphStepper(model, one, FrozenGraph)
    with torch.no_grad():
        for seed in range(20):
            step = prompt(1, rows, seed)
            expected = model(step, state=other).logits[:, -1]
            torch.testing.assert_close(stepper.feed(step), expected, rtol=1e-4, atol=1e-4)
            if seed % 7 == 6:  # a call between steps moves a recurrence's state
                more = prompt(4, rows, seed)
                torch.testing.assert_close(model(more, state=one).logits, model(more, state=other).logits)
    assert stepper.refusal is None
    assert_same(one, other)


@pytest.mark.parametrize("family", ["falcon_mamba", "recurrent_gemma"])
def test_kernels_may_write_to_the_state_themselves(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(family)
    other, logits = read(model, prompt(9))
    expected = called(model, other, logits, Sampler(GREEDY, []), 12)

    def keep(self: RecurrentState, conv: torch.Tensor, hidden: torch.Tensor) -> None:
        self.conv.copy_(conv)
        self.hidden.copy_(hidden)

    monkeypatch.setattr(RecurrentState, "keep", keep)
    state, logits = read(model, prompt(9))
    assert graphed(model, state, logits, Sampler(GREEDY, []), 12) == expected
    assert_same(state, other)


def test_fed_and_chosen_by_turns() -> None:
    model = small("recurrent_gemma")
    (one, _), (other, _) = read(model, prompt(5)), read(model, prompt(5))
    stepper = GraphStepper(model, one, FrozenGraph)
    for seed in range(3):
        with torch.no_grad():
            logits, expected = stepper.feed(prompt(1, 1, seed)), model(prompt(1, 1, seed), state=other).logits[:, -1]
        with closing(stepper.choices(logits[0], Sampler(GREEDY, []), None)) as choices:
            tokens = [chosen.token_id for chosen in itertools.islice(choices, 6)]
        assert tokens == called(model, other, expected, Sampler(GREEDY, []), 6)
    assert_same(one, other)


@pytest.mark.parametrize("family", FAMILIES)
def test_most_steps_are_replays(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(family)
    state, logits = read(model, prompt(9))
    with closing(GraphStepper(model, state, FrozenGraph).choices(logits[0], Sampler(GREEDY, []))) as choices:
        for _ in range(2):
            next(choices)
        places = [buffer.data_ptr() for layer in state.layers for buffer in layer.buffers]
        monkeypatch.setattr(type(model.decoder), "run_layers", lambda *_: pytest.fail("a layer was called"))
        for _ in range(20):
            next(choices)
        assert places == [buffer.data_ptr() for layer in state.layers for buffer in layer.buffers]


def test_rows_of_different_lengths_are_called() -> None:
    model = small("mixtral")
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    states = [model.make_state(2) for _ in range(2)]
    with torch.no_grad():
        for state in states:
            model(prompt(3, 2), attention_mask=mask, state=state)
        stepper = GraphStepper(model, states[0], FrozenGraph)
        for seed in range(3):
            expected = model(prompt(1, 2, seed), state=states[1]).logits[:, -1]
            torch.testing.assert_close(stepper.feed(prompt(1, 2, seed)), expected)


def test_where_a_capture_fails_steps_run_one_by_one() -> None:
    torch.manual_seed(0)
    model = build_dummy(config_of("olmoe"), None, dtype="fp32")  # its banks ask the host
    (one, logits), (other, _) = read(model, prompt(9)), read(model, prompt(9))
    stepper = GraphStepper(model, one, FrozenGraph)
    with closing(stepper.choices(logits[0], Sampler(GREEDY, []))) as choices:
        tokens = [chosen.token_id for chosen in itertools.islice(choices, 12)]
    assert tokens == called(model, other, logits, Sampler(GREEDY, []), 12)
    assert stepper.refusal is not None
    assert_same(one, other)


def test_a_state_that_is_changed_under_an_answer_is_found() -> None:
    model = small("olmoe")
    state, logits = read(model, prompt(9))
    choices = GraphStepper(model, state, FrozenGraph).choices(logits[0], Sampler(GREEDY, []))
    next(choices)
    state.truncate(4)
    with pytest.raises(StateError, match="changed"):
        next(choices)
    assert state.length == 4


def test_an_answer_closed_too_late_changes_nothing() -> None:
    model = small("falcon_mamba")
    (state, logits), (other, _) = read(model, prompt(9)), read(model, prompt(9))
    choices = GraphStepper(model, state, FrozenGraph).choices(logits[0], Sampler(GREEDY, []))
    tokens = [next(choices).token_id for _ in range(4)]
    for held in (state, other):  # the step ahead has put the last token in
        more = prompt(3, seed=1) if held is state else torch.cat((torch.tensor([tokens]), prompt(3, seed=1)), 1)
        with torch.no_grad():
            model(more, state=held)
    choices.close()
    assert_same(state, other)


def test_nan_is_found_and_the_state_stays_whole() -> None:
    model = small("falcon_mamba")
    state, logits = read(model, prompt(9))
    with closing(GraphStepper(model, state, FrozenGraph).choices(logits[0], Sampler(GREEDY, []))) as choices:
        token = next(choices).token_id
        model.head.weight.data[:] = torch.nan
        next(choices)  # was computed ahead
        with pytest.raises(InputError, match="NaN"):
            next(choices)
    assert token
    assert state.length == 9 + 2


def test_what_is_captured_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small("olmoe")
    assert "CUDA" in (reason_against(model) or "")
    assert not isinstance(model.stepper(model.make_state()), GraphStepper)
    with torch.device("meta"):
        card = build(config_of("olmoe")).eval()
    monkeypatch.setattr("lmx.core.graph_stepper._DEVICE", "meta")
    assert "decoder.layers.0.mlp.experts needs the host" in (reason_against(card) or "")
    assert reason_against(with_device_banks(card)) is None
    assert isinstance(card.stepper(card.make_state()), GraphStepper)
    card.attention = "flash"
    assert "sdpa" in (reason_against(card) or "")
    card.attention = "sdpa"
    hook = card.decoder.layers[1].register_forward_hook(lambda *_: None)
    assert "watches" in (reason_against(card) or "")
    hook.remove()
    card.decoder.norm.to_empty(device="cpu")
    assert "several devices" in (reason_against(card) or "")


def test_llm_int8_asks_the_host() -> None:
    capturable = [
        layer.capturable
        for scheme in ("nf4", "int8")
        for layer in build_dummy(config_of("falcon_mamba"), scheme, dtype="fp32").modules()
        if isinstance(layer, QuantLinear)
    ]
    half = len(capturable) // 2
    assert capturable == [True] * half + [False] * half
    assert half > 0


@pytest.mark.parametrize(
    ("tokens", "slots"),
    [(1, 256), (256, 256), (257, 512), (513, 768), (769, 1024), (1025, 1536), (1537, 2048), (2049, 3072), (4096, 4096)],
)
def test_sizes(tokens: int, slots: int) -> None:
    assert slots_for(small("olmoe").make_state().layers, tokens) == slots
    assert slots_for(small("falcon_mamba").make_state().layers, tokens) == 1
    assert slots_for(small("recurrent_gemma").make_state().layers, tokens) == 17


def test_all_families_are_here() -> None:
    assert len(CONFIGS) == 5
