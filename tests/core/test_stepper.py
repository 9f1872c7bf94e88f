"""Steps of noted kernels: to the bit what calling the model gives, for every family, whatever happens to the state."""

import pytest
import torch
from families import FAMILIES, config_of
from support import needs_kernels

from lmx.core.layers.rope import rotary_addresses, rotary_row, rotary_tables
from lmx.core.model import LanguageModel
from lmx.core.native import tape
from lmx.core.native.compiled import forced_path
from lmx.core.stepper import Stepper
from lmx.presets import build_dummy

TAPED = ("mixtral", "olmoe", "falcon_mamba", "recurrent_gemma")
"""Families whose layers are kernels alone on a CPU."""


def small(family: str, scheme: str | None = None, dtype: str = "bf16") -> LanguageModel:
    torch.manual_seed(0)
    return build_dummy(config_of(family), scheme, dtype=dtype)


def fresh(model: LanguageModel, prompt: torch.Tensor):
    state = model.make_state(len(prompt))
    with torch.no_grad():
        model(prompt, state=state)
    return state


def called(model: LanguageModel, ids: torch.Tensor, state) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, state=state, logits_to_keep=1).logits[:, -1]


def ids(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 60, (rows, columns), generator=torch.Generator().manual_seed(seed))


def same_states(one, other) -> bool:
    pairs = zip(one.layers, other.layers, strict=True)
    return one.length == other.length and all(
        torch.equal(x, y)
        for a, b in pairs
        for x, y in zip(a.tensors(one.length).values(), b.tensors(one.length).values(), strict=True)
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("scheme", "dtype"), [(None, "bf16"), ("nf4", "bf16"), ("int8", "fp32")])
def test_steps_are_calls_to_the_bit(family: str, rows: int, scheme: str | None, dtype: str) -> None:
    model = small(family, scheme, dtype)
    one, other = fresh(model, ids(rows, 5)), fresh(model, ids(rows, 5))
    stepper = model.stepper(one)
    for seed in range(9):
        step = ids(rows, 1, seed)
        assert torch.equal(stepper.feed(step), called(model, step, other))
    assert same_states(one, other)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheme", [None, "nf4"])
def test_a_single_rows_steps_are_calls_to_the_bit(family: str, scheme: str | None) -> None:
    model = small(family, scheme)
    one, other = fresh(model, ids(1, 5)), fresh(model, ids(1, 5))
    stepper = model.stepper(one)
    for token_id in (3, 1, 4, 1, 5, 9, 2, 6):
        logits = stepper.step(token_id)
        assert torch.equal(logits, called(model, torch.tensor([[token_id]]), other)[0])
        assert not logits.requires_grad
    assert same_states(one, other)


