"""A few vectors times stored matrices, on every path that this CPU has, against float64 products in torch."""

import copy
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from native_cases import PATHS, QUANTIZERS, narrowed, random, relative_error, values
from support import needs_kernels

from lmx.core.layers.activation import ACTIVATIONS
from lmx.core.native.compiled import forced_path
from lmx.core.native.vector import ExpertTable, Kind, MatrixTable, StoredMatrix
from lmx.quant.four_bit import quantize_4bit
from lmx.quant.int8 import quantize_int8
from lmx.quant.native import stored_matrix

pytestmark = needs_kernels

TESTS = Path(__file__).parents[2]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rounding of the answer, and in bf16 that of the table of values.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 3e-3, torch.float16: 5e-4}
# Whole blocks; an odd number of them; rows that share blocks; odd rows and columns; a single element; groups of 16
# units and a part of one; rows side by side in four groups of 256 blocks; rows that are longer than such a group.
SHAPES = [(130, 256), (37, 192), (5, 100), (7, 33), (1, 1), (3, 4096), (9, 1280), (13, 6144), (6, 16512)]


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


@pytest.mark.skipif(sys.platform != "linux", reason="memory is made unreadable by Linux's mprotect")
@pytest.mark.parametrize(("beyond", "end"), [([], 0), (["over"], -signal.SIGSEGV)], ids=["as it is", "a row too many"])
def test_nothing_is_read_behind_a_matrix(beyond, end):
    """The second run shows that the first would find it."""
    command = [sys.executable, "guarded_matrices.py", *beyond]
    assert subprocess.run(command, cwd=TESTS, timeout=240).returncode == end


def test_rows_belong_to_whoever_takes_them(quantizer):
    """Of many threads on few cores most have nothing to do but take rows from others; the most of all do not."""
    matrices = [quantizer(random(rows, 512, seed=rows)) for rows in (4501, 77)]
    table = MatrixTable([stored_matrix(matrix) for matrix in matrices])
    # Others each time: memory that comes again must not hold the right answers already.
    vectors = [random(2, 512, seed=seed).bfloat16() for seed in range(10)]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = [table.multiply(x) for x in vectors]
    for threads in (2, 3, 7, 70):
        torch.set_num_threads(threads)
        assert all(torch.equal(table.multiply(x), answer) for x, answer in zip(vectors, alone, strict=True))
    torch.set_num_threads(before)


@pytest.mark.usefixtures("path")
def test_vectors_do_not_know_of_each_other(quantizer):
    table = MatrixTable([stored_matrix(quantizer(random(70, 384)))])
    for dtype in DTYPES:
        x = random(9, 384, seed=1).to(dtype)
        alone = torch.cat([table.multiply(row[None]) for row in x])
        for count in (2, 3, 4, 5, 9):
            assert torch.equal(table.multiply(x[:count]), alone[:count])


@pytest.mark.parametrize("block_size", [32, 64, 128, 4096])
@pytest.mark.usefixtures("path")
def test_narrow_scales_give_the_same_bits(block_size):
    wide = quantize_4bit(random(21, 1280).bfloat16(), "nf4", block_size)
    narrow = narrowed(random(21, 1280), block_size)
    for dtype in DTYPES:
        for vectors in (1, 3, 40):
            x = random(vectors, 1280, seed=1).to(dtype)
            got = MatrixTable([stored_matrix(narrow)]).multiply(x)
            assert torch.equal(got, MatrixTable([stored_matrix(wide)]).multiply(x))


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
    w = random(24, 256)
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
def test_several_infinities_and_zeros_beside_them(quantizer):
    w = random(24, 256)
    w[4, :130] = 0
    q = quantizer(w)
    x = random(2, 256, seed=1).bfloat16()
    x[0, 70], x[0, 71], x[0, 200] = torch.inf, -torch.inf, torch.inf
    x[1, 5] = -torch.inf
    expected = x.float() @ values(q).float().T
    got = MatrixTable([stored_matrix(q)]).multiply(x).float()
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got[~got.isfinite() & ~got.isnan()], expected[~got.isfinite() & ~got.isnan()])


