"""A bank of experts on the card: which kernels answer for how many tokens, and with which tiles.

Two kernels a step. Ids of experts stay on the device and nothing waits for it, so that a step can be captured in a CUDA
graph. Importing this imports Triton: ask `lmx.core.gpu.launch.can_launch` first.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmx.core.gpu import experts_decode, experts_prefill
from lmx.core.gpu.launch import interpreted
from lmx.core.native.vector import ACTIVATION_CODES, Expert, Kind, StoredMatrix, wants_gradient

_PER_WORD = {Kind.FOUR_BIT: 8, Kind.INT8: 4, Kind.BF16: 2, Kind.F16: 2, Kind.F32: 1}
_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
# Up to so many tokens each choice of an expert is a product with a vector. With 8, experts are chosen twice on average
# where many are (Mixtral, DBRX) and once where few are (OLMoE); what is read again comes from the cache. Beyond, a
# weight should be decoded once for all its tokens.
_FEW_TOKENS = 8
# What the expert's inner vectors of a prompt may take, in elements: 128 MB of bf16. Longer prompts go through in parts.
_INNER_ELEMENTS = 1 << 26


@dataclass(frozen=True)
class _Format:
    """What all matrices of one part of a bank have in common."""

    kind: Kind
    block_size: int
    nested: bool
    code: tuple[float, ...]

    @classmethod
    def of(cls, matrix: StoredMatrix) -> "_Format":
        code = () if matrix.code is None else tuple(matrix.code.tolist())
        return cls(matrix.kind, matrix.block_size, matrix.nested_map is not None, code)

    @property
    def per_word(self) -> int:
        return _PER_WORD[self.kind]

    def constants(self) -> dict[str, int | bool]:
        return {
            "KIND": self.kind.value,
            "PER": self.per_word,
            "BLOCK": self.block_size,
            "NESTED": self.nested,
        }


@dataclass(frozen=True)
class VectorTile:
    """What one program of a product with a vector takes: so many rows, and words of each row at a time."""

    rows: int
    words: int
    warps: int

    @classmethod
    def choose(cls, programs: int, row_words: int, words_per_thread: int) -> "VectorTile":
        """The tile for `programs` rows in all (those of each chosen expert counted) of `row_words` words.

        What keeps memory busy is bytes in flight: 4.8 TB/s times some 700 ns is 3.4 MB, 25 KB on each of 132
        multiprocessors. A thread asks for 8 rows times two words at once (one of the gate and one of up, or two of
        down), 64 bytes, a warp for 2 KB; with the 128 registers that this takes, 16 warps fit a multiprocessor: 32 KB.
        Fewer rows would load and convert the vector's elements more often than that. So: 8 rows, and as many warps side
        by side on a row as give 16 a multiprocessor; where a row is too short for these, fewer rows.
        """
        rows, warps = 8, 1
        longest = triton.next_power_of_2(row_words)
        while programs // rows * warps < _WARPS_WANTED and warps < 8 and 32 * words_per_thread * warps < longest:
            warps *= 2
        while programs // rows * warps < _WARPS_WANTED and rows > 2:
            rows //= 2
        return cls(rows, min(longest, 32 * words_per_thread * warps), warps)


_WARPS_WANTED = 2048


@dataclass(frozen=True)
class MatrixTile:
    """What one program of a prompt's product takes: tokens of one expert, rows of its matrix, columns at a time."""

    tokens: int
    rows: int
    columns: int
    warps: int

    @classmethod
    def choose(cls, tokens_per_expert: float, rows: int, element_size: int) -> "MatrixTile":
        """The tile for so many tokens an expert on average, and at most so many rows.

        Decoding a weight costs a multiprocessor what some 64 products on its tensor cores do: the more tokens share
        it the better, up to where the sums (tokens * rows * 4 bytes, for gate and up twice) fill the registers. But
        tiles that most experts cannot fill are work for nothing.
        """
        tokens = min(128, max(16, triton.next_power_of_2(round(tokens_per_expert))))
        return cls(tokens, rows, 64 if element_size == 2 else 32, 8 if tokens * rows >= 64 * 128 else 4)


