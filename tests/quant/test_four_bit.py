import pytest
import torch
from bitsandbytes import functional as bnb
from support import needs_kernels

from lmx.core.errors import InputError
from lmx.quant import four_bit
from lmx.quant.four_bit import BLOCK_SIZES, dequantize_4bit, dequantize_range, quantize_4bit

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Whole blocks, several chunks of work, odd tails, fewer elements than a block, one element.
SHAPES = [(64, 4096), (7, 33), (129, 513), (3,), (1, 1), (100, 64)]


@pytest.fixture(autouse=True)
def plain_torch(monkeypatch):
    """What the kernels are held to (tests/core/native/test_quantize.py)."""
    monkeypatch.setattr(four_bit, "can_quantize", lambda x: False)


def assert_same_as_bitsandbytes(x, quant_type, block_size, double_quant):
    packed, state = bnb.quantize_4bit(x, blocksize=block_size, quant_type=quant_type, compress_statistics=double_quant)
    q = quantize_4bit(x, quant_type, block_size, double_quant)
    assert torch.equal(q.packed, packed)
    assert torch.equal(q.absmax, state.absmax)
    assert torch.equal(q.quant_map, state.code)
    assert (q.shape, q.dtype, q.block_size) == (tuple(state.shape), state.dtype, state.blocksize)
    if double_quant:
        assert torch.equal(q.nested.absmax, state.state2.absmax)
        assert torch.equal(q.nested.quant_map, state.state2.code)
        assert q.nested.offset == state.offset.item()


