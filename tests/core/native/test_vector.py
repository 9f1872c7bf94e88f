"""A few vectors times stored matrices, on every path that this CPU has, against float64 products in torch."""

import pytest
import torch
import torch.nn.functional as F
from native_cases import PATHS, QUANTIZERS, random, relative_error, values
from support import needs_kernels

from lmx.core.layers.activation import ACTIVATIONS
from lmx.core.layers.linear import FewVectors, Linear
from lmx.core.native.library import forced_path
from lmx.core.native.vector import ExpertTable, Kind, MatrixTable, StoredMatrix
from lmx.quant.four_bit import quantize_4bit
from lmx.quant.native import stored_matrix

pytestmark = needs_kernels

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rounding of the answer, and in bf16 that of the table of values.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 3e-3, torch.float16: 5e-4}
# Whole blocks; an odd number of them; rows that share blocks; odd rows and columns; a single element.
SHAPES = [(130, 256), (37, 192), (5, 100), (7, 33), (1, 1), (3, 4096)]


@pytest.fixture(params=PATHS)
def path(request):
    with forced_path(request.param) as there:
        if not there:
            pytest.skip(f"this CPU has no {request.param}")
        yield request.param


@pytest.fixture(params=QUANTIZERS)
def quantizer(request):
    return QUANTIZERS[request.param]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("path")
def test_product_is_torchs(quantizer, shape):
    q = quantizer(random(*shape))
    table = MatrixTable([stored_matrix(q)])
    for dtype in DTYPES:
        x = random(4, shape[1], seed=1).to(dtype)
        got = table.multiply(x)
        assert got.dtype == dtype
        assert relative_error(got, x.double() @ values(q).T) < TOLERANCE[dtype]


@pytest.mark.usefixtures("path")
def test_vectors_do_not_know_of_each_other(quantizer):
    table = MatrixTable([stored_matrix(quantizer(random(70, 384)))])
    for dtype in DTYPES:
        x = random(4, 384, seed=1).to(dtype)
        alone = torch.cat([table.multiply(row[None]) for row in x])
        for count in (2, 3, 4):
            assert torch.equal(table.multiply(x[:count]), alone[:count])


@pytest.mark.usefixtures("path")
def test_threads_do_not_change_a_bit(quantizer):
    table = MatrixTable([stored_matrix(quantizer(random(515, 1024)))])
    x = random(2, 1024, seed=1).bfloat16()
    before = torch.get_num_threads()
    answers = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        answers.append(table.multiply(x))
    torch.set_num_threads(before)
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])


@pytest.mark.usefixtures("path")
def test_several_matrices_in_one_call():
    matrices = [
        quantizer(random(rows, 192, seed=rows))
        for rows, quantizer in zip((64, 33, 1), list(QUANTIZERS.values())[3:6], strict=True)
    ]
    x = random(3, 192, seed=9)
    got = MatrixTable([stored_matrix(q) for q in matrices]).multiply(x)
    assert relative_error(got, torch.cat([x.double() @ values(q).T for q in matrices], 1)) < 1e-6


@pytest.mark.usefixtures("path")
def test_blocks_of_zeros_and_numbers_that_are_none(quantizer):
    w = random(6, 256)
    w[1:3] = 0
    q = quantizer(w)
    table = MatrixTable([stored_matrix(q)])
    for dtype in DTYPES:
        x = random(1, 256, seed=1).to(dtype)
        assert (table.multiply(x)[0, 1:3] == 0).all()
        for poison in (torch.nan, torch.inf):
            x[0, 77] = poison
            expected = x.float() @ values(q).float().T
            assert torch.equal(table.multiply(x).isnan(), expected.isnan())
            assert torch.equal(table.multiply(x).isinf(), expected.isinf())


