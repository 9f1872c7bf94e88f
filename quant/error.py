"""How far off a quantized matrix is from its source."""

from math import sqrt

import torch
from torch import Tensor

from lmx.core.native.quantize import can_quantize, squared_error
from lmx.quant import int8, quanto
from lmx.quant.four_bit import FourBit, dequantize_range
from lmx.quant.int8 import Int8
from lmx.quant.matmul import QuantMatrix
from lmx.quant.native import matrix_table
from lmx.quant.quanto import Quanto

# Elements that are dequantized at a time.
_CHUNK = 1 << 18


def rmse(q: QuantMatrix, source: Tensor) -> float:
    """The root mean square of `dequantized - source` [rows, columns]; a few MB of temporaries, whatever the size."""
    table = matrix_table(q) if can_quantize(source) else None
    total = _squared_error(q, source) if table is None else squared_error(table, source)
    return sqrt(total / source.numel())


def _squared_error(q: QuantMatrix, source: Tensor) -> float:
    """Its sum of squares, in plain torch."""
    total = 0.0
    if isinstance(q, FourBit):
        flat = source.reshape(-1)
        for start in range(0, flat.numel(), _CHUNK):
            stop = min(start + _CHUNK, flat.numel())
            total += _squares(dequantize_range(q, start, stop), flat[start:stop])
    else:
        step = max(1, _CHUNK // q.shape[1])
        for start in range(0, len(source), step):
            stop = min(start + step, len(source))
            total += _squares(_rows(q, start, stop), source[start:stop])
    return total


def _rows(q: Int8 | Quanto, start: int, stop: int) -> Tensor:
    """The rows from `start` up to `stop`, float32 [stop - start, columns]."""
    rows = int8.dequantize_rows(q, start, stop) if isinstance(q, Int8) else quanto.dequantize_rows(q, start, stop)
    return rows.float()


def _squares(values: Tensor, source: Tensor) -> float:
    difference = values.sub_(source).view(-1)
    return torch.dot(difference, difference).item()
