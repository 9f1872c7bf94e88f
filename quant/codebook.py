"""The tables behind the quantized formats, and the exact search for the nearest entry of a 16-entry table."""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

FourBitType = Literal["nf4", "fp4"]

# NormalFloat4: quantiles of the standard normal distribution, scaled to [-1, 1] (QLoRA, arXiv 2305.14314, appendix E).
_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

# One sign, two exponent and one mantissa bit in bitsandbytes' order; scaled by the largest, 12.
_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0, -0.0, -0.0625, -8.0, -12.0, -4.0, -6.0, -2.0, -3.0)

# The codes in the order of their values. FP4 has zero twice: exact zero is code 0, what rounds down to it from above 8.
_ORDER: dict[FourBitType, tuple[int, ...]] = {
    "nf4": tuple(range(16)),
    "fp4": (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3),
}


_HOST = torch.device("cpu")

# Tables are made once, so none may depend on a default dtype or device that happens to be set at that moment.


@cache
def four_bit_map(quant_type: FourBitType) -> Tensor:
    """The 16 values of the codes 0 to 15, float32 [16]."""
    if quant_type == "nf4":
        return torch.tensor(_NF4, dtype=torch.float32, device="cpu")
    return torch.tensor(_FP4, dtype=torch.float32, device="cpu") / 12.0


@cache
def dynamic_map() -> Tensor:
    """The 256 sorted values of the signed 8-bit dynamic tree type (arXiv 1511.04561), float32 [256].

    A decade for each of the exponents 10^-6 to 1, in which the number of fraction steps doubles each time.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32, device="cpu")
        steps = (10 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += steps + [-step for step in steps]
    return torch.tensor(sorted(values), dtype=torch.float32, device="cpu")


@cache
def dynamic_codes() -> Tensor:
    """The code of `dynamic_map` nearest to each of 65536 even steps from -1 to 1: uint8 [65536]."""
    steps = (2.0 * torch.arange(65536, dtype=torch.float32, device="cpu")) / 65535 - 1.0
    values = dynamic_map()
    return torch.bucketize(steps, (values[1:] + values[:-1]) * 0.5).to(torch.uint8)


@dataclass(frozen=True)
class RankTable:
    """Finds the rank of float32 values among up to 2^15 sorted thresholds, of which no two share their upper 16 bits.

    A cell is all floats with the same upper 16 bits. One addition of `carry[cell]` to the bits of a value leaves in the
    upper half of the sum the rank (for negative values its complement): within a cell the rank changes at most once,
    and the addend is such that the lower half overflows exactly past that threshold. So the answer is exact, at the
    price of one look-up for each value instead of a binary search.
    """

    carry: Tensor  # int32 [65536]

    def __call__(self, values: Tensor) -> Tensor:
        """How many thresholds are below each value: uint8, of the shape of `values` (1-D float32, contiguous)."""
        bits = values.view(torch.int32)
        cell = (bits >> 16).bitwise_and_(0xFFFF)
        rank = torch.index_select(self.carry, 0, cell).add_(bits).bitwise_right_shift_(16).to(torch.int8)
        return rank.bitwise_xor_(rank >> 7).view(torch.uint8)


@cache
def rank_table(quant_type: FourBitType, device: torch.device = _HOST) -> RankTable:
    """The table of ranks among the `midpoints` of a four-bit type."""
    return RankTable(make_rank_table(midpoints(quant_type)).carry.to(device))


@cache
def midpoints(quant_type: FourBitType) -> Tensor:
    """What lies halfway between neighbouring values of a four-bit type, sorted: float32 [15]."""
    values = four_bit_map(quant_type)[list(_ORDER[quant_type])]
    return (values[:-1] + values[1:]) / 2


def make_rank_table(thresholds: Tensor) -> RankTable:
    """Build a `RankTable` of sorted float32 thresholds [n]."""
    high = torch.arange(65536, dtype=torch.int64, device="cpu") << 16
    first, last = (_as_float(high + low) for low in (0, 0xFFFF))
    # The rank is how many thresholds are strictly below. NaN cells get some rank: callers refuse NaN.
    rank_first, rank_last = torch.bucketize(first, thresholds), torch.bucketize(last, thresholds)
    inside = torch.zeros(65536, dtype=torch.int64, device="cpu")
    bits = thresholds.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    inside[bits >> 16] = bits & 0xFFFF
    negative = high >= 1 << 31
    changes = rank_first != rank_last
    # Positive: past the threshold the rank goes up. Negative: from the threshold on it goes down, its complement up.
    overflow = torch.where(negative, 0x10000 - inside, 0xFFFF - inside) * changes
    target = torch.where(negative, ~rank_first, rank_first) << 16
    return RankTable((target + overflow - high).to(torch.int32))


def _as_float(bits: Tensor) -> Tensor:
    """The float32 values whose bit patterns these are (int64, 0 to 2^32 - 1)."""
    return bits.to(torch.int32).view(torch.float32)


@cache
def packed_codes(quant_type: FourBitType) -> Tensor:
    """For a byte of two ranks the byte of the two codes: uint8 [256]."""
    order = torch.tensor(_ORDER[quant_type], dtype=torch.uint8, device="cpu")
    return ((order << 4)[:, None] | order).flatten()


@cache
def pair_values(quant_type: FourBitType) -> Tensor:
    """For each packed byte its two values, first the high nibble's: float32 [256, 2]."""
    values = four_bit_map(quant_type)
    return torch.stack([values.repeat_interleave(16), values.repeat(16)], dim=1)
