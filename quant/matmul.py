"""Products with quantized matrices: which code runs them, and the plain torch path that runs anywhere."""

from collections.abc import Callable
from functools import partial
from math import gcd
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import linear

from lmx.core.native.matrix import dequantize_rows, has_panels, multiply_many
from lmx.core.native.operation import DTYPE_CODES
from lmx.core.native.vector import MAX_VECTORS, MatrixTable, can_take
from lmx.quant import four_bit, int8, quanto
from lmx.quant.chunks import for_chunks
from lmx.quant.four_bit import NESTED_BLOCK_SIZE, FourBit
from lmx.quant.gpu import device_matrix
from lmx.quant.int8 import Int8
from lmx.quant.native import matrix_table
from lmx.quant.quanto import Quanto

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

QuantMatrix = FourBit | Int8 | Quanto
Matrix = QuantMatrix | Tensor
Product = Callable[[Tensor], Tensor]

# Elements of a matrix that are dequantized at a time.
_TILE = 1 << 18
# The same where the kernels dequantize: enough for torch's product to run at its full speed.
_NATIVE_TILE = 1 << 20
# Vectors in two groups still take less time than rows dequantized for all (`benchmarks/products.py --vectors 8`).
_FEW = 2 * MAX_VECTORS
# Activations beyond it are multiplied in 16 bits by LLM.int8() (arXiv 2208.07339, section 3.2).
_OUTLIER_THRESHOLD = 6.0


def choose_product(q: Matrix) -> Product:
    """The function that multiplies by a matrix [rows, columns]: x [..., columns] -> [..., rows], in the dtype of x.

    This is the one place that picks a kernel: bitsandbytes for its matrices on a CUDA device, our own for a few vectors
    on the CPU, else torch. A tensor is a matrix that was kept from quantization.
    """
    if not isinstance(q, Tensor | Quanto) and q.device.type == "cuda":
        return bitsandbytes_product(q)
    many = partial(plain_product, q) if isinstance(q, Tensor) else partial(tiled_product, q)
    table = matrix_table(q)
    return many if table is None else partial(_native_product, table, q, many)


def dequantize(q: QuantMatrix, dtype: torch.dtype | None = None) -> Tensor:
    """The values of a quantized matrix, in `dtype` or in the dtype that its source had: the same bits with kernels."""
    wanted = dtype or q.dtype
    table = matrix_table(q)
    if table is not None and wanted in DTYPE_CODES:
        return dequantize_rows(table, 0, table.rows, wanted)
    if isinstance(q, Quanto):
        return quanto.dequantize_quanto(q, dtype)
    return four_bit.dequantize_4bit(q, dtype) if isinstance(q, FourBit) else int8.dequantize_int8(q, dtype)


def _native_product(table: MatrixTable, q: Matrix, many: Product, x: Tensor) -> Tensor:
    """Multiply by the kernels where they are quicker, else by `many`: x [..., columns] -> [..., rows]."""
    if not can_take(x, table.columns):
        return many(x)
    if x.numel() <= _FEW * table.columns:
        return table.multiply(x)
    if isinstance(q, Tensor | Quanto):
        return many(x)
    flat = x.reshape(-1, table.columns)
    # Quicker than torch's product of dequantized rows, for any number of vectors (`benchmarks/products.py` times both).
    multiply = multiply_many if x.dtype == torch.bfloat16 and has_panels() else _multiply_tiles
    return multiply(table, flat).view(*x.shape[:-1], table.rows)


