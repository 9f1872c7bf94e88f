"""A few vectors times matrices, and through banks of experts, on the bytes as a checkpoint holds them."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache, lru_cache

import torch
from torch import Tensor

from lmx.core.native.compiled import INT, LONG, POINTER, c_function, library
from lmx.core.native.operation import DTYPE_CODES, define
from lmx.core.native.tape import call

# As in src/vector.h.
MAX_VECTORS = 4
_WORDS = 11
# As in src/prepare.h.
ACTIVATION_CODES = {"silu": 0, "swish": 0, "gelu": 1, "gelu_new": 2, "gelu_pytorch_tanh": 2, "relu": 3}


class Kind(IntEnum):
    """How the elements of a matrix lie in memory."""

    FOUR_BIT = 0
    INT8 = 1
    BF16 = 2
    F32 = 3
    F16 = 4


# The structure of src/vector.cpp.
class _SideBySide(ctypes.Structure):
    _fields_ = (
        *((name, POINTER) for name in ("matrices", "x", "out")),
        *((name, LONG) for name in ("count", "vectors", "rows")),
        ("dtype", INT),
    )


_KEPT = {torch.bfloat16: Kind.BF16, torch.float32: Kind.F32, torch.float16: Kind.F16}
_multiply_kept = c_function("lmx_multiply_kept", POINTER, LONG, LONG, LONG, POINTER, INT, LONG, POINTER)
_multiply_table = c_function("lmx_multiply", _SideBySide)
_answer_table = c_function(
    "lmx_experts", POINTER, LONG, POINTER, INT, LONG, POINTER, POINTER, LONG, INT, POINTER, result=INT
)


@dataclass(frozen=True, eq=False)
class StoredMatrix:
    """A matrix [rows, columns] and what its values are made of.

    data: uint8 two codes a byte, the first in the high nibble; int8; or floats that were kept from quantization.
    absmax: float32 or bfloat16 a block (or its uint8 code: see `nested_map`), or float32 a row for int8.
    code: float32 [16], the values of four-bit codes. nested_map float32 [256] and nested_absmax, one for 256 blocks,
    decode absmax: `nested_map[absmax] * nested_absmax + nested_offset`.
    """

    kind: Kind
    data: Tensor
    rows: int
    columns: int
    absmax: Tensor | None = None
    code: Tensor | None = None
    block_size: int = 64
    nested_map: Tensor | None = None
    nested_absmax: Tensor | None = None
    nested_offset: float = 0.0

    @classmethod
    def kept(cls, weight: Tensor) -> "StoredMatrix":
        """A matrix of floats."""
        return cls(_KEPT[weight.dtype], weight, *weight.shape)

    def words(self) -> list[int]:
        """The row of a table that stands for it; its tensors must be contiguous and outlive the table."""
        offset = ctypes.c_int32.from_buffer(ctypes.c_float(self.nested_offset)).value
        tables = None if self.code is None else _tables_of(self.code)
        tensors = (self.absmax, tables, self.nested_map, self.nested_absmax)
        absmax, code, nested_map, nested_absmax = (0 if t is None else t.data_ptr() for t in tensors)
        shape = (self.data.data_ptr(), self.rows, self.columns, int(self.kind))
        narrow = self.absmax is not None and self.absmax.dtype == torch.bfloat16
        scales = (absmax, code, DTYPE_CODES[torch.bfloat16 if narrow else torch.float32], self.block_size)
        return [*shape, *scales, nested_map, nested_absmax, offset & 0xFFFFFFFF]


@lru_cache(maxsize=64)  # by identity, as tensors are hashed: thousands of matrices share one
def _tables_of(code: Tensor) -> Tensor:
    return _code_tables(tuple(code.tolist()))


@cache
def _code_tables(code: tuple[float, ...]) -> Tensor:
    """float32 [34], never freed: the 16 values, then what `_in_bf16` and `_in_digits` say."""
    values = torch.tensor(code, dtype=torch.float64)
    return torch.cat((values.float(), _in_bf16(values), _in_digits(values)))


def _in_bf16(values: Tensor) -> Tensor:
    """float32 [9]: values [16] times a factor as 16 bf16, then 1 / factor.

    bf16 has eight bits, and rounding the values to it would be most of a product's error. Times the best of many
    factors they fall close to bf16 numbers, all 16 at once.
    """
    factors = torch.linspace(1.0, 2.0, 1 << 16, dtype=torch.float64)[:, None]
    errors = ((factors * values).bfloat16().double() / factors - values).square().sum(1)
    factor = factors[errors.argmin()]
    rounded = (factor * values).bfloat16().view(torch.float32)
    return torch.cat((rounded, (1 / factor).float()))


def _in_digits(values: Tensor) -> Tensor:
    """float32 [9]: values [16] times a factor as digits (src/digits.h), then 1 / (17 * factor).

    16 bytes are the nearest whole numbers a of a + r, and 16 more a + 17 r, all 128 above what they stand for. Here too
    the best of many factors is taken, by what rounding a + 17 r and the product of both remainders cost.
    """
    factors = torch.linspace(96.0, 127.0, 1 << 14, dtype=torch.float64)[:, None] / values.abs().max().clamp(min=1e-30)
    coarse = (factors * values).round()
    fine = 17 * factors * values - 16 * coarse
    # Times usual elements of x, which are up to 118, and their remainders.
    errors = (47 * (fine - fine.round())).square() + (78.5 * (factors * values - coarse)).square()
    errors = (errors / factors.square()).sum(1)
    errors[(fine.round().abs() > 127).any(1)] = torch.inf
    best = errors.argmin()
    digits = torch.cat((coarse[best], fine[best].round())) + 128
    return torch.cat((digits.to(torch.uint8).view(torch.float32), (1 / (17 * factors[best])).float()))


def can_describe(weight: Tensor) -> bool:
    """Whether a matrix of floats is of a kind that kernels know."""
    return weight.dtype in _KEPT


def can_multiply(weight: Tensor) -> bool:
    """Whether the kernels are there and read this matrix of floats as it is."""
    return weight.is_cpu and weight.dtype in _KEPT and weight.is_contiguous() and library() is not None


def wants_gradient(x: Tensor) -> bool:
    """Whether autograd must see what is done with x."""
    return torch.is_grad_enabled() and x.requires_grad


def can_take(x: Tensor, columns: int) -> bool:
    """Whether x [..., columns] is the kernels' business: on the CPU, not empty, and no gradient is asked for."""
    return x.is_cpu and x.shape[-1] == columns and x.numel() > 0 and x.dtype in DTYPE_CODES and not wants_gradient(x)


