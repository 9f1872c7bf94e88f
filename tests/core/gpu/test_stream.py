"""What stands between a step's products, by the CUDA kernels, against torch's many operations."""

import pytest
import torch
from gpu_paths import random, relative_error, tolerance
from graph_steps import assert_same, prompt, read, small

from lmx.core.gpu import stream
from lmx.core.kv_cache import AttentionCache, KVCache, WindowKVCache
from lmx.core.layers.attention import clip
from lmx.core.layers.moe import route
from lmx.core.layers.norm import OffsetRMSNorm, RMSNorm
from lmx.core.layers.rope import rotary_tables, rotate
from lmx.core.state import Span
from lmx.core.static_step import StaticStep

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("width", [1, 100, 2048])
@pytest.mark.parametrize("kind", [RMSNorm, OffsetRMSNorm])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms(width, kind, dtype, device):
    norm = kind(width, 1e-5).to(device, dtype).requires_grad_(False)
    norm.weight.copy_(random(width, seed=1).to(device, dtype))
    x = (random(2, 3, width) * 30).to(device, dtype)
    x[1, 2, width // 2] = torch.nan
    assert stream.can_normalise(x, norm.weight)
    scale = norm.weight.double() + (kind is OffsetRMSNorm)
    expected = torch.nn.functional.rms_norm(x.double(), (width,), None, 1e-5) * scale
    got = norm(x)
    assert got.dtype == dtype
    assert torch.equal(got.isnan(), expected.isnan())
    assert relative_error(got.nan_to_num(), expected.nan_to_num()) < 2 * tolerance(dtype, device)  # rounded twice


def test_a_stream_in_float32_is_rounded_first(device):
    norm = RMSNorm(96, 1e-6).to(device, torch.bfloat16).requires_grad_(False)
    x = random(1, 1, 96).to(device)
    assert norm.of_rounded(x).dtype == torch.bfloat16
    expected = torch.nn.functional.rms_norm(x.double(), (96,), None, 1e-6)
    assert relative_error(norm.of_rounded(x), expected) < 2 * tolerance(torch.bfloat16, device)
    seen = []
    norm.register_forward_hook(lambda *call: seen.append(call))
    norm.of_rounded(x)
    assert len(seen) == 1, "who watches the module sees it called"


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (64, 8), (16, 4), (5, 3), (3, 3), (2, 1)])
@pytest.mark.parametrize("normalize", [None, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_are_chosen_as_torch_chooses(experts, top_k, normalize, dtype, device):
    logits = (
        torch.stack([torch.randperm(experts, generator=torch.Generator().manual_seed(seed)) for seed in range(7)]).to(
            device, dtype
        )
        / 8
    )  # no ties
    assert stream.can_route(logits, normalize)
    ids, weights = route(logits, top_k, normalize)
    probabilities, expected = logits.double().softmax(-1).topk(top_k, -1)
    if normalize is not None:
        probabilities /= probabilities.sum(-1, keepdim=True)
    assert torch.equal(ids, expected)
    assert ids.dtype == torch.int64
    torch.testing.assert_close(weights, probabilities.float(), rtol=2e-6, atol=1e-7)


def test_ties_go_to_the_lower_id_and_nan_to_no_expert(device):
    logits = torch.tensor([[1.0, 2.0, 2.0, 0.0], [0.0, torch.nan, 0.0, 0.0]], device=device)
    ids, weights = route(logits, 2, 1.0)
    assert ids[0].tolist() == [1, 2]
    assert (ids[1] >= 4).all()
    assert weights[0].tolist() == [0.5, 0.5]


# heads, key heads, width of a head, of which so many channels turn
SHAPES = [(4, 2, 16, 16), (3, 3, 20, 12), (5, 1, 32, 16)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("limit", [None, 0.5])
@pytest.mark.parametrize(("cache", "number"), [("kv", 0), ("kv", 300), ("window", 5), ("window", 21)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_is_turned_and_kept(shape, limit, cache, number, dtype, device):
    """In its slot and nowhere else, by the same numbers as in several operations."""
    heads, kv_heads, width, turned = shape
    rows, at = 2, torch.tensor([number], device=device)
    sizes = (rows, kv_heads, width, dtype, device)
    ours, theirs = (KVCache.empty(*sizes, slots=512) if cache == "kv" else WindowKVCache.empty(*sizes, 8) for _ in "ab")
    query, key, value = (
        random(rows, 1, count * width, seed=seed).to(device, dtype)
        for seed, count in enumerate((heads, kv_heads, kv_heads))
    )
    rotary = rotary_tables(at[None], turned, 1e4)
    assert stream.can_keep_heads(query, key, value, ours.keys, ours.values)
    got = stream.keep_heads(query, key, value, rotary, at, ours.keys, ours.values, limit)
    split = [clip(x, limit).unflatten(-1, (-1, width)).transpose(1, 2) for x in (query, key, value)]
    expected = theirs.update(rotate(split[1], rotary), split[2], Span(number, 1, at=at))
    allowed = {torch.float32: 1e-6, torch.bfloat16: 2**-8 if device.type == "cuda" else 2**-7}[dtype]
    torch.testing.assert_close(got, rotate(split[0], rotary), rtol=allowed, atol=allowed)
    assert got.shape == (rows, heads, 1, width)
    for mine, other in zip(ours.first(number + 1), expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=allowed, atol=allowed)
    assert torch.equal(ours.values, theirs.values)


def test_what_is_left_to_torch(device):
    x = random(2, 3, 8).to(device)
    weight = random(8).to(device)
    assert not stream.can_normalise(x.transpose(0, 1), weight)
    assert not stream.can_normalise(x.bfloat16(), weight)
    assert not stream.can_normalise(x, weight.requires_grad_())
    assert not stream.can_route(x[0], 2.0)
    assert not stream.can_route(x[0].clone().requires_grad_(), None)
    buffer = random(2, 1, 4, 8).to(device)
    assert not stream.can_keep_heads(x, x, x, buffer, buffer)  # three tokens
    assert not stream.can_keep_heads(x[:, :1].bfloat16(), x[:, :1], x[:, :1], buffer, buffer)


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "dbrx", "recurrent_gemma"])
def test_a_static_step_keeps_its_heads_by_the_kernel(family, device, monkeypatch):
    """Its logits are those of the model called, which turns and keeps them by torch; a ring goes round on the way."""
    kept = []

    def noted(*given):
        kept.append(given)
        return stream.keep_heads(*given)

    monkeypatch.setattr("lmx.core.call.keep_heads", noted)
    model = small(family).to(device)
    (one, _), (other, _) = read(model, prompt(9)), read(model, prompt(9))
    step = StaticStep(model, one, None)
    with torch.no_grad():
        for seed in range(10):
            token = prompt(1, 1, seed).to(device)
            step.make_room()
            step.tokens.copy_(token)
            step.run()
            step.count()
            expected = model(token, state=other).logits[:, -1]
            torch.testing.assert_close(step.logits, expected, rtol=1e-4, atol=1e-4)
    attending = sum(isinstance(layer, AttentionCache) for layer in one.layers)
    assert len(kept) == 10 * attending > 0
    assert_same(one, other)
