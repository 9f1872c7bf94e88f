import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lmx.core.layers import conv
from lmx.core.layers.conv import causal_conv


def make(length: int, kernel: int, channels: int = 10, batch: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias, state."""
    torch.manual_seed(length * 10 + kernel)
    x, weight = torch.randn(batch, length, channels), torch.randn(channels, kernel)
    return x, weight, torch.randn(channels), torch.randn(batch, channels, kernel - 1)


def by_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    inputs = torch.cat((state, x.transpose(1, 2)), 2)
    y = F.conv1d(inputs, weight[:, None], bias, groups=weight.shape[0])
    return y.transpose(1, 2), inputs[..., inputs.shape[2] - state.shape[2] :]


@pytest.fixture(params=[1, 100, 1 << 18], ids=["one-step blocks", "few-step blocks", "one block"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv, "BLOCK_ELEMENTS", request.param)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("kernel", [1, 2, 4, 9])
@pytest.mark.parametrize("length", [1, 2, 5, 40])
@pytest.mark.parametrize("with_bias", [True, False])
def test_equals_conv1d(length: int, kernel: int, with_bias: bool) -> None:
    x, weight, bias, state = make(length, kernel)
    inputs = (x, weight, bias if with_bias else None, state)
    for actual, expected in zip(causal_conv(*inputs), by_conv1d(*inputs), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-5)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 7, 20])
@pytest.mark.parametrize("kernel", [1, 2, 4, 9])
def test_any_chunking_is_one_pass_to_the_bit(chunk: int, kernel: int) -> None:
    x, weight, bias, state = make(40, kernel)
    whole, last = causal_conv(x, weight, bias, state)
    pieces = []
    for piece in x.split(chunk, 1):
        y, state = causal_conv(piece, weight, bias, state)
        pieces.append(y)
    assert torch.equal(torch.cat(pieces, 1), whole)
    assert torch.equal(state, last)


def test_no_tokens_change_nothing() -> None:
    x, weight, bias, state = make(0, 4)
    y, end = causal_conv(x, weight, bias, state)
    assert y.shape == (3, 0, 10)
    assert torch.equal(end, state)


def test_the_state_owns_its_memory() -> None:
    x, weight, bias, state = make(50, 4)
    _, end = causal_conv(x, weight, bias, state)
    assert end.untyped_storage().nbytes() == end.numel() * end.element_size()
    assert end.is_contiguous()


@pytest.mark.parametrize("kernel", [1, 2, 4, 9])
def test_state_ends_at_each_rows_length(kernel: int) -> None:
    x, weight, bias, state = make(6, kernel, batch=7)
    lengths = torch.arange(7)
    y, end = causal_conv(x, weight, bias, state, lengths)
    for row, length in enumerate(lengths.tolist()):
        rows = slice(row, row + 1)
        alone, last = causal_conv(x[rows, :length], weight, bias, state[rows])
        torch.testing.assert_close(y[rows, :length], alone, rtol=1e-6, atol=1e-6)
        assert torch.equal(end[rows], last)


def test_bfloat16_is_summed_in_float32() -> None:
    x, weight, bias, state = (tensor.bfloat16() for tensor in make(40, 4))
    y, end = causal_conv(x, weight, bias, state)
    exact, _ = causal_conv(x.float(), weight.float(), bias.float(), state.float())
    assert torch.equal(y, exact.bfloat16())
    assert end.dtype == torch.bfloat16


def test_inputs_stay_as_they_were() -> None:
    inputs = make(40, 4)
    before = [tensor.clone() for tensor in inputs]
    causal_conv(*inputs)
    assert all(torch.equal(now, then) for now, then in zip(inputs, before, strict=True))


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("padded", [False, True])
def test_gradients_by_finite_differences(length: int, kernel: int, padded: bool) -> None:
    x, weight, bias, state = make(length, kernel, channels=2, batch=2)
    inputs = [tensor.double().requires_grad_() for tensor in (x, weight, bias, state)]
    lengths = torch.tensor([length - 1, length]) if padded else None
    assert torch.autograd.gradcheck(lambda *tensors: causal_conv(*tensors, lengths), inputs)


def test_the_step_is_one_graph() -> None:
    inputs = make(1, 4)
    traced = torch.compile(causal_conv, fullgraph=True, backend="eager")
    for ours, eager in zip(traced(*inputs), causal_conv(*inputs), strict=True):
        assert torch.equal(ours, eager)


@pytest.mark.slow
def test_a_compiled_step_is_the_step() -> None:
    """Some seconds in inductor, which needs a C++ compiler."""
    inputs = make(1, 4)
    compiled = torch.compile(causal_conv, fullgraph=True)
    for ours, eager in zip(compiled(*inputs), causal_conv(*inputs), strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-6, atol=1e-6)
