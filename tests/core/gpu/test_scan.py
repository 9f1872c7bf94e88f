"""The scan of the CUDA kernels against the definition in float64."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from gpu_paths import random, relative_error, tolerance

from lmx.core.gpu import recurrent
from lmx.core.layers.scan import selective_scan_reference

# batch, length, inner, states: one token; fewer steps than a tile; a border between tiles and one of channels; states
# that fill no register; more states than one tile of many steps could hold.
SHAPES = [(3, 1, 37, 5), (1, 2, 1, 1), (1, 17, 16, 3), (2, 9, 20, 16), (1, 3, 9, 33)]


def scan_inputs(batch, length, inner, states, dtype, device):
    """Everything from raw to state, as views with gaps, as the model's projections are."""
    raw, x, gate = random(batch, length, 3 * inner).to(device, dtype).split(inner, -1)
    B, C = random(batch, length, 2 * states, seed=1).to(device, dtype).split(states, -1)
    A = -torch.rand(inner, states, generator=torch.Generator().manual_seed(2)).to(device) * states
    bias, D = random(2, inner, seed=3).to(device, dtype)
    return raw, bias, x, gate, A, B, C, D, random(batch, inner, states, seed=4).to(device)


def definition(raw, bias, x, gate, A, B, C, D, state, lengths=None):
    delta = F.softplus(raw + bias)
    if lengths is not None:
        delta = delta.masked_fill((torch.arange(x.shape[1], device=x.device) >= lengths[:, None])[..., None], 0)
    y, state = selective_scan_reference(x, delta, A, B, C, state)
    return (y + D * x) * F.silu(gate), state


def in_float64(*inputs):
    return definition(*(tensor.double().cpu() for tensor in inputs))


def scan(*inputs, lengths=None):
    """The kernel, on a state of its own."""
    *tokens, state = inputs
    return recurrent.gated_scan(*tokens, state.clone(), lengths, partial(definition, lengths=lengths))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scan_is_its_definition(shape, dtype, device):
    inputs = scan_inputs(*shape, dtype, device)
    assert recurrent.can_scan(inputs[2], inputs[0], inputs[1], inputs[7], inputs[4], inputs[8])
    y, state = scan(*inputs)
    expected, last = in_float64(*inputs)
    assert y.dtype == dtype
    assert relative_error(y, expected) < tolerance(dtype, device)
    assert relative_error(state, last) < 1e-6


@pytest.mark.parametrize("length", [1, 3])
def test_exponents_of_any_size(length, device):
    raw, bias, x, gate, A, B, C, D, state = scan_inputs(1, length, 16, 4, torch.float32, device)
    A = A * torch.logspace(-6, 4, 4, device=device)
    for scale, shift in ((30, 0), (1, -12)):  # steps from 0 to 60, and of 6e-6
        inputs = (raw * scale + shift, bias, x, gate, A, B, C, D, state * (shift == 0))
        for got, expected in zip(scan(*inputs), in_float64(*inputs), strict=True):
            assert relative_error(got, expected) < 2e-6


def test_any_split_is_one_pass(device):
    *tokens, state = scan_inputs(2, 19, 16, 2, torch.float32, device)
    whole, last = scan(*tokens, state)
    raw, bias, x, gate, A, B, C, D = tokens
    for chunk in (1, 5, 16):
        carried, pieces = state, []
        for start in range(0, 19, chunk):
            span = slice(start, start + chunk)
            along = (raw[:, span], bias, x[:, span], gate[:, span], A, B[:, span], C[:, span], D)
            y, carried = scan(*along, carried)
            pieces.append(y)
        torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(carried, last, rtol=1e-6, atol=1e-6)


def test_padding_leaves_the_state_alone(device):
    lengths = torch.tensor([0, 3, 18, 19], device=device)
    raw, bias, x, gate, A, B, C, D, state = scan_inputs(4, 19, 16, 2, torch.float32, device)
    y, last = scan(raw, bias, x, gate, A, B, C, D, state, lengths=lengths)
    assert torch.equal(last[0], state[0])
    for row, length in enumerate(lengths.tolist()):
        assert (y[row, length:] == 0).all()
        rows = slice(row, row + 1), slice(0, length)
        alone = (raw[rows], bias, x[rows], gate[rows], A, B[rows], C[rows], D, state[rows[0]])
        if length:
            expected, end = in_float64(*alone)
            assert relative_error(y[rows], expected) < 2e-6
            assert relative_error(last[rows[0]], end) < 1e-6


def test_a_padded_token_of_a_step_leaves_the_state_alone(device):
    inputs = scan_inputs(2, 1, 16, 2, torch.float32, device)
    y, last = scan(*inputs, lengths=torch.tensor([1, 0], device=device))
    expected, end = in_float64(*inputs)
    assert relative_error(y[:1], expected[:1]) < 2e-6
    assert relative_error(last[:1], end[:1]) < 1e-6
    assert torch.equal(last[1], inputs[-1][1])


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_numbers_that_are_none_stay(length, poison, device):
    for place in (0, 2, 3, 5, 8):
        inputs = list(scan_inputs(1, length, 16, 2, torch.float32, device))
        inputs[place] = inputs[place].clone()
        inputs[place].view(-1)[1] = poison
        for got, expected in zip(scan(*inputs), in_float64(*inputs), strict=True):
            assert torch.equal(got.isfinite().cpu(), expected.isfinite())


@pytest.mark.parametrize("length", [1, 4])
def test_the_state_is_written_to_where_it_lies(length, device):
    *tokens, state = scan_inputs(2, length, 16, 2, torch.float32, device)
    expected = in_float64(*tokens, state)[1]
    _, last = recurrent.gated_scan(*tokens, state, None, definition)
    assert last.data_ptr() == state.data_ptr()
    assert relative_error(state, expected) < 1e-6


def test_gradients_are_torchs(device):
    inputs = scan_inputs(2, 5, 16, 2, torch.float32, device)
    before = inputs[-1].clone()
    weights = random(2, 5, 16, seed=8).to(device), random(2, 16, 2, seed=9).to(device)
    both = []
    for function in (partial(recurrent.gated_scan, lengths=None, oracle=definition), definition):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        y, state = function(*leaves)
        both.append(torch.autograd.grad((y * weights[0]).sum() + (state * weights[1]).sum(), leaves))
    for ours, theirs in zip(*both, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert torch.equal(inputs[-1], before)


def test_what_is_left_to_torch(device):
    raw, bias, x, _, A, _, _, D, state = scan_inputs(1, 3, 16, 2, torch.float32, device)
    assert recurrent.can_scan(x, raw, bias, D, A, state)
    assert not recurrent.can_scan(x.double(), raw.double(), bias.double(), D.double(), A, state)
    assert not recurrent.can_scan(x, raw, bias, D, A, state.double())
    assert not recurrent.can_scan(x.bfloat16(), raw, bias, D, A, state)
    assert not recurrent.can_scan(x, raw, bias, D, A.repeat(1, 33), state)
