"""GGML's types of tensors: how many bytes a block takes, what numbers it holds, and two of them the other way round.

A row of a quantized tensor is cut into blocks of 32 numbers, or of 256 ("K"), each stored with its own scale. The
results equal llama.cpp's and the `gguf` package's bit for bit (tests/convert/test_gguf_types.py). Layouts:
https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h. Arithmetic is float32, in tiles, so that
the memory beside the result stays small.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lmx.convert.gguf_layout import BlockLayout
from lmx.core.mapped import empty_alone

_TILE_ELEMENTS = 1 << 16  # its temporaries stay in the cache, and leave no gaps in the heap that other things fill

_Blocks = Callable[[Tensor], Tensor]


def dequantize(layout: BlockLayout, data: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers of whole blocks: data: [bytes] uint8 -> [elements], computed in float32, in `dtype`."""
    decode = _DECODERS[layout.name]
    blocks = data.view(-1, layout.block_bytes)
    out = empty_alone(len(blocks) * layout.elements, dtype).view(-1, layout.elements)
    step = max(1, _TILE_ELEMENTS // layout.elements)
    for first in range(0, len(blocks), step):
        out[first : first + step] = decode(blocks[first : first + step])
    return out.view(-1)


def quantize(layout: BlockLayout, x: Tensor) -> Tensor:
    """The bytes of a tensor whose last dimension is whole blocks: x: [..., columns] -> [bytes] uint8."""
    encode = _ENCODERS[layout.name]
    blocks = x.reshape(-1, layout.elements)
    out = torch.empty(len(blocks), layout.block_bytes, dtype=torch.uint8)
    step = max(1, _TILE_ELEMENTS // layout.elements)
    for first in range(0, len(blocks), step):
        out[first : first + step] = encode(blocks[first : first + step].float())
    return out.view(-1)


def largest_error(layout: BlockLayout, x: Tensor) -> Tensor:
    """How far a written block may be from its numbers, [blocks, 1], for float32 blocks [blocks, elements].

    Half a step of 254 for Q8_0; a whole one of 16 for Q4_0, whose range ends one step short on one side; and the
    rounding of the scale to half precision, relative to it or, where it is tiny, absolute.
    """
    codes, steps = {"Q8_0": (127, 0.5), "Q4_0": (8, 1.0)}[layout.name]
    return x.abs().amax(-1, keepdim=True) * (steps / codes + 2.0**-10) + codes * 2.0**-25


def _half(data: Tensor, start: int = 0) -> Tensor:
    """The half-precision number at a byte of each block: [blocks, bytes] -> [blocks, 1] float32."""
    return data[:, start : start + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    """[..., bytes] -> [..., 2 * bytes]: all low halves, then all high ones."""
    return torch.cat([packed & 15, packed >> 4], -1)


def _bits(data: Tensor) -> Tensor:
    """[blocks, 4 bytes] -> [blocks, 32]: each bit, the lowest first."""
    return (data[..., None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten(1)


def _q4_0(data: Tensor) -> Tensor:
    return _half(data) * (_nibbles(data[:, 2:]).float() - 8)


def _q4_1(data: Tensor) -> Tensor:
    return _half(data) * _nibbles(data[:, 4:]).float() + _half(data, 2)


def _q5_0(data: Tensor) -> Tensor:
    return _half(data) * ((_nibbles(data[:, 6:]) | _bits(data[:, 2:6]) << 4).float() - 16)


def _q5_1(data: Tensor) -> Tensor:
    return _half(data) * (_nibbles(data[:, 8:]) | _bits(data[:, 4:8]) << 4).float() + _half(data, 2)


def _q8_0(data: Tensor) -> Tensor:
    return _half(data) * data[:, 2:].view(torch.int8).float()


_IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _iq4_nl(data: Tensor) -> Tensor:
    return _half(data) * torch.tensor(_IQ4_NL, dtype=torch.float32)[_nibbles(data[:, 2:]).long()]


def _scales_and_minima(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Eight scales and eight minima of 6 bits each from 12 bytes: [blocks, 12] -> [blocks, 8, 1] twice.

    Bytes 0-3 and 4-7 hold the first four of each and, in their two top bits, the top bits of the last four; bytes
    8-11 hold the four lower bits of those, the scale's below the minimum's.
    """
    low, high, rest = packed.view(-1, 3, 4).unbind(1)
    scales = torch.cat([low & 63, rest & 15 | low >> 6 << 4], -1)
    minima = torch.cat([high & 63, rest >> 4 | high >> 6 << 4], -1)
    return scales[..., None].float(), minima[..., None].float()


def _q4_k(data: Tensor) -> Tensor:
    scales, minima = _scales_and_minima(data[:, 4:16])
    codes = _nibbles(data[:, 16:].view(-1, 4, 32)).view(-1, 8, 32)
    return (_half(data)[..., None] * scales * codes - _half(data, 2)[..., None] * minima).flatten(1)


def _q5_k(data: Tensor) -> Tensor:
    scales, minima = _scales_and_minima(data[:, 4:16])
    low = _nibbles(data[:, 48:].view(-1, 4, 32)).view(-1, 8, 32)
    top = data[:, None, 16:48] >> torch.arange(8, dtype=torch.uint8)[:, None] & 1  # [blocks, 8, 32]
    codes = low | top << 4
    return (_half(data)[..., None] * scales * codes - _half(data, 2)[..., None] * minima).flatten(1)


def _q6_k(data: Tensor) -> Tensor:
    low = _nibbles(data[:, :128].view(-1, 2, 64)).view(-1, 2, 4, 32)
    top = data[:, 128:192].view(-1, 2, 1, 32) >> torch.arange(0, 8, 2, dtype=torch.uint8)[:, None] & 3
    codes = (low | top << 4).view(-1, 16, 16).float() - 32
    scales = data[:, 192:208].view(torch.int8)[..., None].float()
    return (_half(data, 208)[..., None] * scales * codes).flatten(1)


_DECODERS: dict[str, _Blocks] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
}


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, scale, 1 / scale)


def _to_q8_0(x: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 127
    scaled = x * _inverse(scale)
    codes = (scaled.abs() + 0.5).floor() * scaled.sign()  # C's roundf: halves away from zero
    return _pack(scale, codes.to(torch.int8).view(torch.uint8))


def _to_q4_0(x: Tensor) -> Tensor:
    """The number farthest from zero becomes -8, whatever its sign."""
    scale = x.gather(-1, x.abs().argmax(-1, keepdim=True)) / -8
    codes = (x * _inverse(scale) + 8.5).clamp(0, 15).to(torch.uint8)
    return _pack(scale, codes[:, :16] | codes[:, 16:] << 4)


def _pack(scale: Tensor, codes: Tensor) -> Tensor:
    return torch.cat([scale.half().view(torch.uint8), codes], -1)


_ENCODERS: dict[str, _Blocks] = {"Q8_0": _to_q8_0, "Q4_0": _to_q4_0}
