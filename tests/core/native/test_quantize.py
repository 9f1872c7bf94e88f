"""Quantizing, on every path that this CPU has: the bits of plain torch and of bitsandbytes."""

import pytest
import torch
from bitsandbytes import functional as bnb
from native_cases import random
from native_paths import path as path
from support import needs_kernels

from lmx.core.errors import InputError
from lmx.core.native.quantize import can_quantize
from lmx.quant import error, four_bit, int8
from lmx.quant.codebook import four_bit_map, midpoints
from lmx.quant.error import rmse
from lmx.quant.four_bit import BLOCK_SIZES, quantize_4bit
from lmx.quant.int8 import quantize_int8

pytestmark = needs_kernels

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Whole blocks and parts for threads; odd tails; fewer elements than a block; one element; rows of one.
SHAPES = [(64, 4096), (129, 513), (7, 33), (1, 3), (1, 1), (300, 1)]


def by_torch(monkeypatch, work):
    with monkeypatch.context() as patch:
        for module in (four_bit, int8, error):
            patch.setattr(module, "can_quantize", lambda x: False)
        return work()


def tensors(q):
    if isinstance(q, int8.Int8):
        return q.weight, q.absmax
    nested = (q.nested.absmax, torch.tensor(q.nested.offset)) if q.nested else ()
    return q.packed, q.absmax, *nested


def same(q, other):
    return all(torch.equal(a, b) for a, b in zip(tensors(q), tensors(other), strict=True))


def extremes(dtype):
    """Blocks of 64 (and tails) in which something is as small, as large or as equal as it can be."""
    info, x = torch.finfo(dtype), random(16, 64)
    return [
        x.index_fill(0, torch.arange(3, 9), 0).to(dtype),
        torch.zeros(8, 64, dtype=dtype),
        torch.zeros(1, 65, dtype=dtype),
        torch.full((1, 64), -0.0, dtype=dtype),
        torch.randint(-9, 10, (16, 64)).to(dtype) * info.smallest_normal / 16,
        torch.full((1, 67), info.smallest_normal / 8, dtype=dtype),
        x.to(dtype).sign() * info.max,
        (x * 2.0 ** torch.arange(-12, 4)[:, None]).to(dtype),
        torch.full((16, 64), 0.5, dtype=dtype),
        (x * 1e-7).to(dtype),  # where halves have few bits
        (x * 3e4).to(dtype).nan_to_num_(),  # and where they end
    ]


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_four_bits_are_those_of_torch_and_bitsandbytes(path, monkeypatch, dtype, quant_type, double_quant):
    cases = [(random(*shape).to(dtype) * 0.02, block) for shape in SHAPES for block in BLOCK_SIZES]
    for x, block_size in cases + [(x, 64) for x in extremes(dtype)]:
        q = quantize_4bit(x, quant_type, block_size, double_quant)
        assert same(q, by_torch(monkeypatch, lambda: quantize_4bit(x, quant_type, block_size, double_quant)))  # noqa: B023
        packed, state = bnb.quantize_4bit(
            x, blocksize=block_size, quant_type=quant_type, compress_statistics=double_quant
        )
        assert torch.equal(q.packed, packed)
        assert torch.equal(q.absmax, state.absmax)
        if q.nested is not None:
            assert torch.equal(q.nested.absmax, state.state2.absmax)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_is_that_of_torch_and_bitsandbytes(path, monkeypatch, dtype):
    for x in [*(random(*shape).to(dtype) for shape in SHAPES), *extremes(dtype)]:
        q = quantize_int8(x)
        assert same(q, by_torch(monkeypatch, lambda: quantize_int8(x)))  # noqa: B023
        if x.half().isfinite().all():
            weight, absmax, _ = bnb.int8_vectorwise_quant(x.half())
            assert torch.equal(q.weight, weight)
            assert torch.equal(q.absmax, absmax)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_the_borders_between_codes_lie_where_they_are(path, monkeypatch, quant_type):
    """Each border itself and the floats beside it, times scales that round and that do not, in blocks and in a tail."""
    border = midpoints(quant_type)
    near = [torch.nextafter(border, torch.tensor(to)) for to in (-2.0, 2.0)]
    values = torch.cat([border, *near, four_bit_map(quant_type), torch.tensor([0.0, -0.0])])[:63]
    rows = torch.cat([torch.ones(len(values), 1), values[:, None].expand(-1, 63)], 1)
    for x in (torch.cat([torch.ones(1), values]), rows, rows * 3, rows / 7, rows[:, :63].reshape(1, -1)):
        x = x.contiguous()
        assert same(quantize_4bit(x, quant_type), by_torch(monkeypatch, lambda: quantize_4bit(x, quant_type)))  # noqa: B023


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_number(path, monkeypatch, dtype):
    numbers = torch.arange(65536).to(torch.int16).view(dtype)
    numbers = numbers[numbers.isfinite()]
    x = torch.nn.functional.pad(numbers, (0, -len(numbers) % 64)).view(-1, 64)
    for quantize in (quantize_int8, lambda x: quantize_4bit(x, "nf4"), lambda x: quantize_4bit(x, "fp4")):
        assert same(quantize(x), by_torch(monkeypatch, lambda: quantize(x)))  # noqa: B023


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_no_number_is_refused_wherever_it_stands(path, dtype, bad):
    for place in (0, 33, 64 * 5 + 63, 64 * 10, 64 * 10 + 6):
        x = random(1, 64 * 10 + 7).to(dtype)
        x[0, place] = bad
        for quantize in (quantize_int8, lambda x, name: quantize_4bit(x, "nf4", name=name)):
            with pytest.raises(InputError, match=r"experts\.3\.w1 holds NaN or infinity"):
                quantize(x, name="experts.3.w1")


