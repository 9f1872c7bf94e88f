"""Quantization as optimum-quanto 0.2.7 does it, bit for bit, without its extension: qint8, qfloat8, qint4 and qint2.

Eight bits are symmetric, a scale a row: `value = scale * code`. Four and two bits are affine, a scale and a shift a
group: `value = scale * code - shift`. A group is 128 neighbours of a row, or 96, 64 or 32 where those divide it and 128
does not, or the whole row. All arithmetic is in the dtype of the source, as there: the scales are stored in it.
"""

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from lmx.core.errors import InputError
from lmx.core.finite import check_finite, is_finite
from lmx.quant.chunks import for_chunks
from lmx.quant.four_bit import check_source

QuantoType = Literal["qint8", "qint4", "qint2", "qfloat8"]
QUANTO_TYPES: tuple[str, ...] = get_args(QuantoType)
# Bits of a code that shares its byte with others.
PACKED_BITS: dict[QuantoType, int] = {"qint4": 4, "qint2": 2}
# The dtype of the codes of the others.
CODE_DTYPES: dict[QuantoType, torch.dtype] = {"qint8": torch.int8, "qfloat8": torch.float8_e4m3fn}

# Elements that a thread works on at a time, so that the temporaries stay in the cache.
_CHUNK = 1 << 18
_LARGEST_GROUP, _GROUP_STEP = 128, 32


@dataclass(frozen=True, eq=False)
class Quanto:
    """A matrix of `shape` [rows, columns]; `groups` is rows, or of a packed type rows * columns / group size.

    A byte of packed codes holds those of several groups: the first of every `height = ceil(groups / codes a byte)`
    groups lie in the lowest bits, the next `height` of them above, and so on.
    """

    data: Tensor  # int8 or float8 [rows, columns]; packed: uint8 [height, group size]
    scale: Tensor  # [groups, 1] in the dtype of the source
    shift: Tensor | None  # the same, of a packed type
    quant_type: QuantoType
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """What it was and what it is dequantized to."""
        return self.scale.dtype

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.data.device

    @property
    def nbytes(self) -> int:
        """Bytes of the codes, scales and shifts."""
        return self.data.nbytes + self.scale.nbytes + (0 if self.shift is None else self.shift.nbytes)

    def to(self, device: torch.device) -> "Quanto":
        """The same on another device; dtypes are part of the format and never change."""
        shift = None if self.shift is None else self.shift.to(device)
        return replace(self, data=self.data.to(device), scale=self.scale.to(device), shift=shift)


def group_size(columns: int) -> int:
    """How many neighbours in a row of `columns` share a scale in a packed type."""
    size = _LARGEST_GROUP
    while columns % size and size > _GROUP_STEP:
        size -= _GROUP_STEP
    return columns if columns <= _LARGEST_GROUP or columns % size else size


