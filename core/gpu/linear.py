"""A few vectors times one stored matrix, for what bitsandbytes has no kernel that leaves the host alone: int8.

LLM.int8() asks on the host whether columns stand out, once a call: no step with it can be captured in a CUDA graph, and
each waits. With a few vectors, memory is what counts: here the weight alone is in 8 bits, the vector in its own.
Importing this imports Triton: ask `lmx.core.gpu.launch.can_launch` first.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmx.core.gpu.table import FEW_VECTORS, Format, VectorTile, code_values, table_row
from lmx.core.gpu.words import add_products, load_elements, open_matrix, row_scales
from lmx.core.native.operation import DTYPE_CODES
from lmx.core.native.vector import StoredMatrix, wants_gradient


@triton.jit
def multiply_vectors(
    x, table, codes, out,
    ALL_ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    KIND: tl.constexpr, PER: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr,
    ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """`ROWS` rows times one vector a program: x [vectors, columns] -> [vectors, rows]."""
    vector = tl.program_id(0)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    matrix = open_matrix(table, NESTED)
    sixteen = tl.load(codes + tl.arange(0, 16))
    ROW_WORDS: tl.constexpr = COLUMNS // PER
    total = tl.zeros([ROWS, WORDS], tl.float32)
    for first in range(0, ROW_WORDS, WORDS):
        words = first + tl.arange(0, WORDS)
        here = words < ROW_WORDS
        at = rows[:, None] * ROW_WORDS + words[None, :]
        mask = (rows < ALL_ROWS)[:, None] & here[None, :]
        elements = load_elements(x + vector * COLUMNS, words, here, PER)
        total = add_products(total, sixteen, matrix, at, mask, elements, KIND, BLOCK, NESTED, PER)
    answer = tl.sum(total, 1) * row_scales(matrix, rows, rows < ALL_ROWS, KIND)
    tl.store(out + vector * ALL_ROWS + rows, answer.to(out.dtype.element_ty), mask=rows < ALL_ROWS)


class DeviceMatrix:
    """A matrix [rows, columns] on one device, as the kernel is told of it (if it `is_readable`); keeps its tensors."""

    def __init__(self, matrix: StoredMatrix) -> None:
        self._matrix, self._format = matrix, Format.of(matrix)
        self._table = torch.tensor(table_row(matrix), dtype=torch.int64).to(matrix.data.device)
        self._codes = code_values(self._format, matrix.data.device)

    def __reduce__(self) -> tuple[type["DeviceMatrix"], tuple[StoredMatrix]]:
        """A copy has tensors of its own, and so addresses of its own."""
        return DeviceMatrix, (self._matrix,)

    def can_take(self, x: Tensor) -> bool:
        """Whether x [..., columns] is this kernel's business: few vectors that lie here, and no gradient asked for."""
        columns = self._matrix.columns
        fits = x.device == self._matrix.data.device and x.dtype in DTYPE_CODES and x.shape[-1] == columns
        return fits and 0 < x.numel() <= FEW_VECTORS * columns and not wants_gradient(x)

    def multiply(self, x: Tensor) -> Tensor:
        """X [..., columns] -> [..., rows], in x's dtype, summed in float32."""
        x, rows, columns = x.contiguous(), self._matrix.rows, self._matrix.columns
        vectors = x.numel() // columns
        out = x.new_empty(*x.shape[:-1], rows)
        tile = VectorTile.choose(vectors * rows, columns // self._format.per_word, 2)
        with torch.cuda.device_of(x):
            multiply_vectors[(vectors, triton.cdiv(rows, tile.rows))](
                x, self._table, self._codes, out, ALL_ROWS=rows, COLUMNS=columns, **self._format.constants(),
                ROWS=tile.rows, WORDS=tile.words, num_warps=tile.warps, enable_fp_fusion=True,
            )  # fmt: skip
        return out
