"""A transformer block's step in two calls, on every path: to the bit what its modules say, and near the oracle."""

import copy
import statistics

import pytest
import torch
from families import config_of
from native_paths import needs_kernels, path, random  # noqa: F401

from lmx.core.layers import fused
from lmx.core.native.block import can_step_attention
from lmx.presets import build_dummy
from lmx.quant.apply import quantize_matrix
from lmx.quant.matmul import dequantize
from lmx.quant.modules import QuantExpertBank, QuantLinear
from lmx.quant.spec import QuantSpec

pytestmark = [needs_kernels, pytest.mark.usefixtures("path")]

# Whole stretches of rows and heads of whole vectors; tails everywhere; more experts a token.
WIDE = {"hidden_size": 128, "intermediate_size": 256}
ODD = {"hidden_size": 72, "intermediate_size": 150, "num_attention_heads": 6, "num_key_value_heads": 3}
MODELS = {
    "olmoe": config_of("olmoe", **WIDE),
    "olmoe, odd": config_of("olmoe", **ODD, num_experts=10, num_experts_per_tok=5, clip_qkv=0.7, attention_bias=True),
    "olmoe, weights of sum one": config_of("olmoe", norm_topk_prob=True),
    "mixtral": config_of("mixtral", **WIDE),
    "mixtral, odd": config_of("mixtral", **ODD),
    "mixtral, window": config_of("mixtral", sliding_window=6),
    "recurrent_gemma": config_of("recurrent_gemma", attention_window_size=6),
}
SCHEMES = (None, "nf4", "int8")


def make(name, scheme):
    """A model whose linear layers are all quantized, and the same in double precision on what those mean."""
    model = build_dummy(MODELS[name])
    generator = torch.Generator().manual_seed(7)
    for key, parameter in model.named_parameters():
        spread = 0.1 if parameter.dim() == 1 else 1.0 if "embed" in key else parameter.shape[-1] ** -0.5
        parameter.data.normal_(float("norm" in key and "gemma" not in name), spread, generator=generator)
    plain = copy.deepcopy(model)
    if scheme is not None:
        for layer, exact in zip(model.decoder.layers, plain.decoder.layers, strict=True):
            quantize(layer, exact, QuantSpec(scheme))
    return model, plain.double()


def quantize(layer, plain, spec):
    for owner in ("attention", "temporal"):
        for name in "qkvo" if hasattr(getattr(layer, owner, None), "q") else ():
            linear = getattr(getattr(layer, owner), name)
            q = QuantLinear(quantize_matrix(linear.weight, spec), linear.bias)
            setattr(getattr(layer, owner), name, q)
            getattr(getattr(plain, owner), name).weight.data.copy_(q.dequantize())
    if not hasattr(layer.mlp, "experts"):
        return
    bank, exact = layer.mlp.experts, plain.mlp.experts
    matrices = [[quantize_matrix(weight, spec) for weight in part] for part in (bank.gate, bank.up, bank.down)]
    layer.mlp.experts = QuantExpertBank(*matrices, bank.activation)
    for quantized, part in zip(matrices, (exact.gate, exact.up, exact.down), strict=True):
        for q, weight in zip(quantized, part, strict=True):
            weight.data.copy_(dequantize(q))


def count(monkeypatch):
    """How often each of the two kernels is called."""
    calls = {"attention_step": 0, "expert_step": 0}

    def counted(name, kernel):
        def call(*arguments):
            calls[name] += 1
            return kernel(*arguments)

        return call

    for name in calls:
        monkeypatch.setattr(fused, name, counted(name, getattr(fused, name)))
    return calls


def by_modules(monkeypatch):
    monkeypatch.setattr(fused, "_is_step", lambda *_: False)


