"""What kernels are told of stored matrices, and the tiles of their products with vectors."""

import ctypes
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from lmx.core.native.vector import Kind, StoredMatrix

# Up to so many tokens are products with vectors, each token's choice of an expert one. With 8, experts are chosen twice
# on average in Mixtral and DBRX and once in OLMoE; what is read again comes from the cache. Beyond, a weight should be
# decoded once for all its tokens.
FEW_VECTORS = 8
_WARPS_WANTED = 2048  # 16 on each of the 132 multiprocessors of an H100 or H200
_PER_WORD = {Kind.FOUR_BIT: 8, Kind.INT8: 4, Kind.BF16: 2, Kind.F16: 2, Kind.F32: 1}


@dataclass(frozen=True)
class Format:
    """How a matrix is stored; those of one part of a bank have it in common."""

    kind: Kind
    block_size: int
    nested: bool
    code: tuple[float, ...]

    @classmethod
    def of(cls, matrix: StoredMatrix) -> "Format":
        """That of a matrix."""
        code = () if matrix.code is None else tuple(matrix.code.tolist())
        return cls(matrix.kind, matrix.block_size, matrix.nested_map is not None, code)

    @property
    def per_word(self) -> int:
        """Values in 32 bits."""
        return _PER_WORD[self.kind]

    def constants(self) -> dict[str, int | bool]:
        """What the kernels of `lmx.core.gpu.words` are compiled for."""
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


def tensors_of(matrix: StoredMatrix) -> list[Tensor]:
    """The tensors that hold a matrix."""
    stored = (matrix.data, matrix.absmax, matrix.nested_map, matrix.nested_absmax)
    return [tensor for tensor in stored if tensor is not None]


def is_readable(matrix: StoredMatrix) -> bool:
    """Whether rows are whole words, at addresses that words may have, and places fit 32 bits."""
    per_word = _PER_WORD[matrix.kind]
    whole = matrix.columns % per_word == 0 and matrix.rows * matrix.columns // per_word < 1 << 31
    return whole and matrix.data.data_ptr() % 4 == 0 and all(tensor.is_contiguous() for tensor in tensors_of(matrix))


def table_row(matrix: StoredMatrix) -> list[int]:
    """What the kernels read of a matrix: addresses, and the bits of the offset."""
    tensors = (matrix.data, matrix.absmax, matrix.nested_map, matrix.nested_absmax)
    offset = ctypes.c_int32.from_buffer(ctypes.c_float(matrix.nested_offset)).value
    return [*(0 if tensor is None else tensor.data_ptr() for tensor in tensors), offset]


def code_values(form: Format, device: torch.device) -> Tensor:
    """What the 16 codes stand for, float32 [16]; for other formats nobody looks."""
    return torch.tensor(form.code or (0.0,) * 16, device=device)
