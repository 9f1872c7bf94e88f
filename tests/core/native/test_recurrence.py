"""The RG-LRU of the CPU's kernels, on every path, against the torch layer in float64."""

import copy

import pytest
import torch
from native_paths import needs_kernels, path, random  # noqa: F401

from lmx.core.layers.padding import Compaction
from lmx.core.layers.rg_lru import RGLRU
from lmx.core.native import recurrence

pytestmark = [needs_kernels, pytest.mark.usefixtures("path")]

DTYPES = (torch.float32, torch.bfloat16)


def make(width, heads, dtype):
    layer = RGLRU(width, heads)
    layer.reset_parameters(1.0)
    with torch.no_grad():
        for bias in (layer.input_gate_bias, layer.recurrent_gate_bias):
            bias.normal_()
    return layer.to(dtype).requires_grad_(False)


def inputs(batch, length, width, dtype):
    x, gate = random(batch, length, 2 * width).to(dtype).split(width, -1)
    reset = torch.zeros(batch, length, dtype=torch.bool)
    reset[0, 0] = True
    return x, gate, reset, None, random(batch, width, seed=1)


def in_float64(layer, x, gate, reset, compaction, state):
    return copy.deepcopy(layer).double()(x.double(), gate.double(), reset, compaction, state.double())


def relative_error(got, expected):
    return ((got.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("widths", [(64, 2), (21, 3), (300, 1), (280, 2), (3, 3)], ids=str)
@pytest.mark.parametrize("length", [1, 2, 19])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_is_torchs(widths, length, dtype):
    torch.manual_seed(0)
    layer, given = make(*widths, dtype), inputs(2, length, widths[0], dtype)
    before = given[-1].clone()
    y, state = layer(*given)
    expected, last = in_float64(layer, *given)
    assert y.dtype == dtype
    assert relative_error(y, expected) < (1e-5 if dtype == torch.float32 else 5e-3)
    assert relative_error(state, last) < (1e-5 if dtype == torch.float32 else 5e-3)
    assert torch.equal(given[-1], before)
    assert torch.allclose(layer(given[0], None, *given[2:])[0] * given[1], y, rtol=2e-2, atol=1e-6)


def test_any_chunking_is_one_pass():
    torch.manual_seed(0)
    layer = make(96, 2, torch.float32)
    x, gate, reset, _, state = inputs(2, 20, 96, torch.float32)
    whole, last = layer(x, gate, reset, None, state)
    for chunk in (1, 3, 8):
        pieces, carried = [], state
        for start in range(0, 20, chunk):
            span = slice(start, start + chunk)
            y, carried = layer(x[:, span], gate[:, span], reset[:, span], None, carried)
            pieces.append(y)
        torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(carried, last, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [1, 6])
def test_padding_leaves_the_state_alone(length):
    layer = make(96, 2, torch.float32)
    x, gate, reset, _, state = inputs(3, length, 96, torch.float32)
    mask = torch.ones(3, length, dtype=torch.bool)
    mask[1, 1:] = mask[2] = False
    y, last = layer(x, gate, reset, Compaction.of(mask), state)
    assert torch.equal(last[2], state[2])
    for row, real in enumerate((length, 1)):
        rows = slice(row, row + 1), slice(0, real)
        alone, end = layer(x[rows], gate[rows], reset[rows], None, state[rows[0]])
        torch.testing.assert_close(y[rows], alone, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(last[rows[0]], end, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [1, 9])
def test_threads_and_company_do_not_change_a_bit(length):
    layer = make(1024, 2, torch.bfloat16)
    x, gate, reset, _, state = inputs(2, length, 1024, torch.bfloat16)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    products = [random(2, 2 * length, 512, seed=seed).bfloat16() for seed in (5, 6)]
    rate = -random(1024, seed=7).abs()
    answers = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        answers.append(recurrence.recur(x, tuple(products), rate, reset, state, gate, None))
        if length == 1:
            answers[-1] += layer(x, gate, reset, None, state)
    torch.set_num_threads(before)
    for one, two, three in zip(*answers, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


def test_numbers_that_are_none_stay():
    layer = make(64, 1, torch.float32)
    for poison in (torch.nan, torch.inf):
        x, gate, reset, _, state = inputs(1, 1, 64, torch.float32)
        x = x.clone()
        x[0, 0, 3] = poison
        y, _ = layer(x, gate, reset, None, state)
        expected, _ = in_float64(layer, x, gate, reset, None, state)
        assert torch.equal(y.isfinite(), expected.isfinite())


def test_many_rows_take_torchs_products(monkeypatch):
    layer, used = make(64, 2, torch.float32), []
    from lmx.core.layers import rg_lru

    monkeypatch.setattr(
        rg_lru, "recur_step", lambda *given: (used.append(len(given[0])), recurrence.recur_step(*given))[1]
    )
    for rows in (1, 4, 5):
        given = inputs(rows, 1, 64, torch.float32)
        torch.testing.assert_close(layer(*given)[0].double(), in_float64(layer, *given)[0], rtol=1e-4, atol=1e-5)
    assert used == [1, 4]
