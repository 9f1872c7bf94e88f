"""What a state promises beside continuing exactly: independent copies, honest sizes, and no half-done truncation."""

import pytest
import torch
from parity.families import FALCON_MAMBA, FAMILIES, RECURRENT, RECURRENT_GEMMA, FamilyRow, pair, random_ids
from torch import Tensor

from lmx.core.kv_cache import KVCache
from lmx.core.model import AnyState, LanguageModel
from lmx.core.recurrent_state import MambaState
from lmx.core.state import State, StateError


@pytest.fixture(autouse=True)
def _no_gradients() -> "object":
    with torch.no_grad():  # no inference mode: models made in it could not be trained by the tests that share them
        yield


def windowed_gemma() -> LanguageModel:
    """A RecurrentGemma with both kinds of layer and a window that a few tokens fill."""
    for index in range(12):
        config = pair(RECURRENT_GEMMA, index).config
        kinds = set(config["block_types"][: config["num_hidden_layers"]])
        if kinds == {"recurrent", "attention"} and config["attention_window_size"] <= 8:
            return pair(RECURRENT_GEMMA, index).ours
    raise LookupError("no index has such a model")


def after(model: LanguageModel, *lengths: int, batch: int = 1) -> AnyState:
    """A state that calls of these lengths have filled."""
    state = model.make_state(batch)
    for length in lengths:
        model(random_ids(batch, length), state=state)
    return state


def contents(state: AnyState) -> list[Tensor]:
    return [tensor.clone() for layer in state.layers for tensor in layer.tensors(state.length).values()]


@pytest.mark.parametrize("row", FAMILIES, ids=str)
def test_clones_are_independent(row: FamilyRow) -> None:
    model = pair(row, 0).ours
    state = after(model, 5)
    clone, kept = state.clone(), contents(state)
    model(random_ids(1, 6), state=clone)
    model(random_ids(1, 1), state=clone)
    assert (state.length, clone.length) == (5, 12)
    assert all(torch.equal(mine, before) for mine, before in zip(contents(state), kept, strict=True))


def test_a_clone_has_row_lengths_of_its_own() -> None:
    model = pair(FALCON_MAMBA, 0).ours
    state = model.make_state(2)
    model(random_ids(2, 3), attention_mask=torch.tensor([[1, 1, 1], [0, 1, 1]]), state=state)
    clone = state.clone()
    model(random_ids(2, 2), state=clone)
    assert state.lengths is not None
    assert clone.lengths is not None
    assert (state.lengths.tolist(), clone.lengths.tolist()) == ([3, 2], [5, 4])


def test_falcon_mamba_does_not_grow() -> None:
    model = pair(FALCON_MAMBA, 0).ours
    sizes = {after(model, *lengths).nbytes for lengths in ((), (1,), (40,), (300, 1, 7))}
    config = model.config
    per_layer = config.intermediate_size * (config.state_size + config.conv_kernel - 1) * 4
    assert sizes == {config.layers * per_layer}


def test_recurrent_gemma_is_bounded_by_its_window() -> None:
    model = windowed_gemma()
    assert len({after(model, *lengths).nbytes for lengths in ((), (1,), (2, 40), (300, 1, 7))}) == 1


@pytest.mark.parametrize("row", FAMILIES[:3], ids=str)
def test_a_whole_cache_grows_with_the_text_and_by_no_more_than_half(row: FamilyRow) -> None:
    model = pair(row, 0).ours  # no window
    per_token = sum(tensor[:, :, :1].nbytes for tensor in contents(after(model, 1)))
    for lengths in ((300,), (300, 300), (250, *[1] * 20)):
        held = sum(lengths)
        assert held * per_token <= after(model, *lengths).nbytes <= (held * 1.5 + 256) * per_token


@pytest.mark.parametrize("row", FAMILIES, ids=str)
def test_any_state_can_be_emptied(row: FamilyRow) -> None:
    model = windowed_gemma() if row is RECURRENT_GEMMA else pair(row, 0).ours
    ids, state = random_ids(1, 9, seed=3), after(model, 12, 1)
    state.truncate(0)
    assert state.length == 0
    assert torch.equal(model(ids, state=state).logits, model(ids, state=model.make_state()).logits)


def test_an_emptied_ring_is_as_good_as_new() -> None:
    model = pair(FAMILIES[0], 2).ours
    assert model.config.sliding_window is not None
    ids, state = random_ids(1, 9, seed=3), after(model, 30)
    state.truncate(0)
    steps = [model(part, state=state).logits for part in ids.split((4, 1, 4), 1)]
    assert (torch.cat(steps, 1) - model(ids).logits).abs().max() < 1e-4


@pytest.mark.parametrize("row", RECURRENT, ids=str)
def test_what_cannot_be_cut_says_so_and_stays_whole(row: FamilyRow) -> None:
    model = windowed_gemma() if row is RECURRENT_GEMMA else pair(row, 0).ours
    state = after(model, 20)
    kept = contents(state)
    assert not state.rewinds
    with pytest.raises(StateError, match=r"cannot go back|already dropped"):
        state.truncate(19)
    assert state.length == 20
    assert all(torch.equal(mine, before) for mine, before in zip(contents(state), kept, strict=True))
    state.truncate(20)  # nothing to forget


@pytest.mark.parametrize("length", [-1, 6])
def test_a_length_that_the_state_does_not_hold(length: int) -> None:
    for row in FAMILIES:
        with pytest.raises(StateError, match="cannot cut"):
            after(pair(row, 0).ours, 5).truncate(length)


def test_a_state_of_another_batch_or_family_is_refused() -> None:
    model, other = pair(FALCON_MAMBA, 0).ours, pair(FAMILIES[0], 0).ours
    with pytest.raises(StateError, match="rows of"):
        model(random_ids(3, 2), state=model.make_state(2))
    with pytest.raises(StateError, match="rows of"):
        model(random_ids(2, 2), state=other.make_state(2))


def test_parts_put_together_are_the_whole() -> None:
    generator = torch.Generator().manual_seed(3)

    def cache(slots: int) -> KVCache:
        return KVCache(*(torch.randn(1, 2, slots, 4, generator=generator) for _ in range(2)))

    whole = State("toy", [cache(9), cache(9)], 1, 9)
    built = State("toy", [cache(0), cache(0)], 1)
    for start, end in ((0, 4), (4, 5), (5, 5), (5, 9)):
        part = whole.part(start, end)
        assert part.length == end - start
        built.extend(part.part(0, part.length))
    for ours, theirs in zip(built.layers, whole.layers, strict=True):
        for name, tensor in theirs.tensors(9).items():
            assert torch.equal(ours.tensors(9)[name], tensor)
    with pytest.raises(StateError):
        whole.part(5, 10)
    with pytest.raises(StateError):
        whole.extend(State("toy", [cache(1)], 1, 1))
    with pytest.raises(StateError):
        State("toy", [MambaState(torch.zeros(1, 4, 3), torch.zeros(1, 4, 2))], 1, 2).part(0, 1)
