"""Products with quantized matrices by the CPU's own kernels (`lmx.core.native`), on the bytes as they are stored."""

from collections.abc import Sequence

from torch import Tensor

from lmx.core.native.compiled import library
from lmx.core.native.vector import ExpertTable, Kind, MatrixTable, StoredMatrix, can_multiply
from lmx.quant.four_bit import FourBit
from lmx.quant.int8 import Int8
from lmx.quant.quanto import Quanto

Stored = FourBit | Int8 | Quanto | Tensor


def stored_matrix(q: Stored) -> StoredMatrix | None:
    """What the kernels are told about a matrix; None where they are absent or cannot read it as it is."""
    if isinstance(q, Tensor):
        return StoredMatrix.kept(q) if can_multiply(q) else None
    if isinstance(q, Quanto) or q.device.type != "cpu" or library() is None:
        return None
    data = q.packed if isinstance(q, FourBit) else q.weight
    return _described(q, q.absmax) if data.is_contiguous() and q.absmax.is_contiguous() else None


def describe_matrix(q: FourBit | Int8 | Tensor) -> StoredMatrix:
    """A matrix in the words of `lmx.core`, wherever it lies, with scales as files have them: for a device's kernels."""
    if isinstance(q, Tensor):
        return StoredMatrix.kept(q)
    return _described(q, q.stored_absmax if isinstance(q, FourBit) else q.absmax)


def _described(q: FourBit | Int8, absmax: Tensor) -> StoredMatrix:
    rows, columns = q.shape
    if isinstance(q, Int8):
        return StoredMatrix(Kind.INT8, q.weight, rows, columns, absmax)
    nested = q.nested
    decoding = (nested.quant_map, nested.absmax, nested.offset) if nested is not None else (None, None, 0.0)
    return StoredMatrix(Kind.FOUR_BIT, q.packed, rows, columns, absmax, q.quant_map, q.block_size, *decoding)


def matrix_table(q: Stored) -> MatrixTable | None:
    """The table for one matrix, if the kernels take it."""
    matrix = stored_matrix(q)
    return None if matrix is None else MatrixTable([matrix])


def expert_table(
    gate: Sequence[Stored], up: Sequence[Stored], down: Sequence[Stored], activation: str
) -> ExpertTable | None:
    """The table for a bank of experts, if the kernels take every matrix of it."""
    experts = []
    for one, other, last in zip(gate, up, down, strict=True):
        matrices = stored_matrix(one), stored_matrix(other), stored_matrix(last)
        if matrices[0] is None or matrices[1] is None or matrices[2] is None:
            return None
        experts.append((matrices[0], matrices[1], matrices[2]))
    return ExpertTable(experts, activation)
