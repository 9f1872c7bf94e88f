"""Many vectors times matrices, prompts through banks of experts, and dequantized rows."""

import torch
from torch import Tensor

from lmx.core.native.compiled import INT, LONG, POINTER, c_function, library
from lmx.core.native.operation import DTYPE_CODES, define
from lmx.core.native.tape import call
from lmx.core.native.temporary import temporary
from lmx.core.native.vector import ACTIVATION_CODES, ExpertTable, MatrixTable

_multiply_many = c_function("lmx_multiply_many", POINTER, POINTER, LONG, LONG, POINTER)
_experts_many = c_function(
    "lmx_experts_many", POINTER, LONG, POINTER, LONG, POINTER, POINTER, POINTER, LONG, INT, POINTER
)
_dequantize = c_function("lmx_dequantize", POINTER, LONG, LONG, INT, POINTER)


def has_panels() -> bool:
    """Whether this CPU multiplies bf16 without dequantizing a matrix first; elsewhere torch multiplies the rows."""
    found = library()
    return found is not None and bool(found.lmx_has_panels())


def multiply_many(table: MatrixTable, x: Tensor) -> Tensor:
    """X bf16 [vectors, columns] times the one matrix of a table -> [vectors, rows]; weights are rounded to bf16."""
    run = _multiply if torch.compiler.is_compiling() else _multiply_cpu
    out: Tensor = run(table.words, x, table.rows)
    return out


def answer_many(table: ExpertTable, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """`ExpertTable.answer` for any number of tokens of bf16; experts add up in the order of their numbers.

    Raises IndexError for the id of no expert.
    """
    run = _answer if torch.compiler.is_compiling() else _answer_cpu
    out: Tensor = run(table.words, x, ids, weights, ACTIVATION_CODES[table.activation])
    return out


def dequantize_rows(table: MatrixTable, first: int, last: int, dtype: torch.dtype) -> Tensor:
    """The rows first .. last of the one quantized matrix of a table: [last - first, columns], rounded as torch does."""
    out = torch.empty(last - first, table.columns, dtype=dtype)
    call(_dequantize(), table.words.data_ptr(), first, last, DTYPE_CODES[dtype], out.data_ptr())
    return out


def _multiply_cpu(table: Tensor, x: Tensor, rows: int) -> Tensor:
    if x.stride(-1) != 1:
        x = x.contiguous()
    out = temporary((len(x), rows), x.dtype)
    call(_multiply_many(), table.data_ptr(), x.data_ptr(), x.stride(0), len(x), out.data_ptr())
    return out


def _answer_cpu(table: Tensor, x: Tensor, ids: Tensor, weights: Tensor, activation: int) -> Tensor:
    x, weights, flat = x.contiguous(), weights.float().contiguous(), ids.flatten().long()
    if int(flat.min()) < 0 or int(flat.max()) >= len(table):
        raise IndexError(f"experts {int(flat.min())} to {int(flat.max())} of a bank of {len(table)}")
    order = flat.argsort(stable=True)  # [tokens * top_k], by expert
    counts = torch.bincount(flat, minlength=len(table))
    out = temporary(x.shape, x.dtype)
    inputs = table.data_ptr(), len(table), x.data_ptr(), len(x)
    chosen = order.data_ptr(), counts.data_ptr(), weights.data_ptr(), ids.shape[1]
    call(_experts_many(), *inputs, *chosen, activation, out.data_ptr())
    return out


_multiply = define(
    "multiply_many(Tensor table, Tensor x, int rows) -> Tensor",
    _multiply_cpu,
    lambda table, x, rows: x.new_empty(x.shape[0], rows),
)
_answer = define(
    "answer_experts_many(Tensor table, Tensor x, Tensor ids, Tensor weights, int activation) -> Tensor",
    _answer_cpu,
    lambda table, x, ids, weights, activation: torch.empty_like(x),
)
