"""Four-bit quantization in blocks, NF4 and FP4, bit for bit as bitsandbytes 0.50 does it on the CPU.

A block is `block_size` consecutive elements of the flattened tensor. Its largest magnitude, `absmax`, scales it to
[-1, 1]; each element becomes the number of the nearest of 16 values. Two elements share a byte, the first in the high
nibble. Double quantization stores the absmax values themselves in 8 bits (QLoRA, arXiv 2305.14314, section 3).
"""

from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from lmx.core.errors import InputError
from lmx.core.finite import check_finite
from lmx.core.large_pages import lasting
from lmx.core.native.quantize import can_narrow, can_quantize, encode_four_bit, encode_scales, narrow_scales
from lmx.quant.chunks import for_chunks
from lmx.quant.codebook import (
    FourBitType,
    dynamic_codes,
    dynamic_map,
    four_bit_map,
    midpoints,
    packed_codes,
    pair_values,
    rank_table,
)

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK_SIZE = 256
SOURCE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Elements that a thread works on at a time: whole blocks of every size, so few that the temporaries stay in the cache.
_CHUNK = 1 << 18
# The same on a card, where the launches would take longer than the work.
CARD_CHUNK = 1 << 23
_SMALLEST_ABSMAX = 1e-38


@dataclass(frozen=True, eq=False)
class NestedScales:
    """What turns 8-bit absmax codes back into numbers: `quant_map[code] * absmax[block // 256] + offset`."""

    absmax: Tensor  # float32 [ceil(blocks / 256)]
    quant_map: Tensor  # float32 [256]
    offset: float


@dataclass(frozen=True, eq=False)
class FourBit:
    """A tensor of `shape` in four bits; `dtype` is what it was and what it is dequantized to."""

    packed: Tensor  # uint8 [ceil(elements / 2), 1]
    absmax: Tensor  # float32 [blocks], or bfloat16 of the same value; uint8 codes where `nested` is there
    quant_type: FourBitType
    shape: tuple[int, ...]
    dtype: torch.dtype
    block_size: int
    nested: NestedScales | None = None

    @property
    def quant_map(self) -> Tensor:
        """The values of the 16 codes, float32 [16]."""
        return four_bit_map(self.quant_type)

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.absmax.device

    @property
    def nbytes(self) -> int:
        """Bytes of the weight and its scales, without the constant tables."""
        nested = self.nested.absmax.nbytes if self.nested else 0
        return self.packed.nbytes + self.absmax.nbytes + nested

    def scales(self, first: int = 0, last: int | None = None) -> Tensor:
        """The absmax of the blocks from `first` up to `last`, decoded: float32 [last - first]."""
        absmax = self.absmax[first:last]
        if self.nested is None:
            return absmax.float()
        groups = torch.arange(first, first + len(absmax), device=absmax.device) // NESTED_BLOCK_SIZE
        values = torch.index_select(self.nested.quant_map, 0, absmax.int())
        return values.mul_(self.nested.absmax[groups]).add_(self.nested.offset)

    def to(self, device: torch.device) -> "FourBit":
        """The same on another device, where it is as a file has it; no other dtype ever changes."""
        if device == self.device:
            return self
        nested = self.nested
        if nested is not None:
            nested = replace(nested, absmax=nested.absmax.to(device), quant_map=nested.quant_map.to(device))
        absmax = self.stored_absmax.to(device)
        return replace(self, packed=self.packed.to(device), absmax=absmax, nested=nested)

    @property
    def stored_absmax(self) -> Tensor:
        """As files have it: float32 [blocks], or uint8 codes."""
        return self.absmax if self.nested is not None else self.absmax.float()

    def narrowed(self) -> "FourBit":
        """The same with absmax in bfloat16 where the kernels read that and no bit is lost.

        None is where the source was bfloat16: each absmax is one of its numbers.
        """
        if self.absmax.dtype != torch.float32 or not can_narrow(self.absmax):
            return self
        absmax = narrow_scales(self.absmax)
        return self if absmax is None else replace(self, absmax=absmax)

    def lasting(self) -> "FourBit":
        """The same in memory for what lasts, where narrowed scales are already."""
        absmax = self.absmax if self.absmax.dtype == torch.bfloat16 else lasting(self.absmax)
        return replace(self, packed=lasting(self.packed), absmax=absmax)


