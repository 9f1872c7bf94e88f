"""The RG-LRU of the CUDA kernels, through its layer, against the same layer in float64 and in torch."""

import copy

import pytest
import torch
from gpu_paths import random, relative_error

from lmx.core.gpu import recurrent
from lmx.core.layers.padding import Compaction
from lmx.core.layers.rg_lru import RGLRU


def make(width, heads, dtype, device):
    torch.manual_seed(0)
    layer = RGLRU(width, heads)
    layer.reset_parameters(1.0)
    with torch.no_grad():
        for bias in (layer.input_gate_bias, layer.recurrent_gate_bias):
            bias.normal_()
    return layer.to(device, dtype).requires_grad_(False)


def lru_inputs(batch, length, width, dtype, device):
    """x, gate, reset and state; the first row begins a text, and so does the second in its middle."""
    x, gate = random(batch, length, 2 * width).to(device, dtype).split(width, -1)
    reset = torch.zeros(batch, length, dtype=torch.bool, device=device)
    reset[0, 0] = reset[-1, length // 2] = True
    return x, gate, reset, random(batch, width, seed=1).to(device)


def run(layer, x, gate, reset, state, compaction=None, overwrite=False):
    """The layer, with proof that its kernels take these."""
    assert recurrent.can_recur(x, state, *layer.gates[0], *layer.gates[1])
    return layer(x, gate, reset, compaction, state, overwrite=overwrite)


def in_float64(layer, x, gate, reset, state):
    exact = copy.deepcopy(layer).double().cpu()
    gate = None if gate is None else gate.double().cpu()
    return exact(x.double().cpu(), gate, reset.cpu(), None, state.double().cpu())


# Rows of one token that read the weights each, and more; a border between tiles of 64 steps; one of channels.
@pytest.mark.parametrize("shape", [(2, 1, 60), (5, 1, 60), (2, 2, 20), (1, 67, 20), (1, 130, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_is_torchs(shape, dtype, device):
    batch, length, width = shape
    layer = make(width, width // 20 or 1, dtype, device)
    x, gate, reset, state = lru_inputs(batch, length, width, dtype, device)
    before = state.clone()
    limit = 2e-6 if dtype == torch.float32 else 8e-3
    for opened in (gate, None):
        y, last = run(layer, x, opened, reset, state)
        expected, end = in_float64(layer, x, opened, reset, state)
        assert y.dtype == dtype
        assert relative_error(y, expected) < limit
        assert relative_error(last, end) < limit
        assert torch.equal(state, before)


def test_slow_decays_keep_their_digits(device):
    layer = make(32, 1, torch.float32, device)
    layer.recurrent_param.fill_(-14)  # a = 1 - 3e-6 where the gate is half open; 1 - a^2 has six digits less
    x, gate, reset, state = lru_inputs(1, 3, 32, torch.float32, device)
    state.zero_()
    for got, expected in zip(run(layer, x, gate, reset, state), in_float64(layer, x, gate, reset, state), strict=True):
        assert relative_error(got, expected) < 2e-6


def test_one_reset_may_serve_all_rows(device):
    layer = make(32, 2, torch.float32, device)
    for length in (1, 3):
        x, gate, _, state = lru_inputs(2, length, 32, torch.float32, device)
        reset = torch.arange(length, device=device)[None] == 0
        expected = run(layer, x, gate, reset.expand(2, -1), state)
        for got, same in zip(run(layer, x, gate, reset, state), expected, strict=True):
            assert torch.equal(got, same)


def test_any_split_is_one_pass(device):
    layer = make(16, 1, torch.float32, device)
    x, gate, reset, state = lru_inputs(2, 20, 16, torch.float32, device)
    whole, last = run(layer, x, gate, reset, state)
    for chunk in (1, 7):
        pieces, carried = [], state.clone()
        for start in range(0, 20, chunk):
            span = slice(start, start + chunk)
            y, carried = run(layer, x[:, span], gate[:, span], reset[:, span], carried, overwrite=True)
            pieces.append(y)
        torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(carried, last, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [1, 6])
def test_padding_leaves_the_state_alone(length, device):
    layer = make(32, 2, torch.float32, device)
    x, _, reset, state = lru_inputs(3, length, 32, torch.float32, device)
    mask = torch.ones(3, length, dtype=torch.bool, device=device)
    mask[1, 1:] = mask[2] = False
    compaction = Compaction.of(mask)
    packed = compaction.pack(x)
    y, last = run(layer, packed, None, reset, state, compaction)
    assert torch.equal(last[2], state[2])
    for row, real in enumerate((length, min(length, 1))):
        rows = slice(row, row + 1), slice(0, real)
        assert (y[row, real:] == 0).all()
        expected, end = in_float64(layer, x[rows], None, reset[rows], state[rows[0]])
        assert relative_error(y[rows], expected) < 2e-6
        assert relative_error(last[rows[0]], end) < 2e-6


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (5, 1), (1, 3)])
@pytest.mark.parametrize("overwrite", [False, True])
def test_the_state_is_written_to_only_if_it_may_be(batch, length, overwrite, device):
    layer = make(32, 2, torch.float32, device)
    x, gate, reset, state = lru_inputs(batch, length, 32, torch.float32, device)
    before = state.clone()
    expected = in_float64(layer, x, gate, reset, state)[1]
    _, last = run(layer, x, gate, reset, state, overwrite=overwrite)
    assert relative_error(last, expected) < 2e-6
    assert (last.data_ptr() == state.data_ptr()) == overwrite
    assert overwrite or torch.equal(state, before)


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_numbers_that_are_none_stay(length, poison, device):
    layer = make(32, 2, torch.float32, device)
    for place in (0, 1, 3):
        inputs = [tensor.clone() for tensor in lru_inputs(1, length, 32, torch.float32, device)]
        inputs[2].fill_(False)
        inputs[place].view(-1)[3] = poison
        for got, expected in zip(run(layer, *inputs), in_float64(layer, *inputs), strict=True):
            assert torch.equal(got.isfinite().cpu(), expected.isfinite())


@pytest.mark.parametrize("length", [1, 4])
def test_gradients_are_torchs(length, device):
    layer = make(32, 2, torch.float32, device).requires_grad_()
    exact = copy.deepcopy(layer).double().cpu()
    inputs = lru_inputs(2, length, 32, torch.float32, device)
    before = inputs[-1].clone()
    gradients = []
    for module, dtype, call in ((layer, torch.float32, run), (exact, torch.float64, in_place_of_run)):
        place = next(module.parameters()).device
        x, gate, reset, state = (t.to(place) if t.dtype == torch.bool else t.to(place, dtype) for t in inputs)
        leaves = [tensor.clone().requires_grad_() for tensor in (x, gate, state)]
        y, last = call(module, leaves[0], leaves[1], reset, leaves[2], overwrite=True)
        weights = random(2, length, 32, seed=8).to(y), random(2, 32, seed=9).to(y)
        loss = (y * weights[0]).sum() + (last * weights[1]).sum()
        gradients.append(torch.autograd.grad(loss, [*leaves, *module.parameters()]))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours.double().cpu(), theirs, rtol=1e-4, atol=1e-5)
    assert torch.equal(inputs[-1], before)


def in_place_of_run(layer, x, gate, reset, state, overwrite):
    return layer(x, gate, reset, None, state, overwrite=overwrite)
