"""Row-wise 8-bit quantization by the largest magnitude, bit for bit as bitsandbytes 0.50 stores a linear layer.

Each row of a weight is scaled so that its largest magnitude is 127 (LLM.int8(), arXiv 2208.07339, section 2.1).
bitsandbytes rounds the weight to float16 before that, whatever it was; so do we.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lmx.core.errors import InputError
from lmx.core.finite import check_finite, is_finite
from lmx.core.large_pages import lasting
from lmx.core.native.quantize import can_quantize, encode_int8
from lmx.quant.chunks import for_chunks
from lmx.quant.four_bit import CARD_CHUNK, check_source

# Elements that a thread works on at a time, so that the temporaries stay in the cache.
_CHUNK = 1 << 18
# 1 / 127 in float32, as bitsandbytes writes it.
_INVERSE_127 = 7.874015718698502e-3


@dataclass(frozen=True, eq=False)
class Int8:
    """A matrix in 8 bits: `weight * absmax / 127`, row by row."""

    weight: Tensor  # int8 [rows, columns]
    absmax: Tensor  # float32 [rows]; called SCB in checkpoints
    dtype: torch.dtype  # what it was and what it is dequantized to

    @property
    def shape(self) -> tuple[int, ...]:
        """[rows, columns]."""
        return tuple(self.weight.shape)

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.absmax.device

    @property
    def nbytes(self) -> int:
        """Bytes of the weight and its scales."""
        return self.weight.nbytes + self.absmax.nbytes

    def to(self, device: torch.device) -> "Int8":
        """The same on another device; dtypes are part of the format and never change."""
        return Int8(self.weight.to(device), self.absmax.to(device), self.dtype)

    def lasting(self) -> "Int8":
        """The same in memory for what lasts."""
        return Int8(lasting(self.weight), lasting(self.absmax), self.dtype)


def quantize_int8(x: Tensor, name: str = "the tensor") -> Int8:
    """Quantize a float32, float16 or bfloat16 matrix [rows, columns]. Temporaries take a few MB, whatever its size.

    Raises `InputError`, naming the tensor by `name`, where it is empty, no matrix, of another dtype, or holds NaN or
    infinity. Magnitudes beyond float16's 65504, which bitsandbytes would turn into infinity, are kept.
    """
    check_source(x, name)
    if x.ndim != 2:
        raise InputError(f"{name} has {x.ndim} dimensions", "int8 quantization takes matrices only")
    weight = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    absmax = torch.empty(len(x), dtype=torch.float32, device=x.device)
    encode = encode_int8 if can_quantize(x) else _encode
    encode(x.detach(), weight, absmax)
    check_finite(absmax, name)
    return Int8(weight, absmax, x.dtype)


def dequantize_int8(q: Int8, dtype: torch.dtype | None = None) -> Tensor:
    """The values as a matrix of `q.shape`, in `dtype` or in the dtype that the source had."""
    out = torch.empty(q.shape, dtype=dtype or q.dtype, device=q.weight.device)

    def dequantize_chunk(start: int, stop: int) -> None:
        out[start:stop] = dequantize_rows(q, start, stop)

    for_chunks(len(out), max(1, _CHUNK // q.shape[1]), dequantize_chunk)
    return out


def dequantize_rows(q: Int8, start: int, stop: int) -> Tensor:
    """The rows from `start` up to `stop`, float32 [stop - start, columns]."""
    return (q.weight[start:stop] * q.absmax[start:stop, None]).mul_(_INVERSE_127)


def _encode(x: Tensor, weight: Tensor, absmax: Tensor) -> None:
    """Fill `weight` and `absmax` in plain torch: what the kernels do, and what they are held to."""

    def encode_chunk(start: int, stop: int) -> None:
        rows, largest = _round_to_half(x[start:stop])
        scale = torch.where(largest > 0, 127.0 / largest, 0.0)
        weight[start:stop] = rows.mul_(scale[:, None]).round_()
        absmax[start:stop] = largest

    chunk = _CHUNK if x.is_cpu else CARD_CHUNK
    for_chunks(len(x), max(1, chunk // x.shape[1]), encode_chunk)


def _round_to_half(source: Tensor) -> tuple[Tensor, Tensor]:
    """`source` as float32, rounded to float16's precision but for what overflows there, and each row's absmax."""
    rows = source.half().float()
    absmax = rows.abs().amax(1)
    if not is_finite(absmax):
        rows = torch.where(rows.isinf(), source.float(), rows)
        absmax = rows.abs().amax(1)
    return rows, absmax
