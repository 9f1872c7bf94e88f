"""The scan and the convolution of the CPU's kernels, on every path, against the torch functions."""

import pytest
import torch
import torch.nn.functional as F
from native_paths import needs_kernels, path, random  # noqa: F401

from lmx.core.layers import conv
from lmx.core.layers.conv import causal_conv
from lmx.core.layers.scan import selective_scan_reference
from lmx.core.native.scan import can_convolve, can_scan, convolve, gated_scan

pytestmark = [needs_kernels, pytest.mark.usefixtures("path")]

DTYPES = (torch.float32, torch.bfloat16)
# Whole registers; a tail of channels; more channels than a tile; states that fill no register, and more than fit one.
WIDTHS = [(64, 16), (21, 16), (150, 5), (1, 1), (9, 33)]


def scan_inputs(batch, length, inner, states, dtype):
    """Everything from raw to state, as views with gaps, as the model's projections are."""
    wide = random(batch, length, 3 * inner).to(dtype)
    raw, x, gate = wide.split(inner, -1)
    B, C = random(batch, length, 2 * states, seed=1).to(dtype).split(states, -1)
    A = -torch.rand(inner, states, generator=torch.Generator().manual_seed(2)) * states
    bias, D = random(2, inner, seed=3).to(dtype)
    return raw, bias, x, gate, A, B, C, D, random(batch, inner, states, seed=4)


def in_float64(raw, bias, x, gate, A, B, C, D, state):
    raw, bias, x, gate, A, B, C, D, state = (t.double() for t in (raw, bias, x, gate, A, B, C, D, state))
    y, state = selective_scan_reference(x, F.softplus(raw + bias), A, B, C, state)
    return (y + D * x) * F.silu(gate), state


def relative_error(got, expected):
    return ((got.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("length", [1, 2, 16, 37])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scan_is_its_definition(widths, length, dtype):
    inputs = scan_inputs(2, length, *widths, dtype)
    before = inputs[-1].clone()
    y, state = gated_scan(*inputs, None)
    expected, last = in_float64(*inputs)
    assert y.dtype == dtype
    assert relative_error(y, expected) < (2e-6 if dtype == torch.float32 else 3e-3)
    assert relative_error(state, last) < 1e-6
    assert torch.equal(inputs[-1], before)


def test_exponents_of_any_size():
    raw, bias, x, gate, A, B, C, D, state = scan_inputs(1, 4, 32, 16, torch.float32)
    raw, A = raw * 30, A * torch.logspace(-6, 4, 16)
    inputs = (raw, bias, x, gate, A, B, C, D, state)
    for got, expected in zip(gated_scan(*inputs, None), in_float64(*inputs), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk", [1, 5, 16, 23])
def test_any_chunking_is_one_pass(dtype, chunk):
    *tokens, state = scan_inputs(2, 40, 70, 16, dtype)
    whole, last = gated_scan(*tokens, state, None)
    raw, bias, x, gate, A, B, C, D = tokens
    pieces = []
    for start in range(0, 40, chunk):
        span = slice(start, start + chunk)
        along = (raw[:, span], bias, x[:, span], gate[:, span], A, B[:, span], C[:, span], D)
        y, state = gated_scan(*along, state, None, state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    assert torch.equal(state, last)


def test_padding_leaves_the_state_alone():
    lengths = torch.tensor([0, 7, 20])
    raw, bias, x, gate, A, B, C, D, state = scan_inputs(3, 20, 70, 16, torch.float32)
    y, last = gated_scan(raw, bias, x, gate, A, B, C, D, state, lengths)
    for row, length in enumerate(lengths.tolist()):
        assert (y[row, length:] == 0).all()
        rows = slice(row, row + 1), slice(0, length)
        if length == 0:
            assert torch.equal(last[row], state[row])
            continue
        alone = (raw[rows], bias, x[rows], gate[rows], A, B[rows], C[rows], D, state[rows[0]])
        expected, end = gated_scan(*alone, None)
        assert torch.equal(y[rows], expected)
        assert torch.equal(last[rows[0]], end)


def test_numbers_that_are_none_stay():
    for place in (0, 2, 3, 5, 8):
        for poison in (torch.nan, torch.inf):
            inputs = list(scan_inputs(1, 3, 32, 16, torch.float32))
            inputs[place] = inputs[place].clone()
            inputs[place].view(-1)[5] = poison
            y, state = gated_scan(*inputs, None)
            expected, last = in_float64(*inputs)
            assert torch.equal(y.isfinite(), expected.isfinite())
            assert torch.equal(state.isfinite(), last.isfinite())


@pytest.mark.parametrize("length", [1, 30])
def test_threads_do_not_change_a_bit(length):
    inputs = scan_inputs(1, length, 515, 16, torch.bfloat16)
    x, weight, state = inputs[2], random(515, 4).bfloat16(), random(1, 515, 3).bfloat16()
    before, answers = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        answers.append((*gated_scan(*inputs, None), *convolve(x, weight, None, state, True, False)))
    torch.set_num_threads(before)
    for one, two, three in zip(*answers, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("kernel", [1, 2, 4, 8])
@pytest.mark.parametrize("length", [1, 3, 33, 70])
@pytest.mark.parametrize("dtype", DTYPES)
def test_convolution_is_torchs(silu, kernel, length, dtype, monkeypatch):
    x = random(2, length, 2 * 70).to(dtype).split(70, -1)[1]
    weight, bias, state = random(70, kernel), random(70, seed=1), random(2, 70, kernel - 1, seed=2)
    inputs = x, weight.to(dtype), bias.to(dtype), state.to(dtype)
    assert can_convolve(*inputs)
    y, end = causal_conv(*inputs, silu=silu)
    place = inputs[3].clone()
    for one, other in zip(causal_conv(*inputs[:3], place, silu=silu, overwrite=True), (y, end), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(place, end), "the old state's place holds the new one"
    without, _ = causal_conv(*inputs[:2], None, inputs[3])
    monkeypatch.setattr(conv, "can_convolve", lambda *tensors: False)
    expected, last = causal_conv(*(t.double() for t in inputs), silu=silu)
    assert y.dtype == dtype
    assert relative_error(y, expected) < (1e-6 if dtype == torch.float32 else 3e-3)
    assert relative_error(without, causal_conv(x.double(), inputs[1].double(), None, inputs[3].double())[0]) < 3e-3
    assert torch.equal(end.double(), last)


def test_what_they_leave_to_torch():
    raw, bias, x, _, A, _, _, D, state = scan_inputs(1, 3, 32, 16, torch.float32)
    assert can_scan(x, raw, bias, D, A, state)
    assert not can_scan(x.bfloat16(), raw, bias, D, A, state)
    assert not can_scan(x, raw, bias, D, A, state.double())
    assert not can_scan(x, raw, bias, D.clone().requires_grad_(), A, state)
    assert not can_convolve(x, random(32, 9), None, random(1, 32, 8))
    assert not can_convolve(x.half(), random(32, 4).half(), None, random(1, 32, 3).half())
