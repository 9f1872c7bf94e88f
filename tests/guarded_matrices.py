"""Multiplies matrices whose bytes and scales end where memory that nobody may read begins: one byte more is the end."""

import ctypes
import mmap
import sys

import torch
from native_cases import PATHS, QUANTIZERS, random

from lmx.core.native.compiled import forced_path
from lmx.core.native.matrix import dequantize_rows, has_panels, multiply_many
from lmx.core.native.vector import MatrixTable, StoredMatrix
from lmx.quant.native import stored_matrix

SHAPES = ((37, 192), (5, 100), (7, 33), (1, 1), (11, 1280), (67, 2048), (13, 6144), (66, 256))
PAGE = mmap.PAGESIZE
PROT_NONE = 0


def guarded(x: torch.Tensor) -> torch.Tensor:
    """The same numbers right in front of a page that cannot be read."""
    pages = -(-x.nbytes // PAGE)
    memory = mmap.mmap(-1, (pages + 1) * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + pages * PAGE), ctypes.c_size_t(PAGE), PROT_NONE):
        raise OSError("mprotect failed")
    place = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=pages * PAGE - x.nbytes)
    return place.view(x.shape).copy_(x)


def main() -> None:
    """All paths of this CPU, kinds of matrices and shapes; with `over`, one row more than there is."""
    beyond = sys.argv[1:] == ["over"]
    for path in PATHS:
        with forced_path(path) as there:
            for name, quantizer in QUANTIZERS.items() if there else ():
                for shape in SHAPES:
                    matrix = stored_matrix(quantizer(random(*shape)))
                    assert matrix is not None, name
                    fields = {**vars(matrix), "data": guarded(matrix.data), "rows": matrix.rows + beyond}
                    if matrix.absmax is not None:
                        fields["absmax"] = guarded(matrix.absmax)
                    multiply_all(MatrixTable([StoredMatrix(**fields)]), shape[1], matrix.code is not None)


def multiply_all(table: MatrixTable, columns: int, four_bit: bool) -> None:
    """By few vectors and by many, and its rows by themselves."""
    for dtype in (torch.float32, torch.bfloat16):
        for vectors in (1, 2, 4):
            table.multiply(random(vectors, columns).to(dtype))
    if has_panels():
        multiply_many(table, random(40, columns).bfloat16())
    if four_bit:
        dequantize_rows(table, 0, table.rows, torch.bfloat16)


if __name__ == "__main__":
    main()
