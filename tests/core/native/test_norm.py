"""The norms of the CPU's kernels, on every path, against the torch modules that they stand in for."""

import pytest
import torch
from native_paths import needs_kernels, path, random  # noqa: F401

from lmx.core.layers.norm import OffsetRMSNorm, RMSNorm, rms_normalise
from lmx.core.native.norm import can_normalise, rms_norm, rms_norm_parts

pytestmark = [needs_kernels, pytest.mark.usefixtures("path")]


def in_torch(layer, x):
    with torch.enable_grad():
        return layer(x.requires_grad_()).detach()


@pytest.mark.parametrize("kind", [RMSNorm, OffsetRMSNorm])
@pytest.mark.parametrize("shape", [(1, 4096), (5, 64), (2, 3, 100), (7, 1), (3, 17)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_norm_is_torchs(kind, shape, dtype):
    layer = kind(shape[-1], 1e-5).to(dtype)
    layer.weight.copy_(random(shape[-1], seed=1))
    x = (3 * random(*shape)).to(dtype)
    x[0] = 0
    got, expected = layer(x), in_torch(layer, x.clone())
    assert got.dtype == dtype
    # in bf16 the last bit may round the other way
    torch.testing.assert_close(got, expected, rtol=2e-6 if dtype == torch.float32 else 1.6e-2, atol=1e-7)
    if dtype == torch.bfloat16:
        assert (got != expected).float().mean() < 0.01


@torch.no_grad()
def test_float32_is_rounded_to_the_weights_dtype_first():
    x, weight = random(4, 96), random(96, seed=1).bfloat16()
    assert torch.equal(rms_norm(x, weight, 1e-5), rms_norm(x.bfloat16(), weight, 1e-5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_parts_are_normalised_by_themselves(dtype):
    x, sizes = random(2, 3, 45).to(dtype), (20, 16, 9)
    got = rms_norm_parts(x, sizes, 1e-6).split(sizes, -1)
    for part, expected in zip(got, x.split(sizes, -1), strict=True):
        tolerance = 1e-2 if dtype == torch.bfloat16 else 2e-6
        torch.testing.assert_close(part, rms_normalise(expected, 1e-6), rtol=tolerance, atol=1e-7)


@torch.no_grad()
def test_numbers_that_are_none_stay():
    layer = RMSNorm(32, 1e-5)
    for poison in (torch.nan, torch.inf):
        x = random(2, 32)
        x[0, 3] = poison
        assert torch.equal(layer(x).isnan(), in_torch(layer, x.clone()).isnan())


@torch.no_grad()
def test_threads_do_not_change_a_bit():
    x, weight = random(64, 4096).bfloat16(), random(4096, seed=1).bfloat16()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    one = rms_norm(x, weight, 1e-5)
    torch.set_num_threads(2)
    two = rms_norm(x, weight, 1e-5)
    torch.set_num_threads(before)
    assert torch.equal(one, two)


def test_what_it_leaves_to_torch():
    x, weight = random(2, 8), random(8)
    assert can_normalise(x, weight)
    assert not can_normalise(x.half(), weight.half())
    assert not can_normalise(x.t(), weight[:2])
    assert not can_normalise(x.clone().requires_grad_(), weight)


def test_the_operation():
    torch.library.opcheck(torch.ops.lmx.rms_norm.default, (random(2, 8), random(8), 1e-5, False))