def _multiply_tiles(table: MatrixTable, x: Tensor) -> Tensor:
    """X [vectors, columns] -> [vectors, rows], by torch, from rows that are dequantized a few at a time."""
    out = x.new_empty(len(x), table.rows)
    step = max(64, _NATIVE_TILE // table.columns)
    for start in range(0, table.rows, step):
        stop = min(start + step, table.rows)
        out[:, start:stop] = linear(x, dequantize_rows(table, start, stop, x.dtype))
    return out


def plain_product(weight: Tensor, x: Tensor) -> Tensor:
    """Multiply by a matrix that is not quantized: x [..., columns] -> [..., rows]."""
    return linear(x, weight.to(x.dtype))


def tiled_product(q: QuantMatrix, x: Tensor) -> Tensor:
    """Multiply by a matrix that is dequantized a few rows at a time: x [..., columns] -> [..., rows].

    Gradients flow to `x`; the backward pass dequantizes again instead of keeping the tiles.
    """
    flat = x.reshape(-1, x.shape[-1])  # [vectors, columns]
    differentiate = torch.is_grad_enabled() and x.requires_grad
    out: Tensor = _TiledProduct.apply(flat, q) if differentiate else _multiply(flat, q)  # type: ignore[no-untyped-call]
    return out.view(*x.shape[:-1], q.shape[0])


def bitsandbytes_product(q: FourBit | Int8) -> Product:
    """Multiply by bitsandbytes' kernels; int8 as LLM.int8(), which also rounds the activations to 8 bits.

    A few vectors times int8 are our own kernel's, where Triton is there.
    """
    return _bitsandbytes_4bit(q) if isinstance(q, FourBit) else _bitsandbytes_int8(q)


def _multiply(x: Tensor, q: QuantMatrix) -> Tensor:
    """Multiply x [vectors, columns] -> [vectors, rows]."""
    out = x.new_empty(len(x), q.shape[0])
    x = x.detach()

    def multiply_tile(start: int, stop: int) -> None:
        out[:, start:stop] = linear(x, _tile(q, start, stop).to(x.dtype))

    for_chunks(q.shape[0], _tile_rows(q), multiply_tile)
    return out


class _TiledProduct(torch.autograd.Function):
    """`_multiply` with a gradient for `x`, in the same bounded memory."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, q: QuantMatrix) -> Tensor:
        """Multiply x [vectors, columns] -> [vectors, rows]."""
        ctx.q = q  # type: ignore[attr-defined]
        return _multiply(x, q)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        """The gradient [vectors, rows] -> that of x [vectors, columns]."""
        grad, q = grads[0], ctx.q  # type: ignore[attr-defined]
        out = grad.new_zeros(len(grad), q.shape[1])
        step = _tile_rows(q)
        for start in range(0, q.shape[0], step):
            stop = min(start + step, q.shape[0])
            out += grad[:, start:stop] @ _tile(q, start, stop).to(grad.dtype)
        return out, None


def _tile_rows(q: QuantMatrix) -> int:
    """How many rows to dequantize at a time: about `_TILE` elements, and whole blocks."""
    columns = q.shape[1]
    rows = max(1, _TILE // columns)
    unit = q.block_size // gcd(columns, q.block_size) if isinstance(q, FourBit) else 1
    return -(-rows // unit) * unit


def _tile(q: QuantMatrix, start: int, stop: int) -> Tensor:
    """The rows from `start` up to `stop` [stop - start, columns], in float32 or the dtype of the source."""
    if isinstance(q, Int8):
        return int8.dequantize_rows(q, start, stop)
    if isinstance(q, Quanto):
        return quanto.dequantize_rows(q, start, stop)
    columns = q.shape[1]
    return four_bit.dequantize_range(q, start * columns, stop * columns).view(-1, columns)


def _bitsandbytes_4bit(q: FourBit) -> Product:
    from bitsandbytes import matmul_4bit  # type: ignore[attr-defined]

    state = _quant_state(q)
    packed = q.packed.t()  # before 0.50 it wants the row that this makes of the column, and 0.50 takes either

    def product(x: Tensor) -> Tensor:
        return matmul_4bit(x, packed, quant_state=state).to(x.dtype)

    return product


def _quant_state(q: FourBit) -> "QuantState":
    """The same as bitsandbytes' own object."""
    from bitsandbytes.functional import QuantState

    offset = nested = None
    if q.nested is not None:
        offset = torch.tensor(q.nested.offset, device=q.absmax.device)
        nested = QuantState(  # type: ignore[no-untyped-call]
            q.nested.absmax, code=q.nested.quant_map, blocksize=NESTED_BLOCK_SIZE, dtype=torch.float32
        )
    return QuantState(  # type: ignore[no-untyped-call]
        q.stored_absmax,
        shape=torch.Size(q.shape),
        code=q.quant_map.to(q.absmax.device),
        blocksize=q.block_size,
        quant_type=q.quant_type,
        dtype=q.dtype,
        offset=offset,
        state2=nested,
    )


def _bitsandbytes_int8(q: Int8) -> Product:
    from bitsandbytes import MatmulLtState, matmul  # type: ignore[attr-defined]

    state = MatmulLtState()
    state.CB, state.SCB = q.weight, q.absmax
    state.has_fp16_weights, state.is_training, state.threshold = False, False, _OUTLIER_THRESHOLD

    few = device_matrix(q)

    def product(x: Tensor) -> Tensor:
        if few is not None and not torch.compiler.is_compiling() and few.can_take(x):
            return few.multiply(x)
        return matmul(x.half(), q.weight, state=state).to(x.dtype)

    return product
