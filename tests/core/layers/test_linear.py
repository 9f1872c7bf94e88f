"""Linear layers that hand a few vectors to the kernels."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support import needs_kernels

from lmx.core.layers import linear as module
from lmx.core.layers.linear import Linear, linear


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def used(monkeypatch):
    """The numbers of elements that the kernels were given."""
    sizes = []
    multiply = module.multiply_kept
    monkeypatch.setattr(module, "multiply_kept", lambda weight, x: (sizes.append(x.numel()), multiply(weight, x))[1])
    return sizes


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_few_vectors_and_16_bits_take_the_kernels(used, dtype):
    weight, bias = random(48, 96).to(dtype), random(48, seed=1).to(dtype)
    for lead in [(), (1,), (2, 2), (1, 1, 3)]:
        x = random(*lead, 96, seed=2).to(dtype)
        got = linear(x, weight, bias)
        assert (got.dtype, got.shape) == (dtype, (*lead, 48))
        expected = F.linear(x.double(), weight.double(), bias.double())
        assert (got.double() - expected).norm() < 4e-3 * expected.norm()
    assert used == [96, 96, 4 * 96, 3 * 96]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lead", [(600,), (2, 300), (3, 1, 200)])
def test_a_prompt_gives_torchs_bits(dtype, lead):
    weight, x = random(1024, 96).to(dtype), random(*lead, 3 * 96, seed=1).to(dtype)[..., 96:192]
    expected = F.linear(x, weight)
    with torch.no_grad():
        got = linear(x, weight)
    assert torch.equal(got, expected)
    assert got.data_ptr() % 4096 == 0, "it begins a block of its own"
    with torch.enable_grad():
        linear(x, weight.requires_grad_()).sum().backward()
    assert weight.grad is not None


def test_everything_else_stays_with_torch(used):
    x, weight, bias = random(1, 64).bfloat16(), random(8, 64).bfloat16(), random(8).bfloat16()
    for args in [
        (x.float(), weight.float(), bias.float()),
        (x.expand(5, 64), weight, bias),
        (x[:0], weight, bias),
        (x, weight[:, :32].repeat(1, 4)[:, ::2], bias),
        (x, weight.clone().requires_grad_()),
        (x.clone().requires_grad_(), weight),
        (x.to("meta"), weight.to("meta")),
    ]:
        out, expected = linear(*args), F.linear(*args)
        assert (out.shape, out.device, out.requires_grad) == (expected.shape, expected.device, expected.requires_grad)
        assert out.is_meta or torch.equal(out, expected)
    for wrong in (x[:, :32], x.float()):
        with pytest.raises(RuntimeError):
            linear(wrong, weight)
    assert used == []


@needs_kernels
def test_a_layer_follows_its_weight(used):
    layer = Linear(256, 48).bfloat16().requires_grad_(False)
    twin = copy.deepcopy(layer)
    x = random(1, 2, 256).bfloat16()
    for _ in range(2):
        expected = F.linear(x.double(), layer.weight.double(), layer.bias.double())
        assert (layer(x).double() - expected).norm() < 4e-3 * expected.norm()
        layer.weight.data = random(48, 256, seed=5).bfloat16()
    layer.weight.mul_(0)
    assert torch.equal(layer(x), layer.bias.expand(1, 2, 48))
    assert not torch.equal(twin(x), layer(x))
    assert used == [512] * 5
