from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import FalconMambaConfig
from transformers.models.falcon_mamba.modeling_falcon_mamba import FalconMambaMixer

from lmx.core.layers import scan
from lmx.core.layers.conv import causal_conv
from lmx.core.layers.scan import selective_scan, selective_scan_reference, selective_scan_step

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def make(batch: int, length: int, inner: int, n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Inputs:
    """x, delta, A, B, C, state; deltas over four orders of magnitude, so that some decays vanish and some are 1."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=dtype)

    delta = torch.exp(normal(batch, length, inner) * 2 - 2)
    A = -torch.arange(1, n + 1, dtype=dtype).repeat(inner, 1) * torch.exp(normal(inner, n) * 0.1)
    return (
        normal(batch, length, inner),
        delta,
        A,
        normal(batch, length, n),
        normal(batch, length, n),
        normal(batch, inner, n),
    )


def part(inputs: Inputs, start: int, stop: int, state: Tensor) -> Inputs:
    x, delta, A, B, C, _ = inputs
    return x[:, start:stop], delta[:, start:stop], A, B[:, start:stop], C[:, start:stop], state


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    scale = expected.abs().max().item() if expected.numel() else 1.0
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * scale)


@pytest.fixture(params=[1, 200, 1 << 20], ids=["one-step blocks", "few-step blocks", "one block"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "BLOCK_ELEMENTS", request.param)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 2, 3, 4), (3, 37, 8, 4), (2, 50, 5, 16), (1, 65, 130, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_definition(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    inputs = make(*shape, dtype=dtype)
    for actual, expected in zip(selective_scan(*inputs), selective_scan_reference(*inputs), strict=True):
        close(actual, expected, 1e-6 if dtype == torch.float32 else 1e-14)


def test_float32_is_as_exact_as_the_plain_loop() -> None:
    inputs = make(2, 300, 16, 16)
    exact = selective_scan_reference(*(tensor.double() for tensor in inputs))
    for ours, loop, truth in zip(selective_scan(*inputs), selective_scan_reference(*inputs), exact, strict=True):
        assert (ours - truth).abs().max() <= 2 * (loop - truth).abs().max()


def test_blocks_hold_a_bounded_number_of_states() -> None:
    for batch, inner, n in [(1, 8192, 16), (1, 64, 4), (7, 8192, 16), (64, 8192, 16)]:
        steps = scan.block_length(batch, inner, n)
        assert steps == 1 or steps * batch * inner * n <= scan.BLOCK_ELEMENTS
    assert scan.block_length(1, 8192, 16) == 8


class LargestTensor(TorchDispatchMode):
    """Notes how many elements the largest tensor that any operation returned has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_states_never_exist_for_the_whole_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "BLOCK_ELEMENTS", 1024)
    length, inner, n = 400, 32, 16
    inputs = make(1, length, inner, n)
    with LargestTensor() as forward:
        selective_scan(*inputs)
    assert forward.elements <= length * inner  # x itself
    with LargestTensor() as training:
        selective_scan(*(tensor.requires_grad_() for tensor in inputs))[0].sum().backward()
    assert training.elements <= max(length * inner, 20 * inner * n)  # a segment of sqrt(400) steps


@pytest.mark.parametrize("chunk", [1, 2, 7, 20, 39, 40])
def test_any_chunking_is_one_pass(chunk: int) -> None:
    inputs = make(2, 40, 24, 8)
    whole, last = selective_scan(*inputs)
    for _ in range(2):
        state, pieces = inputs[-1], []
        for start in range(0, 40, chunk):
            y, state = selective_scan(*part(inputs, start, min(start + chunk, 40), state))
            pieces.append(y)
        close(torch.cat(pieces, 1), whole)
        close(state, last)


def test_equal_splits_give_equal_bits() -> None:
    inputs = make(2, 40, 24, 8)

    def run() -> tuple[Tensor, Tensor]:
        first, state = selective_scan(*part(inputs, 0, 23, inputs[-1]))
        second, state = selective_scan(*part(inputs, 23, 40, state))
        return torch.cat((first, second), 1), state

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_rows_do_not_know_their_neighbours() -> None:
    x, delta, A, B, C, state = make(5, 30, 24, 8)
    whole, last = selective_scan(x, delta, A, B, C, state)
    for row in range(5):
        rows = slice(row, row + 1)
        y, end = selective_scan(x[rows], delta[rows], A, B[rows], C[rows], state[rows])
        close(y, whole[rows])
        close(end, last[rows])


