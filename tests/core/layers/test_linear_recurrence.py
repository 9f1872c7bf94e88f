from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import RecurrentGemmaConfig
from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRecurrentBlock

from lmx.core.layers.conv import causal_conv
from lmx.core.layers.linear_recurrence import rg_lru, rg_lru_reference, rg_lru_step


def make(batch: int, length: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """a, x, state; a between 0 and 1, some exactly 0 as at the start of a document."""
    g = torch.Generator().manual_seed(length)
    a = torch.sigmoid(torch.randn(batch, length, width, generator=g, dtype=dtype) * 3)
    a[torch.rand(batch, length, width, generator=g) < 0.05] = 0
    x = torch.randn(batch, length, width, generator=g, dtype=dtype)
    return a, x, torch.randn(batch, width, generator=g, dtype=dtype)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 3), (3, 37, 8), (2, 100, 33), (1, 5, 1000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_definition(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    inputs = make(*shape, dtype=dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-15
    for actual, expected in zip(rg_lru(*inputs), rg_lru_reference(*inputs), strict=True):
        assert actual.dtype == dtype
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("chunk", [1, 2, 7, 20, 39])
def test_any_chunking_is_one_pass_to_the_bit(chunk: int) -> None:
    a, x, state = make(3, 40, 33)
    whole, last = rg_lru(a, x, state)
    pieces = []
    for start in range(0, 40, chunk):
        h, state = rg_lru(a[:, start : start + chunk], x[:, start : start + chunk], state)
        pieces.append(h)
    assert torch.equal(torch.cat(pieces, 1), whole)
    assert torch.equal(state, last)


def test_rows_do_not_know_their_neighbours() -> None:
    a, x, state = make(5, 30, 33)
    whole, last = rg_lru(a, x, state)
    for row in range(5):
        h, end = rg_lru(a[row : row + 1], x[row : row + 1], state[row : row + 1])
        torch.testing.assert_close(h, whole[row : row + 1], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(end, last[row : row + 1], rtol=1e-6, atol=1e-6)


def test_no_tokens_change_nothing() -> None:
    a, x, state = make(2, 0, 6)
    h, end = rg_lru(a, x, state)
    assert h.shape == (2, 0, 6)
    assert torch.equal(end, state)


def test_the_state_owns_its_memory() -> None:
    """A view of the last step would keep the whole prompt in memory, layer after layer."""
    h, state = rg_lru(*make(2, 30, 6))
    assert state.untyped_storage().data_ptr() != h.untyped_storage().data_ptr()
    assert state.is_contiguous()


@pytest.mark.parametrize("length", [1, 30])
def test_inputs_stay_as_they_were(length: int) -> None:
    inputs = tuple(tensor.requires_grad_() for tensor in make(2, length, 6))
    before = [tensor.detach().clone() for tensor in inputs]
    h, state = rg_lru(*inputs)
    (h.sum() + state.sum()).backward()
    assert all(torch.equal(now, then) for now, then in zip(inputs, before, strict=True))


@pytest.mark.parametrize("length", [1, 2, 9])
def test_gradients_by_finite_differences(length: int) -> None:
    inputs = [tensor.requires_grad_() for tensor in make(2, length, 3, torch.float64)]
    assert torch.autograd.gradcheck(rg_lru, inputs)


def test_gradients_equal_the_definitions() -> None:
    inputs = make(3, 200, 16)
    weights = torch.randn(3, 200, 16), torch.randn(3, 16)
    both = []
    for function in (rg_lru, rg_lru_reference):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        h, state = function(*leaves)
        both.append(torch.autograd.grad((h * weights[0]).sum() + (state * weights[1]).sum(), leaves))
    for ours, theirs in zip(*both, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def block_like_ours(
    block: RecurrentGemmaRecurrentBlock, hidden: Tensor, start: int, conv: Tensor, lru: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Griffin's recurrent block from the pure functions and the weights of transformers' module."""
    gate = F.gelu(block.linear_y(hidden), approximate="tanh")
    x, conv = causal_conv(block.linear_x(hidden), block.conv_1d.weight[:, 0], block.conv_1d.bias, conv)
    heads = x.unflatten(-1, block.rg_lru.input_gate_bias.shape)  # [batch, length, heads, block width]

    def gated(weight: Tensor, bias: Tensor) -> Tensor:
        return torch.sigmoid(torch.einsum("blhi,hij->blhj", heads, weight) + bias).flatten(-2)

    input_gate = gated(block.rg_lru.input_gate_weight, block.rg_lru.input_gate_bias)
    recurrence = gated(block.rg_lru.recurrent_gate_weight, block.rg_lru.recurrent_gate_bias)
    log_a = -8 * recurrence * F.softplus(block.rg_lru.recurrent_param)
    first = (torch.arange(start, start + hidden.shape[1]) == 0)[:, None]
    drive = x * input_gate * torch.where(first, 1.0, torch.sqrt(-torch.expm1(2 * log_a)))
    h, lru = rg_lru(log_a.exp().masked_fill(first, 0), drive, lru)
    return block.linear_out(h * gate), conv, lru


@pytest.mark.parametrize(("heads", "width", "kernel"), [(2, 32, 4), (4, 48, 2), (1, 16, 3)])
def test_recurrent_gemma_equals_transformers_single_pass(heads: int, width: int, kernel: int) -> None:
    """Its continuation pads the convolution with zeros (5.23), so every split is compared with its one pass."""
    torch.manual_seed(width)
    config = RecurrentGemmaConfig(
        hidden_size=width, lru_width=width, num_attention_heads=heads, conv1d_width=kernel, num_hidden_layers=1
    )
    block = RecurrentGemmaRecurrentBlock(config, 0).eval()
    for parameter in block.rg_lru.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    hidden = torch.randn(2, 33, width)
    with torch.no_grad():
        expected, _ = block(hidden, torch.arange(33)[None].expand(2, -1), None, use_cache=False)
        for cuts in ([0, 33], [0, 1, 17, 18, 33], list(range(34))):
            conv, lru, pieces = torch.zeros(2, width, kernel - 1), torch.zeros(2, width), []
            for start, stop in pairwise(cuts):
                y, conv, lru = block_like_ours(block, hidden[:, start:stop], start, conv, lru)
                pieces.append(y)
            torch.testing.assert_close(torch.cat(pieces, 1), expected, rtol=1e-5, atol=1e-6)


def test_the_step_is_one_graph() -> None:
    inputs = make(2, 1, 24)
    traced = torch.compile(rg_lru, fullgraph=True, backend="eager")
    for ours, eager in zip(traced(*inputs), rg_lru_step(*inputs), strict=True):
        assert torch.equal(ours, eager)


@pytest.mark.slow
def test_a_compiled_step_is_the_step() -> None:
    """Some seconds in inductor, which needs a C++ compiler."""
    inputs = make(2, 1, 24)
    compiled = torch.compile(rg_lru, fullgraph=True)
    for ours, eager in zip(compiled(*inputs), rg_lru_step(*inputs), strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-6, atol=1e-6)