@pytest.mark.parametrize("size", [1e-30, 1e-4, 1e4, 1e30])
@pytest.mark.usefixtures("path")
def test_vectors_of_any_size_and_with_outliers(quantizer, size):
    """Elements hundreds of times the others, as some channels of a model have them, cost those no accuracy."""
    q = quantizer(random(64, 512))
    x = random(1, 512, seed=1)
    x[0, 100], x[0, 400] = 500, -300
    x = (x * size).bfloat16()
    x[0, 128:256] = 0
    expected = x.double() @ values(q).T
    assert relative_error(MatrixTable([stored_matrix(q)]).multiply(x).double() / size, expected / size) < 3e-3


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


@pytest.mark.usefixtures("path")
def test_experts_may_be_stored_in_different_ways():
    """Matrices that were kept from quantization stand among the others, of one expert too."""
    makers = list(QUANTIZERS.values()) * 2
    bank = [[makers.pop()(random(*shape, seed=e)) for shape in ((64, 128), (64, 128), (128, 64))] for e in range(6)]
    table = ExpertTable([tuple(map(stored_matrix, expert)) for expert in bank], "silu")
    x, ids = random(1, 128, seed=1).bfloat16() / 11, torch.tensor([[4, 0, 5, 2, 1, 3]])
    expected = torch.zeros(128, dtype=torch.float64)
    for expert in bank:
        gate, up, down = map(values, expert)
        expected += down @ (F.silu(gate @ x[0].double()) * (up @ x[0].double()))
    assert relative_error(table.answer(x, ids, torch.ones(1, 6, dtype=torch.bfloat16))[0], expected) < 5e-3


def test_the_id_of_no_expert_is_refused():
    table = ExpertTable([(StoredMatrix.kept(torch.eye(64)),) * 3], "silu")
    for wrong in (1, -1, 1 << 40):
        with pytest.raises(IndexError, match="of a bank of 1"):
            table.answer(random(1, 64), torch.tensor([[0, wrong]]), torch.ones(1, 2))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))], ids=["deepcopy", "pickle"])
def test_a_copied_table_reads_the_copied_tensors(copied):
    matrix, x = stored_matrix(quantize_int8(random(64, 64))), random(1, 64, seed=1)
    table, bank = MatrixTable([matrix]), ExpertTable([(matrix, matrix, matrix)], "relu")
    chosen = torch.tensor([[0]]), torch.ones(1, 1)
    product, answer = table.multiply(x), bank.answer(x, *chosen)
    other_table, other_bank = copied(table), copied(bank)
    matrix.data.zero_()
    assert not table.multiply(x).any()
    assert torch.equal(other_table.multiply(x), product)
    assert torch.equal(other_bank.answer(x, *chosen), answer)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("path")
def test_the_extremes_of_a_dtype(dtype):
    """The largest and the smallest numbers go through unchanged, and what overflows becomes infinity."""
    info = torch.finfo(dtype)
    x = torch.tensor([[info.max, info.tiny, -info.tiny / 4, -info.max]], dtype=dtype)
    table = MatrixTable([StoredMatrix.kept(torch.eye(4)), StoredMatrix.kept(4 * torch.eye(4))])
    once, fourfold = table.multiply(x).split(4, dim=1)
    assert torch.equal(once, x)
    assert torch.equal(fourfold.isinf(), torch.tensor([[True, False, False, True]]))


def test_compiled_code_calls_the_operation():
    table = MatrixTable([stored_matrix(quantize_4bit(random(8, 64), "nf4"))])
    x = random(1, 64)
    expected = table.multiply(x)
    assert torch.equal(torch.ops.lmx.multiply_vectors(table.words, x, 8), expected)
    torch.library.opcheck(torch.ops.lmx.multiply_vectors.default, (table.words, x, 8))


def test_kinds_are_those_of_the_library():
    assert [kind.value for kind in Kind] == [0, 1, 2, 3, 4]