def test_no_tokens_change_nothing() -> None:
    inputs = make(2, 0, 6, 4)
    y, state = selective_scan(*inputs)
    assert y.shape == (2, 0, 6)
    assert torch.equal(state, inputs[-1])


def test_delta_zero_keeps_the_state_to_the_bit() -> None:
    x, delta, A, B, C, state = make(2, 30, 6, 4)
    delta[0, 11:], delta[1, :] = 0, 0
    _, end = selective_scan(x, delta, A, B, C, state)
    _, stopped = selective_scan(*part((x, delta, A, B, C, state), 0, 11, state))
    assert torch.equal(end[0], stopped[0])
    assert torch.equal(end[1], state[1])


def test_decays_that_vanish_stay_finite() -> None:
    x, delta, A, B, C, state = make(1, 20, 6, 4)
    y, end = selective_scan(x, delta * 1e6, A, B, C * 1e-6, state)
    close(y, selective_scan_reference(x, delta * 1e6, A, B, C * 1e-6, state)[0])
    assert end.isfinite().all()


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("length", [1, 30])
def test_inputs_stay_as_they_were(length: int, requires_grad: bool) -> None:
    inputs = tuple(tensor.requires_grad_(requires_grad) for tensor in make(2, length, 6, 4))
    before = [tensor.detach().clone() for tensor in inputs]
    y, state = selective_scan(*inputs)
    if requires_grad:
        (y.sum() + state.sum()).backward()
    assert all(torch.equal(now, then) for now, then in zip(inputs, before, strict=True))


@pytest.mark.parametrize("length", [1, 30])
def test_bfloat16_inputs_are_widened_first(length: int) -> None:
    x, delta, A, B, C, state = make(2, length, 24, 8)
    x, B, C = x.bfloat16(), B.bfloat16(), C.bfloat16()
    y, end = selective_scan(x, delta, A, B, C, state)
    wide, wide_end = selective_scan(x.float(), delta, A, B.float(), C.float(), state)
    assert torch.equal(y, wide)
    assert torch.equal(end, wide_end)


