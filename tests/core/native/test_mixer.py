"""A block's step in one call, on every path: to the bit what its kernels say one by one, and near the oracle."""

import copy

import pytest
import torch
from native_paths import needs_kernels, path, random  # noqa: F401

from lmx.core.call import Call, Record
from lmx.core.layers.attention import Visibility
from lmx.core.models import falcon_mamba, recurrent_gemma
from lmx.core.models.falcon_mamba import Block, FalconMambaConfig
from lmx.core.models.recurrent_gemma import GriffinCall, RecurrentGemmaConfig
from lmx.core.native.griffin import can_step_mlp, mlp_step, soft_cap
from lmx.core.recurrent_state import GriffinState, MambaState
from lmx.core.state import Span
from lmx.quant.apply import quantize_matrix
from lmx.quant.modules import QuantLinear
from lmx.quant.spec import QuantSpec

pytestmark = [needs_kernels, pytest.mark.usefixtures("path")]

# hidden, inner, states, rank, kernel: whole stretches; tails everywhere; states that fill no register; few of each.
WIDTHS = [(128, 256, 16, 8, 4), (72, 150, 5, 7, 3), (40, 321, 16, 33, 4), (40, 21, 4, 5, 2)]
SCHEMES = (None, "nf4", "int8")


def mamba_config(widths, **changes):
    hidden, inner, states, rank, kernel = widths
    raw = {
        **{"vocab_size": 16, "hidden_size": hidden, "num_hidden_layers": 1, "intermediate_size": inner},
        **{"state_size": states, "conv_kernel": kernel, "time_step_rank": rank, **changes},
    }
    return FalconMambaConfig.parse(raw)


def fill(block):
    generator = torch.Generator().manual_seed(5)
    for name, parameter in block.named_parameters():
        spread = 1.0 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
        parameter.data.normal_(0.0, 0.3 if name.endswith("bias") else spread, generator=generator)
    return block.requires_grad_(False)


def quantized(block, names, scheme):
    """The linear layers of these names on quantized weights, and the same layers on what those mean."""
    plain = copy.deepcopy(block)
    for name in names if scheme else ():
        owner, _, last = name.rpartition(".")
        linear = block.get_submodule(name)
        q = QuantLinear(quantize_matrix(linear.weight, QuantSpec(scheme)), linear.bias)
        setattr(block.get_submodule(owner), last, q)
        plain.get_submodule(name).weight.data.copy_(q.dequantize())
    return block, plain.double()


def relative_error(got, expected):
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def mamba(widths, scheme, **changes):
    block = fill(Block(mamba_config(widths, **changes)).bfloat16())
    return quantized(block, ("mixer.in_proj", "mixer.x_proj", "mixer.out_proj"), scheme)


def mamba_state(block, rows):
    state = block.mixer.empty_state(rows, torch.bfloat16, torch.device("cpu"))
    state.conv.copy_(random(*state.conv.shape, seed=1))
    state.hidden.copy_(random(*state.hidden.shape, seed=2))
    return state


CALL = Call(Span(3, 1), torch.tensor([[3]]), Record())


def count_fused(monkeypatch, module, name):
    calls = []
    kernel = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args: calls.append(1) or kernel(*args))
    return calls


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_mamba_step_is_its_layers_and_the_oracle(widths, scheme, rows, monkeypatch):
    block, oracle = mamba(widths, scheme, use_bias=rows == 2, use_conv_bias=rows != 4)
    fused, apart = mamba_state(block, rows), mamba_state(block, rows)
    exact = MambaState(fused.conv.double(), fused.hidden.double())
    calls = count_fused(monkeypatch, falcon_mamba, "mamba_step")
    for step in range(3):
        x = random(rows, 1, widths[0], seed=10 + step).to(torch.bfloat16 if step == 0 else torch.float32)
        got = block(x, CALL, fused)
        with monkeypatch.context() as patch:
            patch.setattr(Block, "_step", lambda *_: None)
            one_by_one = block(x, CALL, apart)
            expected = oracle(x.bfloat16().double(), CALL, exact) - x.bfloat16().double() + x
        assert got.dtype == torch.float32
        assert torch.equal(got, one_by_one)
        assert torch.equal(fused.conv, apart.conv)
        assert torch.equal(fused.hidden, apart.hidden)
        # One rounding of eight bits is more where few channels answer alone.
        bound = 2e-2 if widths[1] > 100 else 6e-2
        assert relative_error(got - x, expected - x) < bound
        assert relative_error(fused.hidden, exact.hidden) < bound
    assert len(calls) == 3


def test_more_threads_change_nothing():
    block, _ = mamba((128, 1024, 16, 64, 4), "nf4")
    x, answers = random(2, 1, 128), []
    threads = torch.get_num_threads()
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        state = mamba_state(block, 2)
        answers.append((block(x, CALL, state), state.conv, state.hidden))
    torch.set_num_threads(threads)
    for answer in answers[1:]:
        assert all(torch.equal(one, other) for one, other in zip(answers[0], answer, strict=True))


