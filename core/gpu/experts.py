"""A bank of experts on the card: which kernels answer for how many tokens, and with which tiles.

Two kernels a step. Ids of experts stay on the device and nothing waits for it, so that a step can be captured in a CUDA
graph. Importing this imports Triton: ask `lmx.core.gpu.launch.can_launch` first.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmx.core.gpu import experts_decode, experts_prefill
from lmx.core.gpu.launch import interpreted
from lmx.core.gpu.table import FEW_VECTORS, Format, VectorTile, code_values, is_readable, table_row, tensors_of
from lmx.core.native.vector import ACTIVATION_CODES, Expert, wants_gradient

_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
# What the expert's inner vectors of a prompt may take, in elements: 128 MB of bf16. Longer prompts go through in parts.
_INNER_ELEMENTS = 1 << 26


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
        self._formats = Format.of(gate), Format.of(down)
        rows = [[table_row(matrix) for matrix in expert] for expert in experts]
        self._table = torch.tensor(rows, dtype=torch.int64).to(self.device)  # [experts, 3, fields]
        self._codes = tuple(code_values(form, self.device) for form in self._formats)

    @classmethod
    def make(cls, experts: Sequence[Expert], activation: str) -> "DeviceBank | None":
        """The bank, or None where the kernels cannot read it: formats that vary within gate and up or within down,
        rows that are not whole words, several devices. Then torch serves.
        """
        pairs = {Format.of(matrix) for gate, up, _ in experts for matrix in (gate, up)}
        downs = {Format.of(down) for _, _, down in experts}
        matrices = [matrix for expert in experts for matrix in expert]
        devices = {tensor.device for matrix in matrices for tensor in tensors_of(matrix)}
        if len(pairs) > 1 or len(downs) > 1 or len(devices) > 1 or not all(map(is_readable, matrices)):
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
            if len(x) <= FEW_VECTORS:
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
