"""Quantized matrices as the kernels for CUDA devices (`lmx.core.gpu`) are told of them, on the bytes as stored."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from lmx.core.gpu.launch import can_launch
from lmx.core.native.vector import StoredMatrix, can_describe
from lmx.quant.four_bit import FourBit
from lmx.quant.int8 import Int8
from lmx.quant.native import Stored, describe_matrix
from lmx.quant.quanto import Quanto

if TYPE_CHECKING:
    from lmx.core.gpu.experts import DeviceBank
    from lmx.core.gpu.linear import DeviceMatrix


def device_bank(
    gate: Sequence[Stored], up: Sequence[Stored], down: Sequence[Stored], activation: str
) -> "DeviceBank | None":
    """The bank as the kernels are told of it; None where Triton is absent or cannot read a matrix of it."""
    first = gate[0]
    data = first.packed if isinstance(first, FourBit) else first.weight if isinstance(first, Int8) else first
    if isinstance(data, Quanto) or not can_launch(data):
        return None
    from lmx.core.gpu.experts import DeviceBank

    parts = []
    for matrices in (gate, up, down):
        described = [_describe(matrix) for matrix in matrices]
        parts.append([matrix for matrix in described if matrix is not None])
    if len(parts[0] + parts[1] + parts[2]) < 3 * len(gate):
        return None
    return DeviceBank.make(list(zip(*parts, strict=True)), activation)


def serves_few(q: Int8) -> bool:
    """Whether the kernel multiplies a few vectors by this matrix."""
    if not can_launch(q.weight):
        return False
    from lmx.core.gpu.table import is_readable

    return is_readable(describe_matrix(q))


def device_matrix(q: Int8) -> "DeviceMatrix | None":
    """The matrix as the kernel for a few vectors is told of it; None where it does not serve."""
    if not serves_few(q):
        return None
    from lmx.core.gpu.linear import DeviceMatrix

    return DeviceMatrix(describe_matrix(q))


def _describe(q: Stored) -> StoredMatrix | None:
    if isinstance(q, Quanto) or (isinstance(q, Tensor) and not can_describe(q)):
        return None
    return describe_matrix(q)
