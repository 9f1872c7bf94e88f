import pytest
import torch
from bitsandbytes import functional as bnb
from bitsandbytes.nn import Int8Params

from lmx.core.errors import InputError
from lmx.quant import int8
from lmx.quant.int8 import dequantize_int8, quantize_int8

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def weights(shape, dtype, scale=0.02):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * scale).to(dtype)


@pytest.fixture(autouse=True)
def plain_torch(monkeypatch):
    """What the kernels are held to (tests/core/native/test_quantize.py)."""
    monkeypatch.setattr(int8, "can_quantize", lambda x: False)


def assert_same_as_bitsandbytes(x):
    reference = Int8Params(x.clone(), requires_grad=False, has_fp16_weights=False).to("cpu")
    q = quantize_int8(x)
    assert torch.equal(q.weight, reference.data)
    assert torch.equal(q.absmax, reference.SCB)
    assert torch.equal(dequantize_int8(q, torch.float32), bnb.int8_vectorwise_dequant(reference.data, reference.SCB))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_and_values_are_those_of_bitsandbytes(dtype):
    for shape in [(300, 2048), (65, 33), (1, 1), (1, 5000), (7, 1)]:
        assert_same_as_bitsandbytes(weights(shape, dtype))
    assert_same_as_bitsandbytes(weights((4, 64), dtype, scale=1e-6))
    assert_same_as_bitsandbytes(weights((4, 64), dtype, scale=3e3))
    assert_same_as_bitsandbytes(weights((8, 64), dtype).index_fill_(0, torch.tensor([2, 5]), 0))


def test_float16_source_is_the_plain_function_of_bitsandbytes():
    x = weights((100, 100), torch.float16)
    weight, absmax, _ = bnb.int8_vectorwise_quant(x.clone())
    q = quantize_int8(x)
    assert torch.equal(q.weight, weight)
    assert torch.equal(q.absmax, absmax)


def test_values_beyond_float16_keep_their_size():
    x = weights((4, 64), torch.float32)
    x[1] *= 1e8
    q = quantize_int8(x)
    assert (dequantize_int8(q) - x)[1].abs().max() <= x[1].abs().max() / 127 * 0.51
    assert torch.equal(q.weight[[0, 2, 3]], quantize_int8(x[[0, 2, 3]]).weight)


def test_the_error_is_at_most_half_a_step():
    x = weights((50, 300), torch.float16)
    q = quantize_int8(x)
    error = (dequantize_int8(q, torch.float32) - x.float()).abs()
    assert (error <= q.absmax[:, None] / 127 * 0.501).all()
    assert error.max() > 0


def test_the_size_of_the_chunks_of_work_does_not_show(monkeypatch):
    x = weights((173, 515), torch.bfloat16)
    whole = quantize_int8(x)
    for chunk in (1, 1000, 1 << 20):
        monkeypatch.setattr(int8, "_CHUNK", chunk)
        again = quantize_int8(x)
        assert torch.equal(again.weight, whole.weight)
        assert torch.equal(again.absmax, whole.absmax)
        assert torch.equal(dequantize_int8(again), dequantize_int8(whole))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_source_that_is_not_finite_is_named(dtype, bad):
    x = weights((9, 40), dtype)
    x[7, 3] = bad
    with pytest.raises(InputError, match=r"experts\.3\.w1\.weight holds NaN or infinity"):
        quantize_int8(x, name="experts.3.w1.weight")


def test_what_cannot_be_quantized_is_refused():
    with pytest.raises(InputError, match="3 dimensions"):
        quantize_int8(torch.zeros(2, 2, 2))
    with pytest.raises(InputError, match="int64"):
        quantize_int8(torch.zeros(2, 2, dtype=torch.int64))
