"""Compiles the kernels of banks of experts and int8 layers for a card that need not be there; prints what they need.

Run in a process of its own: `python compile_experts.py CAPABILITY...`. The calls are those of banks of published sizes;
in place of launching, each is compiled. The output is JSON.
"""

import torch
from gpu_compile import noted, print_compiled

from lmx.core.gpu import experts, experts_decode, experts_prefill, linear
from lmx.core.native.vector import Kind, StoredMatrix
from lmx.quant.codebook import four_bit_map

MIXTRAL, OLMOE = (2, 2, 4096, 14336), (64, 8, 2048, 1024)  # of Mixtral's eight experts two: their sizes are what counts
CASES = [
    ("nf4", MIXTRAL, (1, 24, 2048)),
    ("nf4 double", OLMOE, (1, 2048)),
    ("int8", MIXTRAL, (1, 2048)),
    ("bfloat16", OLMOE, (1, 2048)),
]


def matrix(form, rows, columns):
    """A matrix of numbers that nobody looks at."""
    size, blocks = rows * columns, rows * columns // 64
    if form == "bfloat16":
        return StoredMatrix.kept(torch.empty(rows, columns, dtype=torch.bfloat16))
    if form == "int8":
        return StoredMatrix(Kind.INT8, torch.empty(rows, columns, dtype=torch.int8), rows, columns, torch.empty(rows))
    packed, code = torch.empty(size // 2, 1, dtype=torch.uint8), four_bit_map("nf4")
    if form == "nf4":
        return StoredMatrix(Kind.FOUR_BIT, packed, rows, columns, torch.empty(blocks), code)
    scales, outer = torch.empty(blocks, dtype=torch.uint8), torch.empty(-(-blocks // 256))
    return StoredMatrix(Kind.FOUR_BIT, packed, rows, columns, scales, code, 64, torch.empty(256), outer, 0.1)


def calls_of(form, shape, prompts):
    """Every call of a kernel that this bank makes for so many tokens each."""
    count, top_k, hidden, inner = shape
    expert = (matrix(form, inner, hidden), matrix(form, inner, hidden), matrix(form, hidden, inner))
    bank = experts.DeviceBank.make([expert] * count, "silu")
    with noted(form, experts_decode, experts_prefill, linear) as calls:
        for tokens in prompts:
            ids = torch.arange(tokens * top_k).view(tokens, top_k) % count
            bank.answer(torch.zeros(tokens, hidden, dtype=torch.bfloat16), ids, torch.zeros(tokens, top_k))
        if form == "int8":
            linear.DeviceMatrix(expert[0]).multiply(torch.zeros(1, hidden, dtype=torch.bfloat16))
    return calls


if __name__ == "__main__":
    print_compiled([call for case in CASES for call in calls_of(*case)])
