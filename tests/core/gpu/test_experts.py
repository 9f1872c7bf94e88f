"""Banks of experts by Triton's kernels, under its interpreter and on a card, against float64 products in torch.

The matrices come from bitsandbytes' own dequantization of the same bytes.
"""

import copy
from dataclasses import replace

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit

from lmx.core.gpu.launch import can_launch, interpreted
from lmx.core.layers.activation import ACTIVATIONS
from lmx.core.layers.moe import ExpertBank, run_experts
from lmx.quant.four_bit import FourBit, quantize_4bit
from lmx.quant.int8 import Int8, quantize_int8
from lmx.quant.matmul import _quant_state, bitsandbytes_product
from lmx.quant.modules import QuantExpertBank
from lmx.quant.native import describe_matrix

# The interpreter must be chosen before Triton is imported by anyone: test_interpreter.py does that in a child.
pytestmark = pytest.mark.skipif(
    not interpreted() and not torch.cuda.is_available(), reason="no CUDA device, and TRITON_INTERPRET=1 is not set"
)

QUANTIZERS = {
    "nf4": lambda w: quantize_4bit(w, "nf4"),
    "nf4, short blocks": lambda w: quantize_4bit(w, "nf4", 32),
    "nf4 double, long blocks": lambda w: quantize_4bit(w, "nf4", 512, double_quant=True),
    "fp4 double": lambda w: quantize_4bit(w, "fp4", double_quant=True),
    "int8": quantize_int8,
    "bfloat16": lambda w: w.bfloat16(),
    "float16": lambda w: w.half(),
    "float32": lambda w: w,
}
# The interpreter cuts bfloat16's last digits off instead of rounding, where a card is as good as torch.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2 if interpreted() else 5e-3}
EXPERTS, HIDDEN, INNER = 4, 40, 56