QUANTIZERS = {
    "nf4": lambda x: quantize_4bit(x, "nf4"),
    "fp4 double": lambda x: quantize_4bit(x, "fp4", 128, double_quant=True),
    "int8": quantize_int8,
}


@pytest.mark.parametrize("quantize", QUANTIZERS.values(), ids=QUANTIZERS)
def test_the_error_is_that_of_torch(path, monkeypatch, quantize):
    for dtype in DTYPES:
        for shape in [(64, 4096), (129, 513), (1, 1), (9, 64)]:
            x = random(*shape, seed=2).to(dtype)
            q = quantize(x)
            assert rmse(q, x) == pytest.approx(by_torch(monkeypatch, lambda: rmse(q, x)), rel=1e-5, abs=1e-9)  # noqa: B023


@pytest.mark.parametrize("quantize", QUANTIZERS.values(), ids=QUANTIZERS)
def test_the_number_of_threads_does_not_show(quantize):
    before, x = torch.get_num_threads(), random(515, 1030)
    try:
        torch.set_num_threads(1)
        alone = quantize(x)
        error = rmse(alone, x)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            # All but the mean of absmax, which torch sums.
            assert torch.equal(tensors(quantize(x))[0], tensors(alone)[0])
            assert rmse(alone, x) == error
    finally:
        torch.set_num_threads(before)


def test_what_the_kernels_read_as_it_lies():
    x = random(100, 64)
    assert can_quantize(x[1:])
    assert not can_quantize(x.T)
    assert not can_quantize(x.double())
    for quantize in (quantize_int8, lambda x: quantize_4bit(x, "nf4")):
        assert same(quantize(x[1:]), quantize(x[1:].clone()))
        assert same(quantize(x.T), quantize(x.T.contiguous()))
        assert same(quantize(x.clone().requires_grad_()), quantize(x))
    odd = torch.frombuffer(bytearray(x.bfloat16().view(torch.uint8).numpy().tobytes()), dtype=torch.bfloat16, offset=2)
    assert same(quantize_4bit(odd, "nf4"), quantize_4bit(odd.clone(), "nf4"))