@pytest.mark.usefixtures("path")
def test_bytes_may_lie_anywhere(quantizer):
    q = quantizer(random(9, 256))
    matrix = stored_matrix(q)
    raw = matrix.data.view(torch.uint8).flatten()
    step = matrix.data.element_size()
    moved = torch.zeros(len(raw) + 64, dtype=torch.uint8)
    moved[step : step + len(raw)] = raw
    shifted = moved[step : step + len(raw)].view(matrix.data.dtype).view(matrix.data.shape)
    elsewhere = StoredMatrix(**{**vars(matrix), "data": shifted})
    x = random(2, 256, seed=1)
    assert torch.equal(MatrixTable([elsewhere]).multiply(x), MatrixTable([matrix]).multiply(x))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("sizes", [(128, 256), (64, 96), (33, 50)], ids=str)
@pytest.mark.usefixtures("path")
def test_experts_answer_as_in_torch(quantizer, activation, sizes):
    hidden, inner = sizes
    bank = [
        (
            quantizer(random(inner, hidden, seed=e)),
            quantizer(random(inner, hidden, seed=e + 9)),
            quantizer(random(hidden, inner, seed=e + 19)),
        )
        for e in range(4)
    ]
    table = ExpertTable([tuple(map(stored_matrix, expert)) for expert in bank], activation)
    ids, weights = torch.tensor([[2, 0], [3, 2], [0, 1]]), random(3, 2).sigmoid()
    for dtype in DTYPES:
        x = (random(3, hidden, seed=1) / hidden**0.5).to(dtype)
        expected = torch.zeros(3, hidden, dtype=torch.float64)
        for token in range(3):
            for slot in range(2):
                gate, up, down = (values(q) for q in bank[ids[token, slot]])
                row = x[token].double()
                answer = down @ (ACTIVATIONS[activation](gate @ row) * (up @ row))
                expected[token] += weights[token, slot] * answer
        tolerance = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}[dtype]  # two products deep
        assert relative_error(table.answer(x, ids, weights), expected) < tolerance


def test_experts_do_not_depend_on_threads_or_company():
    bank = [
        tuple(
            stored_matrix(quantize_4bit(random(*shape, seed=e), "nf4"))
            for shape in ((192, 128), (192, 128), (128, 192))
        )
        for e in range(4)
    ]
    table = ExpertTable(bank, "silu")
    x, ids, weights = random(3, 128).bfloat16(), torch.tensor([[2, 0], [3, 2], [0, 1]]), random(3, 2).sigmoid()
    before = torch.get_num_threads()
    together = table.answer(x, ids, weights)
    torch.set_num_threads(before % 2 + 1)
    alone = torch.cat([table.answer(x[i : i + 1], ids[i : i + 1], weights[i : i + 1]) for i in range(3)])
    torch.set_num_threads(before)
    assert torch.equal(together, alone)


def test_a_linear_layer_follows_its_weight():
    layer = Linear(256, 48).bfloat16().requires_grad_(False)
    x = random(1, 2, 256).bfloat16()
    for _ in range(2):
        expected = F.linear(x.double(), layer.weight.double(), layer.bias.double())
        assert relative_error(layer(x), expected) < 3e-3
        layer.weight.data = random(48, 256, seed=5).bfloat16()
    layer.weight.mul_(0)
    assert torch.equal(layer(x), layer.bias.expand(1, 2, 48))


def test_gradients_and_float32_stay_with_torch(monkeypatch):
    used = []
    multiply = MatrixTable.multiply
    monkeypatch.setattr(MatrixTable, "multiply", lambda self, x: (used.append(len(x)), multiply(self, x))[1])
    few, weight = FewVectors(), random(8, 64).bfloat16()
    x = random(1, 64).bfloat16()
    few.multiply(x.clone().requires_grad_(), weight).sum().backward()
    few.multiply(x.float(), weight.float())
    few.multiply(x.expand(5, 64), weight)
    assert used == []
    few.multiply(x, weight)
    assert used == [1]


def test_compiled_code_calls_the_operation():
    table = MatrixTable([stored_matrix(quantize_4bit(random(8, 64), "nf4"))])
    x = random(1, 64)
    expected = table.multiply(x)
    assert torch.equal(torch.ops.lmx.multiply_vectors(table.words, x, 8), expected)
    torch.library.opcheck(torch.ops.lmx.multiply_vectors.default, (table.words, x, 8))


def test_kinds_are_those_of_the_library():
    assert [kind.value for kind in Kind] == [0, 1, 2, 3, 4]