@needs_kernels
@pytest.mark.parametrize("family", TAPED)
def test_most_steps_call_kernels_alone(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(family, "nf4")
    state = fresh(model, ids(1, 5))
    stepper = model.stepper(state)
    stepper.feed(ids(1, 1))
    stepper.feed(ids(1, 1))
    monkeypatch.setattr(type(model.decoder), "run_layers", lambda *_: pytest.fail("a layer was called"))
    stepper.step(1)
    stepper.feed(ids(1, 1))
    assert state.length == 9


@needs_kernels
@pytest.mark.parametrize("family", TAPED)
def test_all_layers_of_a_step_are_one_call(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    played, play = [], tape._play

    def counted(calls: object, count: int) -> None:
        played.append(count)
        play()(calls, count)

    monkeypatch.setattr(tape, "_play", lambda: counted)
    model = small(family, "nf4")
    one, other = fresh(model, ids(1, 5)), fresh(model, ids(1, 5))
    stepper = model.stepper(one)
    for seed in range(6):
        assert torch.equal(stepper.feed(ids(1, 1, seed)), called(model, ids(1, 1, seed), other))
    assert 3 <= len(played) <= 5, "once a step, but for those that were noted"
    assert min(played) >= len(model.decoder.layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_token_of_a_text_is_no_other(family: str) -> None:
    model = small(family)
    one, other = model.make_state(), model.make_state()
    stepper = model.stepper(one)
    for seed in range(4):
        assert torch.equal(stepper.feed(ids(1, 1, seed)), called(model, ids(1, 1, seed), other))


@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
def test_a_cache_may_grow_and_be_cut(family: str) -> None:
    model = small(family)
    one, other = fresh(model, ids(1, 250)), fresh(model, ids(1, 250))
    stepper = model.stepper(one)
    for seed in range(12):  # over the 256 slots of the first buffer
        assert torch.equal(stepper.feed(ids(1, 1, seed)), called(model, ids(1, 1, seed), other))
    for state in (one, other):
        state.truncate(100)
    for seed in range(3):
        assert torch.equal(stepper.feed(ids(1, 1, seed)), called(model, ids(1, 1, seed), other))


@pytest.mark.parametrize("family", ["falcon_mamba", "recurrent_gemma"])
def test_a_clone_taken_between_steps_stays_as_it_was(family: str) -> None:
    model = small(family)
    state = fresh(model, ids(1, 5))
    stepper = model.stepper(state)
    stepper.feed(ids(1, 1, 1))
    stepper.feed(ids(1, 1, 2))
    kept = state.clone()
    first = stepper.feed(ids(1, 1, 3)).clone()
    stepper.feed(ids(1, 1, 4))
    assert torch.equal(model.stepper(kept).feed(ids(1, 1, 3)), first)


@pytest.mark.parametrize("family", TAPED)
def test_a_states_memory_may_be_exchanged_between_steps(family: str) -> None:
    model = small(family, "nf4")
    one, other = fresh(model, ids(1, 5)), fresh(model, ids(1, 5))
    stepper = model.stepper(one)

    def step_both(seed: int) -> None:
        assert torch.equal(stepper.feed(ids(1, 1, seed)), called(model, ids(1, 1, seed), other))

    step_both(0)
    step_both(1)
    for layer in one.layers:
        for name, value in list(vars(layer).items()):
            if isinstance(value, torch.Tensor):
                setattr(layer, name, value.clone())
                value.fill_(7)
    step_both(2)
    spares = one.clone(), other.clone()
    step_both(3)
    for state, spare in zip((one, other), spares, strict=True):  # in the list, not in a layer
        state.layers[-1] = spare.layers[-1]
    step_both(4)
    assert same_states(one, other)


def test_a_prompt_between_steps_changes_nothing() -> None:
    model = small("recurrent_gemma")
    one, other = fresh(model, ids(1, 5)), fresh(model, ids(1, 5))
    stepper = model.stepper(one)
    for seed in range(4):
        assert torch.equal(stepper.feed(ids(1, 1, seed)), called(model, ids(1, 1, seed), other))
        assert torch.equal(called(model, ids(1, 7, seed), one), called(model, ids(1, 7, seed), other))


def test_watched_modules_are_called() -> None:
    model = small("olmoe")
    seen: list[int] = []
    model.decoder.layers[1].register_forward_hook(lambda *_: seen.append(1))
    stepper = Stepper(model, fresh(model, ids(1, 5)))
    seen.clear()
    for seed in range(3):
        stepper.feed(ids(1, 1, seed))
    assert len(seen) == 3


@needs_kernels
@pytest.mark.parametrize("kernels", ["avx512", "avx2", "portable"])
def test_other_paths_too(kernels: str) -> None:
    with forced_path(kernels) as there:
        if not there:
            pytest.skip(f"this CPU has no {kernels}")
        test_steps_are_calls_to_the_bit("olmoe", 1, "nf4", "bf16")


def test_rows_of_different_lengths_are_called() -> None:
    model = small("mixtral")
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    states = [model.make_state(2) for _ in range(2)]
    with torch.no_grad():
        for state in states:
            model(ids(2, 3), attention_mask=mask, state=state)
    stepper = model.stepper(states[0])
    for seed in range(3):
        assert torch.equal(stepper.feed(ids(2, 1, seed)), called(model, ids(2, 1, seed), states[1]))


@needs_kernels
@pytest.mark.parametrize("family", TAPED)
def test_tokens_out_of_the_vocabulary_are_refused_and_change_nothing(family: str) -> None:
    model = small(family, "nf4")
    one, other = fresh(model, ids(1, 5)), fresh(model, ids(1, 5))
    stepper = model.stepper(one)
    for seed in range(4):
        assert torch.equal(stepper.feed(ids(1, 1, seed)), called(model, ids(1, 1, seed), other))
        for bad in (-1, model.config.vocab_size):
            with pytest.raises(IndexError):
                stepper.feed(torch.tensor([[bad]]))
            with pytest.raises(IndexError):
                stepper.step(bad)
    assert one.length == other.length
    assert torch.equal(stepper.feed(ids(1, 1)), called(model, ids(1, 1), other))


@pytest.mark.parametrize("width", [8, 10, 14, 128])
def test_kept_rotary_tables_are_those_of_the_positions(width: int) -> None:
    for position in (0, 1, 255, 256, 5000, 70000):
        expected = rotary_tables(torch.tensor([[position]]), width, 1e4)
        for kept, table in zip(rotary_row(position, width, 1e4), expected, strict=True):
            torch.testing.assert_close(kept, table, rtol=0, atol=1e-6)
        addresses = rotary_addresses(position, width, 1e4)
        assert addresses == tuple(table.data_ptr() for table in rotary_row(position, width, 1e4))