class DeviceBank:
    """The matrices of a bank of experts on one device, as its kernels are told of them; keeps their tensors alive.

    Each matrix is a tensor of its own, wherever the allocator put it (or a view of a stack, as in DBRX's files): no
    stride leads from one expert to the next. So the kernels read addresses from a table on the device, 40 bytes a
    matrix, which costs a program two loads that hit the cache. It is made once, and again when the module moves.
    """

    def __init__(self, experts: Sequence[Expert], activation: str) -> None:
        self._experts = tuple(experts)
        gate, _, down = experts[0]
        self.device, self.activation = gate.data.device, activation
        self.hidden, self.inner = gate.columns, gate.rows
        self._formats = _Format.of(gate), _Format.of(down)
        rows = [[_table_row(matrix) for matrix in expert] for expert in experts]
        self._table = torch.tensor(rows, dtype=torch.int64).to(self.device)  # [experts, 3, fields]
        self._codes = tuple(_codes(form, self.device) for form in self._formats)

    @classmethod
    def make(cls, experts: Sequence[Expert], activation: str) -> "DeviceBank | None":
        """The bank, or None where the kernels cannot read it: formats that vary within gate and up or within down,
        rows that are not whole words, several devices. Then torch serves.
        """
        pairs = {_Format.of(matrix) for gate, up, _ in experts for matrix in (gate, up)}
        downs = {_Format.of(down) for _, _, down in experts}
        matrices = [matrix for expert in experts for matrix in expert]
        devices = {tensor.device for matrix in matrices for tensor in _tensors(matrix)}
        if len(pairs) > 1 or len(downs) > 1 or len(devices) > 1 or not all(map(_is_readable, matrices)):
            return None
        return cls(experts, activation)

    def __reduce__(self) -> tuple[type["DeviceBank"], tuple[tuple[Expert, ...], str]]:
        """A copy has tensors of its own, and so addresses of its own."""
        return DeviceBank, (self._experts, self.activation)

    def can_take(self, x: Tensor, weights: Tensor) -> bool:
        """Whether x [tokens, hidden] is these kernels' business: it lies here, and no gradient is asked for."""
        fits = x.device == self.device and x.dtype in _DTYPES and x.ndim == 2 and x.shape[1] == self.hidden
        wanted = wants_gradient(x) or wants_gradient(weights)
        return fits and len(x) > 0 and not wanted and not torch.compiler.is_compiling()

    def answer(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """X [tokens, hidden], ids and weights [tokens, top_k] -> the weighted sums [tokens, hidden], in x's dtype.

        Sums are made in float32, a token's choices added in their order. The id of no expert cannot raise an error,
        because the host does not see it: its token becomes NaN.
        """
        x, ids, weights = x.contiguous(), ids.long().contiguous(), weights.float().contiguous()
        with torch.cuda.device_of(x):
            if len(x) <= _FEW_TOKENS:
                return self._answer_few(x, ids, weights)
            step = max(256, _INNER_ELEMENTS // (self.inner * ids.shape[1]))
            if len(x) <= step:
                return self._answer_many(x, ids, weights)
            parts = zip(x.split(step), ids.split(step), weights.split(step), strict=True)
            return torch.cat([self._answer_many(*part) for part in parts])

    def _answer_few(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        tokens, top_k = ids.shape
        inner, out = x.new_empty(tokens * top_k, self.inner), torch.empty_like(x)
        shape = {"HIDDEN": self.hidden, "INNER": self.inner, "EXPERTS": len(self._experts), "TOP_K": top_k}
        first, last = self._formats
        tile = VectorTile.choose(tokens * top_k * self.inner, self.hidden // first.per_word, 1)
        experts_decode.gate_and_up[(tokens * top_k, triton.cdiv(self.inner, tile.rows))](
            x, ids, self._table, self._codes[0], inner, **shape, ACTIVATION=ACTIVATION_CODES[self.activation],
            **first.constants(), ROWS=tile.rows, WORDS=tile.words, num_warps=tile.warps, enable_fp_fusion=True,
        )  # fmt: skip
        tile = VectorTile.choose(tokens * self.hidden, self.inner // last.per_word, 2)
        experts_decode.down_and_sum[(tokens, triton.cdiv(self.hidden, tile.rows))](
            inner, ids, weights, self._table, self._codes[1], out, **shape,
            **last.constants(), ROWS=tile.rows, WORDS=tile.words, num_warps=tile.warps, enable_fp_fusion=True,
        )  # fmt: skip
        return out

    def _answer_many(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        tokens, top_k = ids.shape
        choices, experts = tokens * top_k, len(self._experts)
        first, last = self._formats
        tile = MatrixTile.choose(choices / experts, 64, x.element_size())
        order, starts, first_tiles = sort_choices(ids, experts, tile.tokens)
        tiles = choices // tile.tokens + min(experts, choices)  # each expert's last tile may be partly empty
        inner = x.new_empty(choices, self.inner)
        shape = {"HIDDEN": self.hidden, "INNER": self.inner, "EXPERTS": experts}
        shape |= {"PADDED": triton.next_power_of_2(experts), "DTYPE": tl.float32 if interpreted() else _DTYPES[x.dtype]}
        experts_prefill.gate_and_up[(tiles, triton.cdiv(self.inner, tile.rows))](
            x, order, starts, first_tiles, self._table, self._codes[0], inner, **shape, TOP_K=top_k,
            ACTIVATION=ACTIVATION_CODES[self.activation], **first.constants(),
            TOKENS=tile.tokens, ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.warps,
            enable_fp_fusion=True,
        )  # fmt: skip
        answers = x.new_full((choices, self.hidden), torch.nan)  # what the id of no expert leaves
        tile = MatrixTile(tile.tokens, 128, tile.columns, 8 if tile.tokens > 32 else 4)
        experts_prefill.down[(tiles, triton.cdiv(self.hidden, tile.rows))](
            inner, order, weights, starts, first_tiles, self._table, self._codes[1], answers, **shape,
            **last.constants(), TOKENS=tile.tokens, ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.warps,
            enable_fp_fusion=True,
        )  # fmt: skip
        return answers.view(tokens, top_k, self.hidden).sum(1)


def sort_choices(ids: Tensor, experts: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort the choices of ids [tokens, top_k] by expert, and cut them into tiles of so many tokens of one expert.

    Returns the choices (token * top_k + number) in sorted order, where each expert's begin [experts + 1], and the
    number of its first tile [experts + 1]. All of it on the device, which is never waited for.
    """
    by_expert, order = ids.flatten().sort(stable=True)
    starts = torch.searchsorted(by_expert, torch.arange(experts + 1, device=ids.device))
    first_tiles = torch.zeros_like(starts)
    torch.cumsum((starts.diff() + tokens - 1) // tokens, 0, out=first_tiles[1:])
    return order, starts, first_tiles


def _tensors(matrix: StoredMatrix) -> list[Tensor]:
    stored = (matrix.data, matrix.absmax, matrix.nested_map, matrix.nested_absmax)
    return [tensor for tensor in stored if tensor is not None]


def _is_readable(matrix: StoredMatrix) -> bool:
    """Whether rows are whole words, at addresses that words may have, and places fit 32 bits."""
    per_word = _PER_WORD[matrix.kind]
    whole = matrix.columns % per_word == 0 and matrix.rows * matrix.columns // per_word < 1 << 31
    return whole and matrix.data.data_ptr() % 4 == 0 and all(tensor.is_contiguous() for tensor in _tensors(matrix))


def _table_row(matrix: StoredMatrix) -> list[int]:
    tensors = (matrix.data, matrix.absmax, matrix.nested_map, matrix.nested_absmax)
    offset = ctypes.c_int32.from_buffer(ctypes.c_float(matrix.nested_offset)).value
    return [*(0 if tensor is None else tensor.data_ptr() for tensor in tensors), offset]


def _codes(form: _Format, device: torch.device) -> Tensor:
    """What the 16 codes stand for, float32 [16]; for other formats nobody looks."""
    return torch.tensor(form.code or (0.0,) * 16, device=device)
