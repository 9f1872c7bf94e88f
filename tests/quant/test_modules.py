import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch import nn
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

from lmx.core.errors import InputError
from lmx.core.layers.moe import ExpertBank
from lmx.quant import matmul
from lmx.quant.four_bit import quantize_4bit
from lmx.quant.int8 import quantize_int8
from lmx.quant.matmul import bitsandbytes_product, dequantize
from lmx.quant.modules import QuantExpertBank, QuantLinear
from lmx.quant.serialize import read_four_bit, read_int8

QUANTIZERS = {
    "nf4": lambda x: quantize_4bit(x, "nf4"),
    "fp4 double, long blocks": lambda x: quantize_4bit(x, "fp4", 512, double_quant=True),
    "int8": quantize_int8,
}
# Rows of whole blocks, rows that share blocks, rows of an odd length.
SHAPES = [(200, 128), (37, 100), (65, 33), (1, 1)]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=QUANTIZERS)
def quantizer(request):
    return QUANTIZERS[request.param]


@pytest.fixture(params=[64, 5000, 1 << 18])
def tile(request, monkeypatch):
    monkeypatch.setattr(matmul, "_TILE", request.param)


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_is_the_product_with_the_dequantized_weight(quantizer, shape, dtype):
    q, bias = quantizer(random(*shape) * 0.1), random(shape[0], seed=1)
    layer = QuantLinear(q, bias)
    for lead in [(1,), (2, 3), ()]:
        x = random(*lead, shape[1], seed=2).to(dtype)
        expected = linear(x.float(), dequantize(q, dtype).float(), bias)
        got = layer(x)
        assert got.dtype == dtype
        # In float32 only the order of additions differs; in bfloat16 the product, the bias and the sum are rounded.
        tolerance = 1e-5 if dtype == torch.float32 else 3 * 2**-8
        torch.testing.assert_close(got.float(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


def test_no_tokens_give_no_answers(quantizer):
    assert QuantLinear(quantizer(random(20, 64)))(torch.zeros(0, 64)).shape == (0, 20)


@pytest.mark.usefixtures("tile")
def test_gradients_of_input_and_bias(quantizer):
    q, bias = quantizer(random(70, 96)), random(70, seed=1).requires_grad_()
    x, grad = random(2, 5, 96, seed=2).requires_grad_(), random(2, 5, 70, seed=3)
    expected = torch.autograd.grad(linear(x, dequantize(q, torch.float32), bias), [x, bias], grad)
    layer = QuantLinear(q, bias.detach().clone().requires_grad_())
    got = torch.autograd.grad(layer(x), [x, layer.bias], grad)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_memory_of_a_product_is_bounded_by_the_tile(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # all work on this thread, where it can be watched
    monkeypatch.setattr(matmul, "matrix_table", lambda q: None)  # torch's path
    q = quantize_4bit(random(2048, 1024).bfloat16(), "nf4")
    mapped = {q.packed.untyped_storage().data_ptr(), q.absmax.untyped_storage().data_ptr()}
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in mapped:
                sizes.append(out.untyped_storage().nbytes())
            return out

    with Watch():
        QuantLinear(q)(random(8, 1024))
    assert max(sizes) == 4 * matmul._TILE < 4 * 2048 * 1024


def test_agrees_with_the_layer_of_bitsandbytes():
    x, weight = random(5, 192), random(64, 192, seed=1) * 0.05
    theirs = Linear4bit(192, 64, bias=False, quant_type="nf4", compress_statistics=True)
    theirs.load_state_dict({"weight": weight})
    theirs.to("cpu").train()  # in training mode it computes in float32
    ours = QuantLinear(quantize_4bit(weight, "nf4", double_quant=True))
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("double_quant", [False, True])
def test_the_bitsandbytes_product_is_the_same_product(double_quant):
    """The code that serves CUDA, run on bitsandbytes' CPU kernels."""
    x, weight = random(3, 128), random(64, 128, seed=1)
    q4 = quantize_4bit(weight, "nf4", 64, double_quant)
    torch.testing.assert_close(bitsandbytes_product(q4)(x), QuantLinear(q4)(x), rtol=1e-5, atol=1e-4)
    q8 = quantize_int8(weight)
    exact, rounded = QuantLinear(q8)(x), bitsandbytes_product(q8)(x)
    assert rounded.dtype == x.dtype
    assert 0 < (exact - rounded).abs().max() < 0.02 * exact.abs().max()  # activations are rounded to 8 bits too


def test_a_change_of_dtype_leaves_the_format_alone(quantizer):
    model = nn.Sequential(QuantLinear(quantizer(random(20, 64)), random(20)))
    before = model[0].dequantize(torch.float32)
    model.to(torch.bfloat16)
    assert model[0].bias.dtype == torch.bfloat16
    assert model[0].weight.absmax.dtype in (torch.float32, torch.uint8)
    assert torch.equal(model[0].dequantize(torch.float32), before)
    assert model.to("meta")[0].weight.absmax.device.type == "meta"


def test_state_dict_is_the_serialization(quantizer):
    layer = QuantLinear(quantizer(random(20, 64)), random(20))
    state = nn.ModuleDict({"proj": layer}).state_dict()
    assert torch.equal(state.pop("proj.bias"), layer.bias)
    if "proj.SCB" in state:
        read = read_int8("proj.weight", state, torch.float32)
    else:
        read = read_four_bit("proj.weight", state)
    assert torch.equal(dequantize(read), layer.dequantize())


def test_what_is_no_matrix_is_refused():
    with pytest.raises(InputError, match=r"\[2, 3, 4\] is no matrix"):
        QuantLinear(quantize_4bit(random(2, 3, 4), "nf4"))
    q = quantize_int8(random(4, 4))
    with pytest.raises(InputError, match="2 gate, 1 up and 2 down"):
        QuantExpertBank([q, q], [q], [q, q], "silu")


def make_banks(quantizer, experts=6, hidden=64, inner=96, activation="silu"):
    """A bank on quantized experts, and the plain one with what they dequantize to."""
    matrices = {
        "gate": [quantizer(random(inner, hidden, seed=3 * e) * 0.1) for e in range(experts)],
        "up": [quantizer(random(inner, hidden, seed=3 * e + 1) * 0.1) for e in range(experts)],
        "down": [quantizer(random(hidden, inner, seed=3 * e + 2) * 0.1) for e in range(experts)],
    }
    plain = ExpertBank(experts, hidden, inner, activation).requires_grad_(False)
    for name, quantized in matrices.items():
        for parameter, q in zip(getattr(plain, name), quantized, strict=True):
            parameter.copy_(dequantize(q, torch.float32))
    return QuantExpertBank(**matrices, activation=activation), plain


@pytest.mark.parametrize("tokens", [0, 1, 2, 17])
@pytest.mark.parametrize(("top_k", "activation"), [(1, "gelu"), (2, "silu"), (6, "silu")])
def test_bank_answers_as_the_plain_one(quantizer, tokens, top_k, activation):
    quantized, plain = make_banks(quantizer, activation=activation)
    x = random(tokens, 64, seed=100)
    weights, ids = random(tokens, 6, seed=101).softmax(-1).topk(top_k)
    torch.testing.assert_close(quantized(x, ids, weights), plain(x, ids, weights), rtol=1e-5, atol=1e-5)
    half = quantized(x.bfloat16(), ids, weights)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), plain(x, ids, weights), rtol=0.05, atol=0.02)


def test_gradients_through_the_bank(quantizer):
    quantized, plain = make_banks(quantizer)
    x = random(9, 64, seed=100).requires_grad_()
    weights, ids = random(9, 6, seed=101).softmax(-1).topk(2)
    weights.requires_grad_()
    expected = torch.autograd.grad(plain(x, ids, weights).square().sum(), [x, weights])
    got = torch.autograd.grad(quantized(x, ids, weights).square().sum(), [x, weights])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 3, 9], ids=["one token", "a few", "many"])
def test_experts_that_no_token_chose_are_not_touched(quantizer, tokens):
    bank, _ = make_banks(quantizer)
    for number in (0, 2, 5):
        for matrix in (bank.gate[number], bank.up[number], bank.down[number]):
            scales = matrix.absmax if matrix.absmax.is_floating_point() else matrix.nested.absmax
            scales.fill_(torch.nan)
    ids = torch.tensor([[4, 1], [4, 3], [4, 1]] * 3)[:tokens]
    assert bank(random(tokens, 64), ids, torch.full((tokens, 2), 0.5)).isfinite().all()
    assert bank(random(1, 64), torch.tensor([[4, 5]]), torch.full((1, 2), 0.5)).isnan().all()


def test_a_change_of_dtype_leaves_the_experts_alone(quantizer):
    bank, _ = make_banks(quantizer)
    bank.to(torch.bfloat16)
    assert all(q.absmax.dtype in (torch.float32, torch.uint8) for q in bank.gate + bank.up + bank.down)