def weights(shape, dtype, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02
    return x.to(dtype)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_are_those_of_bitsandbytes(dtype, quant_type, block_size, double_quant):
    for shape in SHAPES:
        assert_same_as_bitsandbytes(weights(shape, dtype), quant_type, block_size, double_quant)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_values_are_those_of_bitsandbytes(dtype, quant_type, double_quant):
    info = torch.finfo(dtype)
    cases = {
        "zero blocks": weights((40, 64), dtype).index_fill_(0, torch.arange(3, 20), 0),
        "all zero": torch.zeros(8, 64, dtype=dtype),
        "all zero with a tail": torch.zeros(65, dtype=dtype),
        "negative zero": torch.full((64,), -0.0, dtype=dtype),
        "denormal": torch.randint(-9, 10, (16, 64)).to(dtype) * info.smallest_normal / 16,
        "denormal tail": torch.full((67,), info.smallest_normal / 8, dtype=dtype),
        "huge": (weights((16, 64), dtype).sign() * info.max),
        "wide": weights((16, 64), dtype) * (2.0 ** torch.arange(-12, 4)[:, None]).to(dtype),
        "equal blocks": torch.full((16, 64), 0.5, dtype=dtype),
    }
    for x in cases.values():
        assert_same_as_bitsandbytes(x, quant_type, 64, double_quant)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_number_against_every_scale(dtype):
    """All numbers of a 16-bit type, each in a block with a maximum that is some power of two and a bit above it."""
    numbers = torch.arange(65536).to(torch.int16).view(dtype)
    numbers = numbers[numbers.isfinite()]
    x = torch.nn.functional.pad(numbers, (0, -len(numbers) % 63)).view(-1, 63)
    largest = x.float().abs().amax(1, keepdim=True) * torch.linspace(1, 1.9, len(x))[:, None]
    x = torch.cat([x, largest.clamp(max=torch.finfo(dtype).max).to(dtype)], dim=1)
    for quant_type in ("nf4", "fp4"):
        assert_same_as_bitsandbytes(x.contiguous(), quant_type, 64, False)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_are_those_of_bitsandbytes(dtype, quant_type, double_quant):
    # bitsandbytes' native path is right where rows are whole blocks, and runs for blocks below 2048.
    for block_size, shape in [(32, (70, 96)), (64, (300, 1024)), (1024, (8, 2048))]:
        x = weights(shape, dtype)
        packed, state = bnb.quantize_4bit(
            x, blocksize=block_size, quant_type=quant_type, compress_statistics=double_quant
        )
        q = quantize_4bit(x, quant_type, block_size, double_quant)
        assert torch.equal(dequantize_4bit(q), bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_follow_the_definition_for_every_shape(shape, block_size):
    q = quantize_4bit(weights(shape, torch.bfloat16), "nf4", block_size)
    codes = torch.stack([q.packed.view(-1) >> 4, q.packed.view(-1) & 15], dim=1).flatten()
    elements = torch.Size(shape).numel()
    scales = q.absmax.repeat_interleave(block_size)[:elements]
    expected = (q.quant_map[codes[:elements].int()] * scales).to(torch.bfloat16).view(shape)
    assert torch.equal(dequantize_4bit(q), expected)
    assert dequantize_4bit(q, torch.float32).dtype == torch.float32


def test_the_size_of_the_chunks_of_work_does_not_show(monkeypatch):
    x = weights((173, 515), torch.float16)
    whole = quantize_4bit(x, "nf4", 128, double_quant=True)
    values = dequantize_4bit(whole)
    for chunk in (4096, 8192, 1 << 20):
        monkeypatch.setattr(four_bit, "_CHUNK", chunk)
        again = quantize_4bit(x, "nf4", 128, double_quant=True)
        assert torch.equal(again.packed, whole.packed)
        assert torch.equal(again.absmax, whole.absmax)
        assert torch.equal(dequantize_4bit(again), values)


def test_a_range_is_the_same_as_the_part_of_the_whole():
    q = quantize_4bit(weights((50, 100), torch.float32), "fp4", 32, double_quant=True)
    values = dequantize_4bit(q).flatten()
    for start, stop in [(0, 1), (32, 65), (64, 5000), (4992, 5000), (1024, 4096)]:
        assert torch.equal(dequantize_range(q, start, stop), values[start:stop])


def test_a_transposed_source_is_read_in_its_own_order():
    x = weights((96, 130), torch.bfloat16)
    assert torch.equal(quantize_4bit(x.T, "nf4").packed, quantize_4bit(x.T.contiguous(), "nf4").packed)


@pytest.mark.parametrize(
    ("quant_type", "block_size", "expected"),
    [("nf4", 32, 0.067746), ("nf4", 64, 0.072798), ("nf4", 4096, 0.092547), ("fp4", 64, 0.096543)],
)
def test_the_error_on_normal_weights_is_that_of_the_format(quant_type, block_size, expected):
    """Mean absolute error on a standard normal tensor: the figures of bitsandbytes' own tests, from its GPU kernels."""
    x = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(1))
    error = (dequantize_4bit(quantize_4bit(x, quant_type, block_size)) - x).abs().mean().item()
    assert error == pytest.approx(expected, rel=0.01)


@needs_kernels
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_scales_of_a_bfloat16_source_lose_no_bit_in_bfloat16(quant_type, block_size):
    q = quantize_4bit(weights((173, 515), torch.bfloat16), quant_type, block_size)
    narrow = q.narrowed()
    assert narrow.absmax.dtype == torch.bfloat16
    assert narrow.nbytes == q.nbytes - q.absmax.nbytes // 2
    assert narrow.narrowed() is narrow
    assert narrow.to(torch.device("cpu")) is narrow
    assert narrow.scales().dtype == narrow.stored_absmax.dtype == torch.float32
    assert torch.equal(narrow.scales(), q.absmax)
    assert torch.equal(narrow.stored_absmax, q.absmax)
    assert torch.equal(dequantize_4bit(narrow), dequantize_4bit(q))
    assert narrow.to(torch.device("meta")).absmax.dtype == torch.float32


def test_scales_that_bfloat16_would_change_stay_as_they_are():
    q = quantize_4bit(weights((64, 128), torch.float16), "nf4")
    assert q.narrowed() is q
    doubled = quantize_4bit(weights((64, 128), torch.bfloat16), "nf4", double_quant=True)
    assert doubled.narrowed() is doubled
    zeros = quantize_4bit(torch.zeros(64, 128, dtype=torch.bfloat16), "nf4")
    assert torch.equal(zeros.narrowed().scales(), zeros.absmax)


def test_values_of_the_table_survive_and_requantizing_changes_nothing():
    q = quantize_4bit(weights((64, 128), torch.float32), "nf4")
    again = quantize_4bit(dequantize_4bit(q), "nf4")
    assert torch.equal(again.packed, q.packed)
    assert torch.equal(again.absmax, q.absmax)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 64 * 5 + 3, 64 * 10 + 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_source_that_is_not_finite_is_named(dtype, place, bad):
    x = weights((64 * 10 + 7,), dtype)
    x[place] = bad
    with pytest.raises(InputError, match=r"experts\.3\.w1\.weight holds NaN or infinity"):
        quantize_4bit(x, "nf4", name="experts.3.w1.weight")


def test_what_cannot_be_quantized_is_refused():
    with pytest.raises(InputError, match="block size of 48"):
        quantize_4bit(torch.zeros(64), "nf4", 48)
    with pytest.raises(InputError, match="int8"):
        quantize_4bit(torch.zeros(64, dtype=torch.int8), "nf4")
    with pytest.raises(InputError, match="empty"):
        quantize_4bit(torch.zeros(0, 4), "nf4")