def quantize_4bit(
    x: Tensor, quant_type: FourBitType, block_size: int = 64, double_quant: bool = False, name: str = "the tensor"
) -> FourBit:
    """Quantize a float32, float16 or bfloat16 tensor of any shape. Temporaries take a few MB, whatever its size.

    Raises `InputError`, naming the tensor by `name`, where it is empty, of another dtype, or holds NaN or infinity.
    With `double_quant` the mean of absmax is summed by torch in parallel: its last bit can depend on the thread count.
    """
    check_block_size(block_size)
    check_source(x, name)
    flat = x.detach().reshape(-1)
    packed = torch.empty((flat.numel() + 1) // 2, dtype=torch.uint8, device=x.device)
    absmax = torch.empty(-(-flat.numel() // block_size), dtype=torch.float32, device=x.device)
    if can_quantize(flat):
        codes = None if quant_type == "nf4" else packed_codes(quant_type)
        encode_four_bit(flat, block_size, midpoints(quant_type), codes, packed, absmax)
    else:
        _encode(flat, block_size, quant_type, packed, absmax)
    check_finite(absmax, name)
    result = FourBit(packed.unsqueeze(1), absmax, quant_type, tuple(x.shape), x.dtype, block_size)
    return _quantize_absmax(result) if double_quant else result


def dequantize_4bit(q: FourBit, dtype: torch.dtype | None = None) -> Tensor:
    """The values as a tensor of `q.shape`, in `dtype` or in the dtype that the source had."""
    elements = prod(q.shape)
    out = torch.empty(elements, dtype=dtype or q.dtype, device=q.packed.device)

    def dequantize_chunk(start: int, stop: int) -> None:
        out[start:stop] = dequantize_range(q, start, stop)

    for_chunks(elements, _CHUNK, dequantize_chunk)
    return out.view(q.shape)


def dequantize_range(q: FourBit, start: int, stop: int) -> Tensor:
    """The elements from `start` (where a block begins) up to `stop` of the flattened tensor, float32 [stop - start]."""
    pairs = pair_values(q.quant_type).to(q.packed.device).view(torch.int64)  # two float32 move as one word
    codes = q.packed.view(-1)[start // 2 : (stop + 1) // 2]
    values = torch.index_select(pairs.view(-1), 0, codes.int()).view(torch.float32)[: stop - start]
    scales = q.scales(start // q.block_size, -(-stop // q.block_size))
    whole = len(values) // q.block_size
    values[: whole * q.block_size].view(-1, q.block_size).mul_(scales[:whole, None])
    values[whole * q.block_size :].mul_(scales[whole:])
    return values


def check_block_size(block_size: int) -> None:
    """Raise `InputError` for a block size that the format does not know."""
    if block_size not in BLOCK_SIZES:
        raise InputError(f"a block size of {block_size} is not supported", f"use one of {BLOCK_SIZES}")


def check_source(x: Tensor, name: str) -> None:
    """Raise `InputError` for a tensor that cannot be quantized whatever it holds."""
    if x.dtype not in SOURCE_DTYPES:
        raise InputError(f"{name} is of {x.dtype}, which cannot be quantized", "quantize the 16 or 32 bit original")
    if not x.numel():
        raise InputError(f"{name} is empty", "check the checkpoint it comes from")


def _encode(flat: Tensor, block_size: int, quant_type: FourBitType, packed: Tensor, absmax: Tensor) -> None:
    """Fill `packed` and `absmax` in plain torch: what the kernels do, and what they are held to."""
    whole = flat.numel() // block_size * block_size

    def encode_chunk(start: int, stop: int) -> None:
        blocks = flat[start:stop].to(torch.float32).view(-1, block_size)
        scaled = _scale_blocks(blocks, absmax[start // block_size : stop // block_size])
        packed[start // 2 : stop // 2] = _pack(scaled.view(-1), quant_type)

    for_chunks(whole, _CHUNK if flat.is_cpu else CARD_CHUNK, encode_chunk)
    if whole < flat.numel():
        packed[whole // 2 :] = _pack(_scale_tail(flat[whole:].to(torch.float32), absmax), quant_type)


def _scale_blocks(blocks: Tensor, absmax: Tensor) -> Tensor:
    """Fill `absmax` [blocks] and return `blocks` [blocks, block_size] divided by it, through the reciprocal."""
    magnitude = blocks.abs()
    torch.amax(magnitude, 1, out=absmax)
    inverse = 1.0 / absmax.clamp(min=_SMALLEST_ABSMAX)
    return torch.mul(blocks, inverse[:, None], out=magnitude)


def _scale_tail(tail: Tensor, absmax: Tensor) -> Tensor:
    """The same for the last block, if it is not whole, which bitsandbytes really divides and never lets be zero."""
    absmax[-1] = tail.abs().max().clamp(min=_SMALLEST_ABSMAX)
    scaled = tail / absmax[-1]
    return torch.nn.functional.pad(scaled, (0, len(tail) % 2))


def _pack(scaled: Tensor, quant_type: FourBitType) -> Tensor:
    """Values in [-1, 1] (an even number of them) to bytes of two codes, the first in the high nibble: uint8 [n / 2]."""
    pairs = rank_table(quant_type, scaled.device)(scaled).view(torch.int16)  # the first of two is the low byte
    packed = (pairs << 4).bitwise_or_(pairs >> 8).to(torch.uint8)
    if quant_type == "nf4":
        return packed
    return torch.index_select(packed_codes(quant_type).to(packed.device), 0, packed.int())


def _quantize_absmax(q: FourBit) -> FourBit:
    """Replace absmax by 8-bit codes of its distance from its mean, in blocks of 256."""
    offset = q.absmax.mean()
    codes, absmax = _quantize_dynamic(q.absmax - offset)
    return replace(q, absmax=codes, nested=NestedScales(absmax, dynamic_map().to(q.device), offset.item()))


def _quantize_dynamic(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes uint8 [n] of the 8-bit dynamic type for float32 `x` [n], and the absmax of each 256, float32.

    bitsandbytes first rounds the scaled value to one of 65536 steps between -1 and 1 and takes the code nearest to
    that; a block of zeros gets code 0.
    """
    if can_quantize(x):
        codes = torch.empty(len(x), dtype=torch.uint8)
        absmax = torch.empty(-(-len(x) // NESTED_BLOCK_SIZE), dtype=torch.float32)
        encode_scales(x, dynamic_codes(), codes, absmax)
        return codes, absmax
    return _encode_dynamic(x)


def _encode_dynamic(x: Tensor) -> tuple[Tensor, Tensor]:
    """The same in plain torch."""
    blocks = torch.nn.functional.pad(x, (0, -len(x) % NESTED_BLOCK_SIZE)).view(-1, NESTED_BLOCK_SIZE)
    codes = torch.empty(blocks.shape, dtype=torch.uint8, device=x.device)
    absmax = torch.empty(len(blocks), dtype=torch.float32, device=x.device)
    nearest_codes = dynamic_codes().to(x.device)

    def quantize_chunk(start: int, stop: int) -> None:
        largest = torch.amax(blocks[start:stop].abs(), 1, out=absmax[start:stop])
        inverse = torch.where(largest > 0, 1.0 / largest, 0.0)
        scaled = (blocks[start:stop] * inverse[:, None]).clamp_(-1, 1)
        # Where the reciprocal of a denormal overflows, zero times infinity is no number: step 0, there as here.
        steps = ((scaled + 1.0) * 0.5 * 65535 + 0.5).nan_to_num_(0.0).to(torch.int32)
        nearest = torch.index_select(nearest_codes, 0, steps.view(-1)).view(steps.shape)
        codes[start:stop] = nearest * (largest > 0)[:, None]

    for_chunks(len(blocks), _CHUNK // NESTED_BLOCK_SIZE, quantize_chunk)
    return codes.view(-1)[: len(x)], absmax