def test_what_the_kernel_cannot_see_goes_the_long_way(monkeypatch):
    block, _ = mamba(WIDTHS[0], "nf4")
    calls = count_fused(monkeypatch, falcon_mamba, "mamba_step")
    block(random(5, 1, 128), CALL, mamba_state(block, 5))
    block(random(1, 2, 128), CALL, mamba_state(block, 1))
    block(random(1, 1, 128), CALL, None)
    seen = []
    hook = block.mixer.in_proj.register_forward_hook(lambda *_: seen.append(1))
    block(random(1, 1, 128), CALL, mamba_state(block, 1))
    hook.remove()
    assert seen
    assert not calls
    block(random(1, 1, 128), CALL, mamba_state(block, 1))
    assert calls


# hidden, MLP width, recurrence width, heads, kernel: whole stretches; tails everywhere; a head of many tiles.
GRIFFIN_WIDTHS = [(128, 384, 256, 2, 4), (72, 150, 60, 3, 3), (40, 136, 300, 1, 2)]
TEMPORAL = ("linear_y", "linear_x", "linear_out")


def griffin(widths, scheme, activation="gelu_pytorch_tanh", kind="recurrent"):
    hidden, inner, width, heads, kernel = widths
    raw = {
        **{"vocab_size": 16, "hidden_size": hidden, "num_hidden_layers": 1, "intermediate_size": 2 * inner},
        **{"num_attention_heads": heads, "lru_width": width, "conv1d_width": kernel, "hidden_activation": activation},
        **{"block_types": [kind], "head_dim": 16},
    }
    block = fill(recurrent_gemma.Block(RecurrentGemmaConfig.parse(raw), kind).bfloat16())
    names = [f"mlp.{name}" for name in ("gate", "up", "down")]
    names += [f"temporal.{name}" for name in (TEMPORAL if kind == "recurrent" else "qkvo")]
    return quantized(block, names, scheme)


def griffin_state(block, rows):
    state = block.temporal.empty_state(rows, torch.bfloat16, torch.device("cpu"))
    state.conv.copy_(random(*state.conv.shape, seed=1))
    state.hidden.copy_(random(*state.hidden.shape, seed=2))
    return state


def griffin_call(begins):
    nothing = torch.empty(0)
    return GriffinCall(
        *(Span(3, 1), (~begins).long(), Record()),
        **{"implementation": "sdpa", "rotary": (nothing, nothing), "visibility": Visibility(None), "begins": begins},
    )


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("widths", GRIFFIN_WIDTHS, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 4])
def test_griffin_step_is_its_layers_and_the_oracle(widths, scheme, rows, monkeypatch):
    block, oracle = griffin(widths, scheme, "silu" if rows == 3 else "gelu_pytorch_tanh")
    fused, apart = griffin_state(block, rows), griffin_state(block, rows)
    exact = GriffinState(fused.conv.double(), fused.hidden.double())
    calls = count_fused(monkeypatch, recurrent_gemma, "griffin_step")
    for step in range(3):
        x = random(rows, 1, widths[0], seed=10 + step).bfloat16()
        begins = torch.zeros(rows if step else 1, 1, dtype=torch.bool)
        begins[-1] = step == 1  # one row of several begins anew
        call = griffin_call(begins)
        got = block(x, call, fused)
        with monkeypatch.context() as patch:
            patch.setattr(recurrent_gemma.Block, "_weights_of_step", lambda *_: None)
            one_by_one = block(x, call, apart)
            expected = oracle(x.double(), call, exact)
        # Torch's own gelu may fall on the other side of a border between two numbers of eight bits.
        assert relative_error(got, one_by_one) < 3e-3
        assert torch.equal(fused.conv, apart.conv)
        assert torch.equal(fused.hidden, apart.hidden)
        assert relative_error(got, expected) < 2e-2
        assert relative_error(fused.hidden, exact.hidden) < 2e-2
        apart = GriffinState(fused.conv.clone(), fused.hidden.clone())
    assert len(calls) == 3


@pytest.mark.parametrize("activation", ["gelu_pytorch_tanh", "silu", "relu"])
@pytest.mark.parametrize("rows", [1, 4])
def test_mlp_step_is_its_layers(activation, rows):
    block, oracle = griffin(GRIFFIN_WIDTHS[1], "nf4", activation)
    x = random(rows, 1, 72).bfloat16()
    weights = block.mlp.weights(block.mlp_norm.scale)
    assert weights is not None
    assert can_step_mlp(x, weights)
    assert relative_error(mlp_step(x, weights), x + block.mlp(block.mlp_norm(x))) < 3e-3
    assert relative_error(mlp_step(x, weights), x.double() + oracle.mlp(oracle.mlp_norm(x.double()))) < 2e-2


def test_the_error_functions_gelu_is_torchs():
    block, _ = griffin(GRIFFIN_WIDTHS[1], "nf4", "gelu")
    weights = block.mlp.weights(block.mlp_norm.scale)
    assert weights is not None
    assert not can_step_mlp(random(1, 1, 72).bfloat16(), weights)


@pytest.mark.parametrize("cap", [30.0, 0.5])
def test_soft_cap_is_torchs(cap):
    logits = torch.cat((random(3, 999) * 40, random(3, 1000) * torch.logspace(-30, 2, 1000)), 1).bfloat16()
    logits[0, :4] = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0])
    expected = torch.tanh(logits / cap) * cap
    capped = soft_cap(logits.clone(), cap)
    torch.testing.assert_close(capped, expected, rtol=8e-3, atol=0.0, equal_nan=True)
    assert (capped != expected).float().mean() < 0.02
