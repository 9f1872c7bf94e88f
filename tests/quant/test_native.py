"""The choice of the CPU's kernels for quantized matrices."""

import copy

import pytest
import torch
from support import needs_kernels

from lmx.core.native.vector import ExpertTable, MatrixTable
from lmx.quant.four_bit import quantize_4bit
from lmx.quant.int8 import quantize_int8
from lmx.quant.matmul import choose_product, tiled_product
from lmx.quant.modules import QuantExpertBank, QuantLinear
from lmx.quant.native import expert_table, matrix_table
from lmx.quant.quanto import quantize_quanto

pytestmark = needs_kernels


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def used(monkeypatch):
    """The calls of the kernels: how many vectors each."""
    calls = []
    multiply, answer = MatrixTable.multiply, ExpertTable.answer
    monkeypatch.setattr(
        MatrixTable, "multiply", lambda self, x: (calls.append(x.numel() // self.columns), multiply(self, x))[1]
    )
    monkeypatch.setattr(ExpertTable, "answer", lambda self, x, *of: (calls.append(len(x)), answer(self, x, *of))[1])
    return calls


@pytest.mark.parametrize("quantize", [lambda w: quantize_4bit(w, "nf4"), quantize_int8], ids=["nf4", "int8"])
def test_few_vectors_take_the_kernels_and_many_do_not(used, quantize):
    q = quantize(random(48, 96))
    product = choose_product(q)
    for lead in [(), (1,), (2, 2), (1, 1, 3), (8,), (9,), (0,)]:
        x = random(*lead, 96, seed=1)
        got = product(x)
        assert got.shape == (*lead, 48)
        torch.testing.assert_close(got, tiled_product(q, x), rtol=1e-5, atol=1e-4)
    assert used == [1, 1, 4, 3, 8]


def test_gradients_unusual_dtypes_and_wrong_shapes_stay_with_torch(used):
    q = quantize_4bit(random(48, 96), "nf4")
    product = choose_product(q)
    assert product(random(1, 96).requires_grad_()).requires_grad
    assert product(random(1, 96).double()).dtype == torch.float64
    for columns in (48, 95, 192):  # two vectors of half the length are no vector
        with pytest.raises(RuntimeError):
            product(random(2, columns))
    assert used == []


def test_matrices_that_the_kernels_cannot_read():
    q = quantize_4bit(random(48, 96), "nf4")
    assert matrix_table(q) is not None
    assert matrix_table(q.to(torch.device("meta"))) is None
    assert matrix_table(quantize_quanto(random(64, 128), "qint8")) is None
    assert matrix_table(random(6, 8).double()) is None
    assert matrix_table(random(8, 6).T) is None
    assert expert_table([q], [q], [random(8, 6).T], "silu") is None


def test_banks_take_the_kernels_for_few_tokens(used):
    def matrices(rows, columns, seed):
        return [quantize_4bit(random(rows, columns, seed=seed + e), "nf4") for e in range(3)]

    bank = QuantExpertBank(matrices(64, 96, 0), matrices(64, 96, 3), matrices(96, 64, 6), "silu")
    x, ids, weights = random(9, 96, seed=9), torch.tensor([[2, 0]] * 9), torch.full((9, 2), 0.5)
    together = bank(x, ids, weights)
    assert used == []
    torch.testing.assert_close(bank(x[:4], ids[:4], weights[:4]), together[:4], rtol=1e-5, atol=1e-3)
    assert used == [4]
    with pytest.raises(RuntimeError):
        bank(x[:1, :48], ids[:1], weights[:1])
    assert used == [4]
    bank(x[:1].clone().requires_grad_(), ids[:1], weights[:1]).sum().backward()
    weights.requires_grad_()
    bank(x[:1], ids[:1], weights[:1]).sum().backward()
    assert weights.grad is not None


def test_a_copy_of_a_layer_has_a_weight_of_its_own():
    layer, x = QuantLinear(quantize_int8(random(48, 96))), random(1, 96, seed=1)
    before = layer(x)
    twin = copy.deepcopy(layer)
    layer.weight.weight.zero_()
    assert not layer(x).any()
    assert torch.equal(twin(x), before)