def test_views_are_read_as_what_they_show() -> None:
    x, delta, A, B, C, state = make(2, 30, 24, 8)
    packed = torch.cat((x, torch.full_like(x, torch.nan)), -1)
    strided = packed[..., :24], delta.transpose(1, 2).contiguous().transpose(1, 2), A, B, C, state
    assert torch.equal(selective_scan(*strided)[0], selective_scan(x, delta, A, B, C, state)[0])


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("length", [1, 2, 3, 7, 10])
def test_gradients_by_finite_differences(length: int) -> None:
    inputs = make(2, length, 3, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(selective_scan, [tensor.requires_grad_() for tensor in inputs])


@pytest.mark.parametrize("length", [1, 50, 257])
def test_gradients_equal_the_definitions(length: int) -> None:
    inputs = make(3, length, 16, 8)
    weights = torch.randn(3, length, 16), torch.randn(3, 16, 8)

    def gradients(function: type(selective_scan)) -> list[Tensor]:  # type: ignore[valid-type]
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        y, state = function(*leaves)
        return list(torch.autograd.grad((y * weights[0]).sum() + (state * weights[1]).sum(), leaves))

    for ours, theirs in zip(gradients(selective_scan), gradients(selective_scan_reference), strict=True):
        close(ours, theirs, 2e-6)


def test_gradients_flow_through_a_carried_state_and_into_bfloat16() -> None:
    x, delta, A, B, C, state = make(2, 40, 8, 4)
    x = x.bfloat16()

    def gradient(cuts: list[int]) -> Tensor:
        leaf, h = x.clone().requires_grad_(), state
        for start, stop in pairwise(cuts):
            y, h = selective_scan(*part((leaf, delta, A, B, C, state), start, stop, h))
        return torch.autograd.grad(y[:, -1].sum(), leaf)[0]

    whole, cut = gradient([0, 40]), gradient([0, 13, 39, 40])
    assert whole.dtype == torch.bfloat16
    assert whole[:, 0].abs().max() > 0
    torch.testing.assert_close(whole, cut, rtol=1e-2, atol=1e-6)


def test_training_keeps_few_states() -> None:
    """What the graph holds grows with the square root of the length: never a state a step."""
    batch, length, inner, n = 1, 1024, 8, 16
    inputs = make(batch, length, inner, n)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        selective_scan(*(tensor.requires_grad_() for tensor in inputs))
    own = sum(tensor.untyped_storage().nbytes() for tensor in inputs)
    assert sum(kept.values()) <= own + 40 * inner * n * 4


def mixer_like_ours(
    mixer: FalconMambaMixer, hidden: Tensor, conv: Tensor, ssm: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """FalconMamba's mixer from the pure functions and the weights of transformers' module."""
    config = mixer.config
    x, gate = mixer.in_proj(hidden).chunk(2, -1)
    x, conv = causal_conv(x, mixer.conv1d.weight[:, 0], mixer.conv1d.bias, conv)
    x = F.silu(x)
    sizes = [mixer.time_step_rank, config.state_size, config.state_size]
    step, B, C = (F.rms_norm(t, t.shape[-1:], eps=config.mixer_rms_eps) for t in mixer.x_proj(x).split(sizes, -1))
    y, ssm = selective_scan(x, F.softplus(mixer.dt_proj(step)), -mixer.A_log.exp(), B, C, ssm)
    return mixer.out_proj((y + x * mixer.D) * F.silu(gate)), conv, ssm


def make_mixer(**sizes: int | bool) -> FalconMambaMixer:
    config = FalconMambaConfig(num_hidden_layers=1, vocab_size=8, hidden_size=24, time_step_rank=5, **sizes)
    mixer = FalconMambaMixer(config, 0, initialize_mixer_weights=False).eval()  # its own initialisation fails in 5.23
    torch.nn.init.normal_(mixer.A_log)
    torch.nn.init.normal_(mixer.D)
    return mixer


@pytest.mark.parametrize(("inner", "n", "kernel", "bias"), [(48, 16, 4, True), (64, 4, 3, False), (32, 8, 2, True)])
def test_falcon_mamba_equals_transformers_single_pass(inner: int, n: int, kernel: int, bias: bool) -> None:
    """Its cached continuation starts the scan from zeros (5.23), so every split is compared with its one pass."""
    torch.manual_seed(inner)
    mixer = make_mixer(intermediate_size=inner, state_size=n, conv_kernel=kernel, use_conv_bias=bias)
    hidden = torch.randn(2, 33, 24)
    with torch.no_grad():
        expected = mixer(hidden)
        for cuts in ([0, 33], [0, 1, 17, 18, 33], list(range(34))):
            conv, ssm, pieces = torch.zeros(2, inner, kernel - 1), torch.zeros(2, inner, n), []
            for start, stop in pairwise(cuts):
                y, conv, ssm = mixer_like_ours(mixer, hidden[:, start:stop], conv, ssm)
                pieces.append(y)
            close(torch.cat(pieces, 1), expected, 5e-6)


def test_falcon_mamba_gradients_equal_transformers() -> None:
    torch.manual_seed(0)
    mixer = make_mixer(intermediate_size=48, state_size=8)
    hidden = torch.randn(2, 33, 24)
    leaves = list(mixer.parameters())
    theirs = torch.autograd.grad(mixer(hidden).square().sum(), leaves)
    y, _, _ = mixer_like_ours(mixer, hidden, torch.zeros(2, 48, 3), torch.zeros(2, 48, 8))
    for ours, reference in zip(torch.autograd.grad(y.square().sum(), leaves), theirs, strict=True):
        close(ours, reference, 2e-5)


@pytest.mark.slow
def test_a_compiled_step_is_the_step() -> None:
    """Some seconds in inductor, which needs a C++ compiler."""
    inputs = make(2, 1, 24, 8)
    compiled = torch.compile(selective_scan, fullgraph=True)
    for ours, eager in zip(compiled(*inputs), selective_scan_step(*inputs), strict=True):
        close(ours, eager)


def test_the_step_is_one_graph() -> None:
    inputs = make(2, 1, 24, 8)
    traced = torch.compile(selective_scan, fullgraph=True, backend="eager")
    for ours, eager in zip(traced(*inputs), selective_scan_step(*inputs), strict=True):
        close(ours, eager)