def relative_error(got, expected):
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def prompt(rows, length, seed=0):
    return torch.randint(1, 60, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rows", [1, 3])
def test_steps_are_their_modules_and_the_oracle(name, scheme, rows, monkeypatch):
    model, oracle = make(name, scheme)
    start = prompt(rows, 4)
    states = [each.make_state(rows) for each in (model, model, oracle)]
    calls, errors = count(monkeypatch), []
    with torch.no_grad():
        for each, state in zip((model, model, oracle), states, strict=True):
            each(start, state=state)
        for step in range(5):
            ids = prompt(rows, 1, step + 1)
            got = model(ids, state=states[0]).logits
            with monkeypatch.context() as patch:
                by_modules(patch)
                apart = model(ids, state=states[1]).logits
            assert torch.equal(got, apart)
            errors.append(relative_error(got, oracle(ids, state=states[2]).logits))
    # Not of each: where two experts are nearly alike, eight bits may choose another one.
    assert statistics.median(errors) < 4e-2
    attentions = sum(hasattr(getattr(layer, "temporal", layer.__dict__), "q") for layer in model.decoder.layers)
    assert calls["attention_step"] == 5 * (attentions or len(model.decoder.layers))
    assert calls["expert_step"] == (0 if attentions else 5 * len(model.decoder.layers))


@pytest.mark.parametrize("name", ["olmoe", "mixtral, window", "recurrent_gemma"])
def test_rows_of_different_lengths(name, monkeypatch):
    model, _ = make(name, "nf4")
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1, :3] = mask[2, 4:] = False
    fused_state, apart = model.make_state(3), model.make_state(3)
    with torch.no_grad():
        for state in (fused_state, apart):
            model(prompt(3, 5), attention_mask=mask, state=state)
        for step in range(4):
            real = torch.ones(3, 1, dtype=torch.bool)
            real[step % 3] = step == 3
            got = model(prompt(3, 1, step), attention_mask=real, state=fused_state).logits
            with monkeypatch.context() as patch:
                by_modules(patch)
                expected = model(prompt(3, 1, step), attention_mask=real, state=apart).logits
            assert torch.equal(got[real[:, 0]], expected[real[:, 0]])


# Wide enough that every product is worth several threads.
FOR_THREADS = {"hidden_size": 512, "intermediate_size": 1024}


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "recurrent_gemma"])
def test_more_threads_change_nothing(family, monkeypatch):
    monkeypatch.setitem(MODELS, "wide", config_of(family, **FOR_THREADS))
    model, _ = make("wide", "nf4")
    answers = []
    threads = torch.get_num_threads()
    for number in (1, 2, 3, 7):
        torch.set_num_threads(1)  # paths without tiles leave a prompt's products to torch
        state = model.make_state(2)
        with torch.no_grad():
            model(prompt(2, 300), state=state)
            torch.set_num_threads(number)
            answers.append(torch.stack([model(prompt(2, 1), state=state).logits for _ in range(5)]))
    torch.set_num_threads(threads)
    assert all(torch.equal(answer, answers[0]) for answer in answers[1:])


def test_what_the_kernels_cannot_see_goes_the_long_way(monkeypatch):
    model, _ = make("mixtral", "nf4")
    calls = count(monkeypatch)
    state = model.make_state(1)
    with torch.no_grad():
        model(prompt(1, 3), state=state)
        model(prompt(1, 2), state=state)
        model(prompt(1, 1), state=None)
        model(prompt(5, 1), state=model.make_state(5))
        assert not any(calls.values())
        asked = model(prompt(1, 1), state=state, output_router_logits=True)
        assert len(asked.router_logits) == 2
        assert calls == {"attention_step": 2, "expert_step": 0}
        seen = []
        for layer in model.decoder.layers:
            layer.mlp.router.register_forward_hook(lambda *_: seen.append(1))
        model(prompt(1, 1), state=state)
        assert len(seen) == 2
        assert calls == {"attention_step": 2, "expert_step": 0}
        model.train()
        model(prompt(1, 1), state=state)
        assert calls == {"attention_step": 2, "expert_step": 0}


@torch.no_grad()
def test_a_cache_of_another_dtype_is_not_taken():
    model, _ = make("mixtral", "nf4")
    block = model.decoder.layers[0]
    weights = block.attention.weights(block.attention_norm.scale)
    assert weights is not None
    keys = torch.zeros(1, 2, 8, 32)
    x = random(1, 1, 128).bfloat16()
    assert can_step_attention(x, weights, keys.bfloat16(), keys.bfloat16())
    assert not can_step_attention(x, weights, keys, keys)
    assert not can_step_attention(x.float(), weights, keys.bfloat16(), keys.bfloat16())