@pytest.fixture(params=[pytest.param("cpu", id="interpreter"), pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    if (request.param == "cpu") != interpreted():
        pytest.skip("the interpreter runs in a process of its own")
    return torch.device(request.param)


@pytest.fixture
def experts(monkeypatch):
    """The module, with tiles as a large bank has them: the interpreter takes its time for each program."""
    from lmx.core.gpu import experts

    monkeypatch.setattr("lmx.core.gpu.table._WARPS_WANTED", 1)
    return experts


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def draw(quantize, hidden=HIDDEN, inner=INNER, experts=EXPERTS):
    """Gate, up and down matrices."""
    shapes = (inner, hidden), (inner, hidden), (hidden, inner)
    return [[quantize(random(*shape, seed=3 * e + n) / 4) for e in range(experts)] for n, shape in enumerate(shapes)]


def values(q):
    if isinstance(q, torch.Tensor):
        return q.double()
    if isinstance(q, Int8):
        return q.weight.double() * q.absmax.double()[:, None] / 127
    return dequantize_4bit(q.packed, _quant_state(q)).double()


def definition(parts, x, ids, weights, activation="silu"):
    gate, up, down = ([values(q).cpu() for q in part] for part in parts)
    x, ids, weights = x.cpu().double(), ids.cpu(), weights.cpu().double()
    return run_experts(x, ids, weights, gate, up, down, activation)


def bank_of(experts, parts, device, activation="silu"):
    moved = [[q.to(device) for q in part] for part in parts]
    described = zip(*([describe_matrix(q) for q in part] for part in moved), strict=True)
    return experts.DeviceBank.make(list(described), activation)


def route(tokens, top_k, experts=EXPERTS):
    weights, ids = random(tokens, experts, seed=51).softmax(-1).topk(top_k)
    return ids, weights


def check(experts, parts, device, tokens, top_k=2, dtype=torch.float32, activation="silu"):
    x, (ids, weights) = random(tokens, parts[0][0].shape[1], seed=50).to(dtype), route(tokens, top_k)
    got = bank_of(experts, parts, device, activation).answer(x.to(device), ids.to(device), weights.to(device))
    assert (got.dtype, got.device.type) == (dtype, device.type)
    expected = definition(parts, x, ids, weights, activation)
    assert (got.cpu().double() - expected).norm() < TOLERANCE[dtype] * expected.norm()


@pytest.mark.parametrize("tokens", [1, 9], ids=["a few", "many"])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_answers_are_torchs(experts, device, name, tokens):
    check(experts, draw(QUANTIZERS[name]), device, tokens)


@pytest.mark.parametrize("tokens", [1, 9], ids=["a few", "many"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_activations_in_16_bits(experts, device, dtype, tokens):
    check(experts, draw(QUANTIZERS["nf4"]), device, tokens, dtype=dtype)


@pytest.mark.parametrize("tokens", [1, 9], ids=["a few", "many"])
@pytest.mark.parametrize("activation", sorted(set(ACTIVATIONS) - {"silu", "swish", "gelu_new"}))
def test_activations_of_the_gate(experts, device, activation, tokens):
    check(experts, draw(QUANTIZERS["float32"], 8, 8), device, tokens, top_k=1, activation=activation)


@pytest.mark.parametrize(("name", "hidden", "inner"), [("float32", 13, 37), ("int8", 12, 20), ("bfloat16", 6, 10)])
def test_odd_rows_and_columns(experts, device, name, hidden, inner):
    for tokens in (1, 9):
        check(experts, draw(QUANTIZERS[name], hidden, inner), device, tokens)


def test_rows_longer_than_a_tile_and_tiles_of_few_rows(experts, device, monkeypatch):
    check(experts, draw(QUANTIZERS["nf4"], 8, 520), device, 1, top_k=1)
    monkeypatch.setattr("lmx.core.gpu.table._WARPS_WANTED", 1 << 20)
    check(experts, draw(QUANTIZERS["nf4"], 8, 24), device, 1, top_k=1)


def test_several_tiles_of_tokens(experts, device):
    check(experts, draw(QUANTIZERS["nf4 double, long blocks"]), device, 70)
    check(experts, draw(QUANTIZERS["float32"]), device, 200, top_k=1)  # tiles of 64


def test_blocks_of_zeros(experts, device):
    parts = draw(lambda w: quantize_4bit(torch.where(torch.arange(len(w))[:, None] % 3 == 0, 0.0, w), "nf4"))
    for tokens in (1, 9):
        check(experts, parts, device, tokens)


@pytest.mark.parametrize("tokens", [3, 9], ids=["a few", "many"])
def test_all_tokens_to_one_expert_and_weights_of_zero(experts, device, tokens):
    parts, x = draw(QUANTIZERS["nf4"]), random(tokens, HIDDEN, seed=50)
    ids, weights = torch.tensor([[3, 3]] * tokens), torch.tensor([[0.75, 0.0]] * tokens)
    bank = bank_of(experts, parts, device)
    got = bank.answer(x.to(device), ids.to(device), weights.to(device)).cpu()
    expected = definition(parts, x, ids, weights)
    assert (got - expected).norm() < 2e-6 * expected.norm()


@pytest.mark.parametrize("tokens", [3, 9], ids=["a few", "many"])
def test_what_is_no_number_stays_with_its_token(experts, device, tokens):
    parts, x, (ids, weights) = draw(QUANTIZERS["nf4"]), random(tokens, HIDDEN, seed=50), route(tokens, 2)
    good = bank_of(experts, parts, device).answer(x.to(device), ids.to(device), weights.to(device)).cpu()
    x[1, 7], weights[2, 0] = torch.nan, torch.nan
    got = bank_of(experts, parts, device).answer(x.to(device), ids.to(device), weights.to(device)).cpu()
    assert got[1:3].isnan().all()
    assert torch.equal(got[0], good[0])
    assert torch.equal(got[3:], good[3:])


@pytest.mark.parametrize("tokens", [4, 9], ids=["a few", "many"])
def test_the_id_of_no_expert_makes_its_token_nan_and_reads_nothing(experts, device, tokens):
    parts, x, (ids, weights) = draw(QUANTIZERS["nf4"], 8, 8), random(tokens, 8, seed=50), route(tokens, 2)
    good = bank_of(experts, parts, device).answer(x.to(device), ids.to(device), weights.to(device)).cpu()
    ids[0, 1], ids[1, 0], ids[2, 1] = EXPERTS, -1, 1 << 40
    got = bank_of(experts, parts, device).answer(x.to(device), ids.to(device), weights.to(device)).cpu()
    assert got[:3].isnan().all()
    assert torch.equal(got[3:], good[3:])


@pytest.mark.parametrize("tokens", [1, 9], ids=["a few", "many"])
def test_experts_that_no_token_chose_are_not_read(experts, device, tokens):
    parts = draw(QUANTIZERS["nf4"])
    for part in parts:
        part[0] = replace(part[0], absmax=torch.full_like(part[0].absmax, torch.nan))
    x, ids = random(tokens, HIDDEN, seed=50).to(device), torch.tensor([[3, 1]] * tokens, device=device)
    bank, weights = bank_of(experts, parts, device), torch.full((tokens, 2), 0.5, device=device)
    assert bank.answer(x, ids, weights).isfinite().all()
    assert bank.answer(x, ids * 0, weights).isnan().all()


def test_a_long_prompt_goes_through_in_parts(experts, device, monkeypatch):
    parts, x, (ids, weights) = draw(QUANTIZERS["float32"], 8, 8), random(300, 8, seed=50), route(300, 1)
    bank = bank_of(experts, parts, device)
    whole = bank.answer(x.to(device), ids.to(device), weights.to(device))
    monkeypatch.setattr(experts, "_INNER_ELEMENTS", 8)
    in_parts = bank.answer(x.to(device), ids.to(device), weights.to(device))
    torch.testing.assert_close(in_parts, whole, rtol=1e-6, atol=1e-6)


def test_choices_are_sorted_and_cut_into_tiles(experts):
    ids = torch.tensor([[3, 0], [3, 1], [3, 0], [3, 3]])
    order, starts, first_tiles = experts.sort_choices(ids, 5, 2)
    assert order.tolist() == [1, 5, 3, 0, 2, 4, 6, 7]
    assert starts.tolist() == [0, 2, 3, 3, 8, 8]
    assert first_tiles.tolist() == [0, 1, 2, 2, 5, 5]


def test_banks_that_the_kernels_cannot_read(experts, device):
    assert bank_of(experts, draw(QUANTIZERS["nf4"], 8, 12), device) is None  # rows begin within a word
    mixed = draw(QUANTIZERS["nf4"])
    mixed[1][2] = quantize_int8(random(INNER, HIDDEN))
    assert bank_of(experts, mixed, device) is None
    strided = draw(QUANTIZERS["float32"], 8, 8)
    strided[2][0] = strided[2][0].T
    assert bank_of(experts, strided, device) is None


@pytest.fixture
def answered(experts, monkeypatch):
    """How many tokens each call of the kernels had."""
    calls, answer = [], experts.DeviceBank.answer
    monkeypatch.setattr(
        experts.DeviceBank, "answer", lambda self, x, *of: (calls.append(len(x)), answer(self, x, *of))[1]
    )
    return calls


def test_the_quantized_module_takes_the_kernels(device, answered):
    parts, x, (ids, weights) = draw(QUANTIZERS["nf4"]), random(2, HIDDEN, seed=50), route(2, 2)
    bank = QuantExpertBank(*parts, "silu").to(device)
    x, ids, weights = x.to(device), ids.to(device), weights.to(device)
    with torch.no_grad():
        expected = definition(parts, x, ids, weights)
        assert (bank(x, ids, weights).cpu() - expected).norm() < 2e-6 * expected.norm()
        assert answered == [2]
        twin = copy.deepcopy(bank)
        for q in bank.gate:
            q.absmax.zero_()
        assert not bank(x, ids, weights).any()
        assert (twin(x, ids, weights).cpu() - expected).norm() < 2e-6 * expected.norm()
    assert answered == [2, 2, 2]
    bank(x.clone().requires_grad_(), ids, weights).sum().backward()  # torch's path
    assert answered == [2, 2, 2]


def test_the_plain_module_takes_the_kernels_and_follows_its_parameters(device, answered):
    bank = ExpertBank(EXPERTS, 8, 16, "silu").to(device)
    for n, weight in enumerate(bank.parameters()):
        weight.data = random(*weight.shape, seed=n).to(device)
    x, (ids, weights) = random(1, 8, seed=50).to(device), route(1, 2)
    ids, weights = ids.to(device), weights.to(device)
    for _ in range(2):
        expected = run_experts(x, ids, weights, list(bank.gate), list(bank.up), list(bank.down), "silu")
        with torch.no_grad():
            got = bank(x, ids, weights)
        assert (got - expected).norm() < 2e-6 * expected.norm()
        for weight in bank.parameters():  # somewhere else, and something else
            weight.data = weight.data.flip(0).clone()
    assert answered == [1, 1]
    with torch.no_grad():  # a dtype that the kernels do not know
        assert bank.double()(x.double(), ids, weights).dtype == torch.float64
    assert answered == [1, 1]


@pytest.mark.usefixtures("experts")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_few_vectors_times_int8(device, dtype):
    q = quantize_int8(random(37, 68))
    product, x = bitsandbytes_product(q.to(device)), random(2, 3, 68, seed=1).to(dtype)
    got, expected = product(x.to(device)), x.double() @ values(q).T
    assert (got.shape, got.dtype) == ((2, 3, 37), dtype)
    assert (got.cpu().double() - expected).norm() < TOLERANCE[dtype] * expected.norm()
    assert bitsandbytes_product(q.to(device))(x[0, :0].to(device)).shape == (0, 37)


def test_answers_are_the_same_each_time(experts, device):
    bank, (ids, weights) = bank_of(experts, draw(QUANTIZERS["nf4"]), device), route(3, 2)
    x, ids, weights = random(3, HIDDEN, seed=50).to(device), ids.to(device), weights.to(device)
    assert torch.equal(bank.answer(x, ids, weights), bank.answer(x, ids, weights))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("tokens", [1, 300])
def test_a_step_waits_for_nothing_and_can_be_captured(tokens):
    from lmx.core.gpu import experts

    device = torch.device("cuda")
    bank = bank_of(experts, draw(QUANTIZERS["nf4"], 256, 512, 8), device)
    x, (ids, weights) = random(tokens, 256, seed=50).to(device, torch.bfloat16), route(tokens, 2, 8)
    ids, weights = ids.to(device), weights.to(device)
    bank.answer(x, ids, weights)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        eager = bank.answer(x, ids, weights)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = bank.answer(x, ids, weights)
    graph.replay()
    assert torch.equal(captured, eager)
    ids.copy_(ids.flip(0))
    graph.replay()
    assert torch.equal(captured, bank.answer(x, ids, weights))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("quantize", [lambda w: quantize_4bit(w, "nf4"), quantize_int8], ids=["nf4", "int8"])
@pytest.mark.parametrize("shape", [(8, 2, 4096, 14336), (64, 8, 2048, 1024)], ids=["Mixtral", "OLMoE"])
def test_published_sizes(quantize, shape):
    from lmx.core.gpu import experts

    count, top_k, hidden, inner = shape
    parts = [[matrix] * count for matrix in (part[0] for part in draw(quantize, hidden, inner, 1))]
    bank = bank_of(experts, parts, torch.device("cuda"))
    for tokens in (1, 8, 512):
        x, (ids, weights) = random(tokens, hidden, seed=50).bfloat16(), route(tokens, top_k, count)
        got = bank.answer(x.cuda(), ids.cuda(), weights.cuda()).cpu()
        expected = definition([part[:1] for part in parts], x[:1], ids[:1] * 0, weights[:1])
        assert (got[:1].double() - expected).norm() < 5e-3 * expected.norm()
        assert got.isfinite().all()


def test_the_interpreter_is_what_is_tested(device):
    assert can_launch(torch.zeros(1, device=device))
    assert isinstance(draw(QUANTIZERS["nf4"])[0][0], FourBit)
