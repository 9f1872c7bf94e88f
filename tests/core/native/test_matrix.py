"""Many vectors times stored matrices, prompts through banks of experts, and dequantized rows, against torch."""

import pytest
import torch
from native_cases import PATHS, QUANTIZERS, random, relative_error, values
from support import needs_kernels

from lmx.core.layers.moe import run_experts
from lmx.core.native.compiled import forced_path
from lmx.core.native.matrix import answer_many, dequantize_rows, has_panels, multiply_many
from lmx.core.native.vector import ExpertTable, MatrixTable
from lmx.quant.four_bit import quantize_4bit
from lmx.quant.int8 import quantize_int8
from lmx.quant.matmul import choose_product, dequantize
from lmx.quant.native import stored_matrix

pytestmark = needs_kernels
needs_panels = pytest.mark.usefixtures("panels")

QUANTIZED = {name: of for name, of in QUANTIZERS.items() if "float" not in name}


@pytest.fixture(params=QUANTIZED)
def quantizer(request):
    return QUANTIZED[request.param]


@pytest.fixture(params=PATHS)
def path(request):
    with forced_path(request.param) as there:
        if not there:
            pytest.skip(f"this CPU has no {request.param}")
        yield request.param


@pytest.fixture(params=("amx", "avx512"))
def panels(request):
    with forced_path(request.param) as there:
        if not there:
            pytest.skip(f"this CPU has no {request.param}: another path multiplies, or torch does")
        assert has_panels()
        yield request.param


@pytest.mark.parametrize("shape", [(70, 256), (37, 192), (12, 100), (9, 33), (5, 4200), (1, 1)], ids=str)
@pytest.mark.usefixtures("path")
def test_dequantized_rows_are_torchs_to_the_bit(quantizer, shape):
    q = quantizer(random(*shape))
    table = MatrixTable([stored_matrix(q)])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        first = min(1, shape[0] - 1)
        expected = values(q).float().to(dtype)
        assert torch.equal(dequantize_rows(table, first, shape[0], dtype), expected[first:])
        assert torch.equal(dequantize(q, dtype), expected)


@needs_panels
@pytest.mark.parametrize("shape", [(70, 256), (33, 192), (30, 100), (31, 33), (16, 4200)], ids=str)
def test_product_is_torchs(quantizer, shape):
    q = quantizer(random(*shape))
    table = MatrixTable([stored_matrix(q)])
    expected, got = [], []
    for vectors in (*range(1, 15), 17, 64, 70, 257, 513):
        x = random(vectors, shape[1], seed=vectors).bfloat16()
        expected.append(x.double() @ values(q).T)
        got.append(multiply_many(table, x))
        # A few answers can all round badly; what is no rounding is far beyond that.
        assert relative_error(got[-1], expected[-1]) < (3e-3 if vectors > 4 else 1e-2)
    assert relative_error(torch.cat(got[:4]), torch.cat(expected[:4])) < 3e-3


@needs_panels
def test_threads_and_company_do_not_change_a_bit(quantizer):
    table = MatrixTable([stored_matrix(quantizer(random(515, 320)))])
    x = random(300, 320, seed=1).bfloat16()
    before = torch.get_num_threads()
    answers = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        answers.append(multiply_many(table, x))
    torch.set_num_threads(before)
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])
    assert torch.equal(answers[0][7:280], multiply_many(table, x[7:280]))


@needs_panels
def test_strides_nan_and_infinity():
    q = quantize_4bit(random(40, 128), "nf4")
    table = MatrixTable([stored_matrix(q)])
    x = random(9, 2, 128).bfloat16()[:, 1]
    assert torch.equal(multiply_many(table, x), multiply_many(table, x.contiguous()))
    x[3, 5], x[7, 100] = torch.nan, torch.inf
    got = multiply_many(table, x)
    assert got[3].isnan().all()
    assert not got[7].isfinite().any()
    assert got[[0, 1, 2, 4, 5, 6, 8]].isfinite().all()


@needs_panels
@pytest.mark.parametrize(("hidden", "inner"), [(128, 192), (96, 50), (64, 33)])
def test_experts_answer_as_torchs(quantizer, hidden, inner):
    shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
    matrices = [[quantizer(random(*s, seed=9 * e + i)) for i, s in enumerate(shapes)] for e in range(6)]
    table = ExpertTable([tuple(map(stored_matrix, expert)) for expert in matrices], "silu")
    tokens = 2200
    x = (random(tokens, hidden) / hidden**0.5).bfloat16()
    weights, ids = random(tokens, 6, seed=1).softmax(-1).topk(2)
    ids[:600, 0], ids[600:, 0] = 4, 5  # experts of more than a panel, more than a batch in all, and expert 0 has none
    ids[:, 1] = ids[:, 1] % 3 + 1
    gate, up, down = ([values(expert[i]) for expert in matrices] for i in range(3))
    expected = run_experts(x.double(), ids, weights.double(), gate, up, down, "silu")
    got = answer_many(table, x, ids, weights)
    assert relative_error(got, expected) < 5e-3
    before = torch.get_num_threads()
    torch.set_num_threads(before % 2 + 1)
    assert torch.equal(answer_many(table, x, ids, weights), got)
    torch.set_num_threads(before)


@pytest.mark.parametrize("vectors", [1, 4, 5, 40, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("path")
def test_every_number_of_vectors_has_a_product(vectors, dtype):
    for q in (quantize_4bit(random(80, 192), "nf4", double_quant=True), quantize_int8(random(80, 192))):
        x = random(2, vectors, 192, seed=3).to(dtype)
        got = choose_product(q)(x)
        assert got.dtype == dtype
        assert relative_error(got, x.double() @ values(q).T) < {torch.float32: 1e-6}.get(dtype, 3e-3)


@needs_panels
def test_compiled_code_calls_the_operations():
    table = MatrixTable([stored_matrix(quantize_4bit(random(8, 64), "nf4"))])
    x = random(6, 64).bfloat16()
    torch.library.opcheck(torch.ops.lmx.multiply_many.default, (table.words, x, 8))