def is_too_small(shape: tuple[int, ...], quant_type: QuantoType) -> bool:
    """Whether the format does not work for a matrix of `shape` in a packed type.

    A single group has no scale there, and of two groups a file does not tell whether a code has four bits or two.
    """
    return quant_type in PACKED_BITS and shape[0] * (shape[1] // group_size(shape[1])) < 3


def quantize_quanto(x: Tensor, quant_type: QuantoType, name: str = "the tensor") -> Quanto:
    """Quantize a float32, float16 or bfloat16 matrix [rows, columns]. Temporaries take a few MB, whatever its size.

    Bit for bit what optimum-quanto makes of a linear layer (its `AbsmaxOptimizer` and `MaxOptimizer`), but for a row
    of zeros in qfloat8, which it turns into NaN. Raises `InputError`, naming the tensor by `name`, where it is empty,
    no matrix, too small for a packed type, of another dtype, or holds NaN or infinity.
    """
    check_source(x, name)
    if x.ndim != 2:
        raise InputError(f"{name} has {x.ndim} dimensions", f"{quant_type} quantization takes matrices only")
    if is_too_small(tuple(x.shape), quant_type):
        raise InputError(f"{name} of shape {list(x.shape)} is too small for {quant_type}", "keep it with --skip")
    source = x.detach()
    q = _quantize_packed(source, quant_type) if quant_type in PACKED_BITS else _quantize_bytes(source, quant_type)
    if not is_finite(q.scale):
        check_finite(source, name)
        raise InputError(f"{name} spans a wider range than {x.dtype} holds", "convert it to bf16 first: lmx convert")
    return q


def dequantize_quanto(q: Quanto, dtype: torch.dtype | None = None) -> Tensor:
    """The values as a matrix of `q.shape`, in `dtype` or in the dtype that the source had."""
    out = torch.empty(q.shape, dtype=dtype or q.dtype, device=q.device)

    def dequantize_chunk(start: int, stop: int) -> None:
        out[start:stop] = dequantize_rows(q, start, stop)

    for_chunks(len(out), max(1, _CHUNK // q.shape[1]), dequantize_chunk)
    return out


def dequantize_rows(q: Quanto, start: int, stop: int) -> Tensor:
    """The rows from `start` up to `stop`, [stop - start, columns] in the dtype of the source, as optimum-quanto rounds.

    Not in float32: the values of a matrix are the same wherever they are computed, there and here. But a row of zeros
    in qfloat8, as of a padding token, which optimum-quanto stores as NaN times 0, is a row of zeros.
    """
    if q.shift is None:
        scale = q.scale[start:stop]
        values = q.data[start:stop].to(q.dtype).mul_(scale)
        return values.masked_fill_(scale == 0, 0) if q.quant_type == "qfloat8" else values
    groups_a_row = q.shape[1] // q.data.shape[1]
    first, last = start * groups_a_row, min(stop, q.shape[0]) * groups_a_row
    values = unpack_groups(q.data, PACKED_BITS[q.quant_type], first, last).to(q.dtype)
    return values.mul_(q.scale[first:last]).sub_(q.shift[first:last]).view(-1, q.shape[1])


def unpack_groups(packed: Tensor, bits: int, first: int, last: int) -> Tensor:
    """The codes of the groups from `first` up to `last`: uint8 [height, size] -> uint8 [last - first, size]."""
    height, parts = len(packed), []
    while first < last:
        lane, row = divmod(first, height)
        count = min(height - row, last - first)
        parts.append(packed[row : row + count].bitwise_right_shift(bits * lane).bitwise_and_((1 << bits) - 1))
        first += count
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _quantize_bytes(source: Tensor, quant_type: QuantoType) -> Quanto:
    dtype = CODE_DTYPES[quant_type]
    info = torch.iinfo(dtype) if quant_type == "qint8" else torch.finfo(dtype)
    data = torch.empty(source.shape, dtype=dtype)
    scale = torch.empty(len(source), 1, dtype=source.dtype)

    def quantize_chunk(start: int, stop: int) -> None:
        rows = source[start:stop]
        scale[start:stop] = rows.abs().amax(1, keepdim=True) / info.max
        scaled = rows / scale[start:stop]
        scaled = scaled.round_() if quant_type == "qint8" else scaled
        data[start:stop] = _zero_for_nan(scaled).clamp_(info.min, info.max).to(dtype)

    for_chunks(len(source), max(1, _CHUNK // source.shape[1]), quantize_chunk)
    return Quanto(data, scale, None, quant_type, tuple(source.shape))


def _quantize_packed(source: Tensor, quant_type: QuantoType) -> Quanto:
    bits, columns = PACKED_BITS[quant_type], source.shape[1]
    groups = source.reshape(-1, group_size(columns))  # [groups, group size]
    lanes = 8 // bits
    height = -(-len(groups) // lanes)
    data = torch.zeros(height, groups.shape[1], dtype=torch.uint8)
    scale = torch.empty(len(groups), 1, dtype=source.dtype)
    shift = torch.empty_like(scale)

    def quantize_chunk(start: int, stop: int) -> None:
        """Fill some rows of bytes, lane by lane."""
        for lane in range(lanes):
            first, last = lane * height + start, min(lane * height + stop, len(groups))
            if first >= last:
                break
            codes = _affine_codes(groups[first:last], bits, scale[first:last], shift[first:last])
            data[start : start + last - first] |= codes << (bits * lane)

    for_chunks(height, max(1, _CHUNK // groups.shape[1]), quantize_chunk)
    return Quanto(data, scale, shift, quant_type, tuple(source.shape))


def _affine_codes(groups: Tensor, bits: int, scale: Tensor, shift: Tensor) -> Tensor:
    """Fill `scale` and `shift` [groups, 1] and return the codes, uint8 [groups, group size]."""
    low, high = groups.aminmax(dim=1, keepdim=True)
    largest = (1 << bits) - 1
    torch.div(high - low, largest, out=scale)
    torch.neg(low, out=shift)
    codes = (groups + shift).div_(scale).round_()
    return _zero_for_nan(codes).clamp_(0, largest).to(torch.uint8)


def _zero_for_nan(values: Tensor) -> Tensor:
    """Zero divided by a scale of zero counts as zero, in place."""
    return values.masked_fill_(values.isnan(), 0)
