"""The promise of every state: one pass = any chunking = token by token, alone and in padded batches.

Different splits agree to float rounding (1e-5 of the logit scale in float32), equal splits to the bit.
"""

from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
import torch
from parity.families import FAMILIES, FamilyRow, padded, pair, random_ids
from torch import Tensor

from lmx.core.model import AnyState, LanguageModel
from lmx.core.state import StateError

LENGTH = 24
CASES = [(row, index) for row in FAMILIES for index in sorted({0, 3, 5, row.windowed or 0})]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def model(request: pytest.FixtureRequest) -> LanguageModel:
    row, index = request.param
    return pair(row, index).ours


@pytest.fixture(autouse=True)
def _no_gradients() -> "object":
    with torch.inference_mode():
        yield


def run(model: LanguageModel, ids: Tensor, cuts: list[int], state: AnyState | None = None) -> Tensor:
    """The logits of all tokens, from calls that end at the cuts."""
    state = state or model.make_state(len(ids))
    edges = [0, *cuts, ids.shape[1]]
    return torch.cat([model(ids[:, start:end], state=state).logits for start, end in pairwise(edges)], 1)


def same(answer: Tensor, expected: Tensor) -> None:
    assert answer.shape == expected.shape
    assert (answer - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_every_split(model: LanguageModel) -> None:
    ids = random_ids(2, LENGTH)
    expected = model(ids).logits
    same(run(model, ids, []), expected)
    same(run(model, ids, list(range(1, LENGTH))), expected)
    for cut in range(1, LENGTH):
        same(run(model, ids, [cut]), expected)
    random = Random(0)
    for _ in range(10):
        same(run(model, ids, sorted(random.sample(range(1, LENGTH), 5))), expected)


def test_equal_splits_are_equal_bits(model: LanguageModel) -> None:
    ids = random_ids(1, LENGTH)
    for cuts in ([], [7], [1, 2, 3, 15], list(range(1, LENGTH))):
        assert torch.equal(run(model, ids, cuts), run(model, ids, cuts))


@pytest.mark.parametrize("sides", [("left",), ("right",), ("both",), ("left", "right", "both")], ids="-".join)
def test_padded_turns(model: LanguageModel, sides: tuple[str, ...]) -> None:
    """A batch of conversations whose turns differ in length; a row may have nothing to say in a turn."""
    lengths = [(5, 1, 9), (1, 1, 1), (4, 12, 0), (0, 3, 2), (1, 1, 1), (3, 11, 7)]
    rows = [random_ids(sum(turn[row] for turn in lengths), seed=row) for row in range(3)]
    expected = [model(ids[None]).logits[0] for ids in rows]
    state, taken = model.make_state(3), [0, 0, 0]
    for number, turn in enumerate(lengths):
        tokens = [ids[start : start + length] for ids, start, length in zip(rows, taken, turn, strict=True)]
        ids, mask = padded(tokens, sides[number % len(sides)])
        logits = model(ids, attention_mask=mask if not mask.all() else None, state=state).logits
        for row, length in enumerate(turn):
            if length:
                same(logits[row][mask[row].bool()], expected[row][taken[row] : taken[row] + length])
            taken[row] += length
    assert state.length == max(taken)
    assert state.lengths is not None
    assert state.lengths.tolist() == taken


def test_padding_without_a_state(model: LanguageModel) -> None:
    rows = [random_ids(length, seed=length) for length in (LENGTH, 1, 8)]
    for side in ("left", "right", "both"):
        ids, mask = padded(rows, side)
        logits = model(ids, attention_mask=mask).logits
        for row, tokens in enumerate(rows):
            same(logits[row][mask[row].bool()], model(tokens[None]).logits[0])


@pytest.mark.parametrize("padding", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("held", [0, 1, 6, 17])
def test_copies_continue_to_the_same_bits(model: LanguageModel, tmp_path: Path, held: int, padding: bool) -> None:
    """A clone, a file, and the state that they were made from, which they leave alone."""
    ids, after = random_ids(2, held), random_ids(2, 8, seed=1)
    mask = torch.ones_like(ids)
    mask[1, : held // 2] = 0 if padding else 1
    state = model.make_state(2)
    if held:
        model(ids, attention_mask=mask, state=state)
    state.save(tmp_path / "state")
    copies = [state.clone(), model.load_state(tmp_path / "state")]
    expected = run(model, after, [1, 5], state)
    for copy in copies:
        assert copy.length == held
        assert torch.equal(run(model, after, [1, 5], copy), expected)
        assert copy.length == state.length == held + 8


@pytest.mark.parametrize(("held", "kept"), [(9, 4), (9, 0), (2, 1), (20, 19)])
def test_truncation_is_forgetting(model: LanguageModel, held: int, kept: int) -> None:
    ids, after = random_ids(2, held), random_ids(2, 8, seed=1)
    state = model.make_state(2)
    run(model, ids, [held // 2], state)
    before = state.clone()
    if not state.rewinds:
        try:
            state.truncate(kept)
        except StateError:
            # Layers that cannot forget say so before any of them has changed.
            assert torch.equal(run(model, after, [3], state), run(model, after, [3], before))
            return
    else:
        state.truncate(kept)
    assert state.length == kept
    same(run(model, after, [3], state), model(torch.cat((ids[:, :kept], after), 1)).logits[:, kept:])


def test_a_window_bounds_the_memory() -> None:
    for row in FAMILIES:
        if row.windowed is None:
            continue
        model = pair(row, row.windowed).ours
        state = model.make_state()
        run(model, random_ids(1, 12), [5], state)
        held = state.nbytes
        run(model, random_ids(1, 40), [20, 21], state)
        assert state.nbytes == held


def test_a_call_with_a_state_records_no_gradient() -> None:
    row: FamilyRow = FAMILIES[0]
    model = pair(row, 0).ours
    with torch.inference_mode(False), torch.enable_grad():
        state = model.make_state()
        assert not model(random_ids(1, 4), state=state).logits.requires_grad
        assert model(random_ids(1, 4)).logits.requires_grad
