"""What the tests of the CPU kernels share: the paths, the matrices, and what is right."""

import torch

from lmx.quant.four_bit import FourBit, dequantize_4bit, quantize_4bit
from lmx.quant.int8 import dequantize_int8, quantize_int8

PATHS = ("amx", "avx512", "avx2", "neon", "portable")
QUANTIZERS = {
    "nf4": lambda w: quantize_4bit(w, "nf4"),
    "nf4, short blocks": lambda w: quantize_4bit(w, "nf4", 32),
    "nf4, long blocks": lambda w: quantize_4bit(w, "nf4", 512),
    "nf4 double": lambda w: quantize_4bit(w, "nf4", double_quant=True),
    "fp4 double": lambda w: quantize_4bit(w, "fp4", 128, double_quant=True),
    "int8": quantize_int8,
    "nf4 of bfloat16": lambda w: narrowed(w, 64),
    "nf4 of bfloat16, short blocks": lambda w: narrowed(w, 32),
    "nf4 of bfloat16, long blocks": lambda w: narrowed(w, 512),
    "bfloat16": lambda w: w.bfloat16(),
    "float16": lambda w: w.half(),
    "float32": lambda w: w,
}


def narrowed(weight, block_size):
    """With scales in bfloat16."""
    q = quantize_4bit(weight.bfloat16(), "nf4", block_size).narrowed()
    assert q.absmax.dtype == torch.bfloat16
    return q


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def values(q):
    """In plain torch."""
    if isinstance(q, torch.Tensor):
        return q.double()
    dequantize = dequantize_4bit if isinstance(q, FourBit) else dequantize_int8
    return dequantize(q, torch.float32).double()


def relative_error(got, expected):
    return ((got.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()
