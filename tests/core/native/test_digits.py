"""Four-bit products in digits of eight bits (src/digits.h), beside those of other paths."""

import pytest
import torch
from native_cases import PATHS, random, relative_error, values
from support import needs_kernels

from lmx.core.native.compiled import forced_path
from lmx.core.native.vector import MatrixTable, _code_tables
from lmx.quant.codebook import four_bit_map
from lmx.quant.four_bit import quantize_4bit
from lmx.quant.native import stored_matrix

pytestmark = needs_kernels


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_digits_stand_for_the_values(quant_type):
    code = four_bit_map(quant_type)
    tables = _code_tables(tuple(code.tolist()))
    coarse, fine = (tables[25:33].view(torch.uint8).double() - 128).split(16)
    unit = tables[33].double()
    assert ((16 * coarse + fine) * unit - code.double()).abs().max() <= unit / 2 * 1.0001
    # The remainder that the coarse digits leave, which products of remainders grow with.
    assert (coarse * 17 * unit - code.double()).abs().max() <= 17 * unit / 2 * 1.0001
    assert max(coarse.abs().max(), fine.abs().max()) <= 127


def heavy_tailed(*shape):
    """Student's t with three degrees of freedom: a few elements are many times the others."""
    return random(*shape) / (random(*shape, 3, seed=5).square().mean(-1)).sqrt()


@pytest.mark.parametrize("sample", [random, heavy_tailed])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("path", PATHS)
def test_a_product_loses_less_than_its_rounding(path, quant_type, sample):
    q = quantize_4bit(random(700, 2048), quant_type)
    x = sample(3, 2048).bfloat16()
    expected = x.double() @ values(q).T
    with forced_path(path) as there:
        if not there:
            pytest.skip(f"this CPU has no {path}")
        got = MatrixTable([stored_matrix(q)]).multiply(x)
    assert relative_error(got, expected) < 1.25 * relative_error(expected.bfloat16(), expected)


@pytest.mark.parametrize("path", PATHS)
def test_weights_of_zero_answer_zero(path):
    """Though their blocks have others beside them, and scales that are not zero."""
    w = random(8, 512)
    w[3], w[5, ::2] = 0, 0
    x = random(2, 512, seed=1).bfloat16()
    x[:, 1::2] = 0
    with forced_path(path) as there:
        if not there:
            pytest.skip(f"this CPU has no {path}")
        for q in (quantize_4bit(w, "nf4", 4096), quantize_4bit(w, "nf4", double_quant=True)):
            answer = MatrixTable([stored_matrix(q)]).multiply(x)
            assert (answer[:, 3] == 0).all()
            assert (answer[:, 5] == 0).all()
            assert (answer[:, 4] != 0).all()
