"""How many million parameters a second are quantized and dequantized, beside bitsandbytes in the same run.

    python benchmarks/quantize_kernels.py [--threads 2] [--rows 14336] [--columns 4096]

Both do the same work on the same bfloat16 matrix, take turns, and the median of the rounds counts. The NF4 and int8
results are compared bit by bit before anything is timed.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import bitsandbytes.functional as bnb
import torch

from lmx.quant.four_bit import quantize_4bit
from lmx.quant.int8 import quantize_int8
from lmx.quant.matmul import dequantize
from lmx.quant.modules import QuantLinear

Work = Callable[[], object]


def tasks(x: torch.Tensor) -> dict[str, tuple[Work, Work]]:
    """Each task as lmx and as bitsandbytes do it."""
    nf4, double, int8 = quantize_4bit(x, "nf4"), quantize_4bit(x, "nf4", double_quant=True), quantize_int8(x)
    packed, state = bnb.quantize_4bit(x, quant_type="nf4", blocksize=64)
    weight, scales, _ = bnb.int8_vectorwise_quant(x.half())
    assert torch.equal(nf4.packed, packed)
    assert torch.equal(nf4.absmax, state.absmax)
    assert torch.equal(int8.weight, weight)
    assert torch.equal(int8.absmax, scales)
    return {
        "NF4 quantize": (lambda: quantize_4bit(x, "nf4"), lambda: bnb.quantize_4bit(x, quant_type="nf4", blocksize=64)),
        "NF4 quantize, double": (
            lambda: quantize_4bit(x, "nf4", double_quant=True),
            lambda: bnb.quantize_4bit(x, quant_type="nf4", blocksize=64, compress_statistics=True),
        ),
        "FP4 quantize": (lambda: quantize_4bit(x, "fp4"), lambda: bnb.quantize_4bit(x, quant_type="fp4", blocksize=64)),
        "int8 quantize": (lambda: quantize_int8(x), lambda: bnb.int8_vectorwise_quant(x.half())),
        "NF4 dequantize": (lambda: dequantize(nf4), lambda: bnb.dequantize_4bit(packed, state)),
        "NF4 dequantize, double": (lambda: dequantize(double), lambda: bnb.dequantize_4bit(packed, state)),
        "int8 dequantize": (
            lambda: dequantize(int8),
            lambda: bnb.int8_vectorwise_dequant(weight, scales).bfloat16(),
        ),
        **{f"NF4 product with {m}": products(x, m) for m in (1, 64)},
    }


def products(x: torch.Tensor, vectors: int) -> tuple[Work, Work]:
    """The layer's product, and dequantizing with bitsandbytes and multiplying."""
    layer, inputs = QuantLinear(quantize_4bit(x, "nf4")), torch.randn(vectors, x.shape[1], dtype=x.dtype)
    packed, state = bnb.quantize_4bit(x, quant_type="nf4", blocksize=64)
    return lambda: layer(inputs), lambda: torch.nn.functional.linear(inputs, bnb.dequantize_4bit(packed, state))


def seconds(work: Work) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Print a line for each task, then all of it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=14336)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    x = (torch.randn(options.rows, options.columns) * 0.02).bfloat16()
    results = {}
    print(f"{'million parameters a second':28}{'lmx':>8}{'bitsandbytes':>14}{'ratio':>8}")
    for name, (ours, theirs) in tasks(x).items():
        rounds = [(seconds(ours), seconds(theirs)) for _ in range(options.rounds + 1)][1:]
        rates = [x.numel() / 1e6 / statistics.median(times) for times in zip(*rounds, strict=True)]
        results[name] = {"lmx": round(rates[0], 1), "bitsandbytes": round(rates[1], 1)}
        print(f"{name:28}{rates[0]:8.0f}{rates[1]:14.0f}{rates[0] / rates[1]:8.2f}", flush=True)
    print(
        json.dumps({"threads": options.threads, "shape": list(x.shape), "torch": torch.__version__, "rates": results})
    )


if __name__ == "__main__":
    main()
