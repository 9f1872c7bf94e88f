"""The short convolution of the CUDA kernels against torch's in float64."""

import pytest
import torch
from gpu_paths import random, relative_error, tolerance

from lmx.core.gpu import recurrent
from lmx.core.layers.conv import causal_conv


def conv_inputs(batch, length, channels, kernel, dtype, device):
    """x a view with gaps, as half of a projection is."""
    x = random(batch, length, 2 * channels).to(device, dtype).split(channels, -1)[1]
    weight, bias = random(channels, kernel, seed=1), random(channels, seed=2)
    state = random(batch, channels, kernel - 1, seed=3)
    return x, *(tensor.to(device, dtype) for tensor in (weight, bias, state))


def convolve(x, weight, bias, state, lengths=None, silu=False, overwrite=False):
    """Through the layer, with proof that the kernel took it."""
    assert recurrent.can_convolve(x, weight, bias, state)
    return causal_conv(x, weight, bias, state, lengths, silu=silu, overwrite=overwrite)


def in_float64(x, weight, bias, state, lengths=None, silu=False):
    x, weight, state = x.double().cpu(), weight.double().cpu(), state.double().cpu()
    bias, lengths = None if bias is None else bias.double().cpu(), None if lengths is None else lengths.cpu()
    assert not recurrent.can_convolve(x, weight, bias, state)
    return causal_conv(x, weight, bias, state, lengths, silu=silu)


@pytest.mark.parametrize(("length", "kernel"), [(1, 1), (1, 4), (2, 4), (32, 2), (35, 4), (40, 17)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_convolution_is_torchs(kernel, length, dtype, device):
    inputs = conv_inputs(1, length, 70, kernel, dtype, device)
    for silu in (False, True):
        y, end = convolve(*inputs, silu=silu)
        expected, last = in_float64(*inputs, silu=silu)
        assert y.dtype == dtype
        assert relative_error(y, expected) < tolerance(dtype, device)
        assert torch.equal(end.double().cpu(), last)
    x, weight, _, state = inputs
    expected, _ = in_float64(x, weight, None, state)
    assert relative_error(convolve(x, weight, None, state)[0], expected) < tolerance(dtype, device)


@pytest.mark.parametrize("length", [1, 2, 40])
def test_the_state_may_be_overwritten(length, device):
    x, weight, bias, state = conv_inputs(2, length, 70, 4, torch.bfloat16, device)
    before = state.clone()
    _, apart = convolve(x, weight, bias, state)
    assert torch.equal(state, before)
    _, end = convolve(x, weight, bias, state, overwrite=True)
    assert end.data_ptr() == state.data_ptr()
    assert torch.equal(state, apart)
    assert torch.equal(apart.double().cpu(), in_float64(x, weight, bias, before)[1])


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_state_takes_the_last_real_inputs(overwrite, device):
    lengths = torch.tensor([0, 2, 34, 35], device=device)
    x, weight, bias, state = conv_inputs(4, 35, 20, 4, torch.float32, device)
    expected, last = in_float64(x, weight, bias, state, lengths)
    y, end = convolve(x, weight, bias, state, lengths, overwrite=overwrite)
    assert torch.equal(end.double().cpu(), last)
    for row, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(y[row, :length].double().cpu(), expected[row, :length], rtol=1e-5, atol=1e-5)


def test_any_split_is_one_pass(device):
    x, weight, bias, state = conv_inputs(2, 35, 20, 4, torch.float32, device)
    whole, last = convolve(x, weight, bias, state)
    for chunk in (1, 3, 32):
        carried, pieces = state.clone(), []
        for piece in x.split(chunk, 1):
            y, carried = convolve(piece, weight, bias, carried, overwrite=True)
            pieces.append(y)
        torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-6, atol=1e-6)
        assert torch.equal(carried, last)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_numbers_that_are_none_stay(poison, device):
    for place in (0, 1, 3):
        inputs = [tensor.clone() for tensor in conv_inputs(1, 5, 20, 4, torch.float32, device)]
        inputs[place].view(-1)[1] = poison
        for got, expected in zip(convolve(*inputs), in_float64(*inputs), strict=True):
            assert torch.equal(got.isfinite().cpu(), expected.isfinite())


def test_gradients_and_other_dtypes_are_left_to_torch(device):
    x, weight, bias, state = conv_inputs(1, 5, 20, 4, torch.float32, device)
    assert not recurrent.can_convolve(x, weight.clone().requires_grad_(), bias, state)
    assert not recurrent.can_convolve(x, weight, bias, state.bfloat16())
    assert not recurrent.can_convolve(x, random(20, 18).to(device), bias, random(1, 20, 17).to(device))