def are_few(x: Tensor, columns: int) -> bool:
    """Whether x [..., columns] is the kernels' business and one to four vectors."""
    return x.numel() <= MAX_VECTORS * columns and can_take(x, columns)


def multiply_kept(weight: Tensor, x: Tensor) -> Tensor:
    """X [..., columns] times a matrix [rows, columns] -> [..., rows]; for what `are_few` and `can_multiply` allow."""
    rows, columns = weight.shape
    x = x.contiguous()
    out = x.new_empty(*x.shape[:-1], rows)
    kind, code, vectors = _KEPT[weight.dtype].value, DTYPE_CODES[x.dtype], x.numel() // columns
    call(_multiply_kept(), weight.data_ptr(), rows, columns, kind, x.data_ptr(), code, vectors, out.data_ptr())
    return out


class MatrixTable:
    """Matrices of as many columns each, which one call multiplies; keeps their tensors alive."""

    def __init__(self, matrices: Sequence[StoredMatrix]) -> None:
        self._matrices = tuple(matrices)
        self.words = torch.tensor([matrix.words() for matrix in matrices], dtype=torch.int64)
        self.columns = matrices[0].columns
        self.rows = sum(matrix.rows for matrix in matrices)

    def __reduce__(self) -> tuple[type["MatrixTable"], tuple[tuple[StoredMatrix, ...]]]:
        """A copy has tensors of its own, and so addresses of its own."""
        return MatrixTable, (self._matrices,)

    def multiply(self, x: Tensor) -> Tensor:
        """X [..., columns] -> [..., sum of rows] of the same dtype; MAX_VECTORS vectors at a time."""
        # Past the dispatcher where nothing watches: it takes longer than all else around a small product.
        run = _multiply if torch.compiler.is_compiling() else _multiply_cpu
        out: Tensor = run(self.words, x, self.rows)
        return out


Expert = tuple[StoredMatrix, StoredMatrix, StoredMatrix]


class ExpertTable:
    """The gate, up and down matrices of a bank of experts, for one call a layer; keeps their tensors alive."""

    def __init__(self, experts: Sequence[Expert], activation: str) -> None:
        self._experts = tuple(experts)
        self.words = torch.tensor([[m.words() for m in expert] for expert in experts], dtype=torch.int64)
        self.activation = activation
        self.hidden = experts[0][0].columns

    def __reduce__(self) -> tuple[type["ExpertTable"], tuple[tuple[Expert, ...], str]]:
        """As of `MatrixTable`."""
        return ExpertTable, (self._experts, self.activation)

    def answer(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """X [tokens, hidden], ids int64 and weights [tokens, top_k] -> the weighted sums [tokens, hidden].

        Raises IndexError for the id of no expert.
        """
        run = _experts if torch.compiler.is_compiling() else _experts_cpu
        out: Tensor = run(self.words, x, ids, weights, ACTIVATION_CODES[self.activation])
        return out


def _multiply_cpu(table: Tensor, x: Tensor, rows: int) -> Tensor:
    x = x.contiguous()
    *before, columns = x.shape
    out = x.new_empty(*before, rows)
    # A tensor's len() is a function in Python, its shape is none.
    matrices, vectors, code = table.shape[0], x.numel() // columns, DTYPE_CODES[x.dtype]
    places = table.data_ptr(), x.data_ptr(), out.data_ptr()
    call(_multiply_table(), _SideBySide(*places, matrices, vectors, rows, code))
    return out


def _experts_cpu(table: Tensor, x: Tensor, ids: Tensor, weights: Tensor, activation: int) -> Tensor:
    x, ids, weights = x.contiguous(), ids.long().contiguous(), weights.float().contiguous()
    out = torch.empty_like(x)
    vectors = x.data_ptr(), DTYPE_CODES[x.dtype], x.shape[0]
    chosen = ids.data_ptr(), weights.data_ptr(), ids.shape[1]
    if call(_answer_table(), table.data_ptr(), table.shape[0], *vectors, *chosen, activation, out.data_ptr()):
        raise IndexError(f"experts {ids.tolist()} of a bank of {len(table)}")
    return out


_multiply = define(
    "multiply_vectors(Tensor table, Tensor x, int rows) -> Tensor",
    _multiply_cpu,
    lambda table, x, rows: x.new_empty(*x.shape[:-1], rows),
)
_experts = define(
    "answer_experts(Tensor table, Tensor x, Tensor ids, Tensor weights, int activation) -> Tensor",
    _experts_cpu,
    lambda table, x, ids, weights, activation: torch.empty_like(x),
)
