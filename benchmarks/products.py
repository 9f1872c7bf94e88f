"""One matrix times a few or many vectors: lmx's kernels beside torch's and bitsandbytes' in the same run.

    python benchmarks/products.py [--threads 2] [--rows 14336] [--columns 4096] [--vectors 1 8 64 512]
    python benchmarks/products.py --threads 1 --rows 1024 --vectors 1

Milliseconds, medians of rounds in which all take turns, so that no matrix stays in the cache; one of less than 32 MB
is multiplied several times a turn and does stay there. For one vector, GB/s are the bytes of the matrix over that time;
the last line is the memory bandwidth of this run.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial

import bitsandbytes
import torch
from torch import Tensor
from torch.nn.functional import linear as torch_linear

from lmx.core.ceilings import measure_ceilings
from lmx.core.layers.linear import linear
from lmx.core.native.compiled import kernel_path
from lmx.quant.four_bit import quantize_4bit
from lmx.quant.int8 import quantize_int8
from lmx.quant.matmul import tiled_product
from lmx.quant.modules import QuantLinear

Product = Callable[[Tensor], Tensor]
CACHED_BYTES = 32 << 20


def products(weight: Tensor) -> dict[str, tuple[Product, int]]:
    """Every way to multiply by a bfloat16 matrix [rows, columns], and the bytes that it reads of it."""
    nf4, int8, plain = quantize_4bit(weight, "nf4"), quantize_int8(weight), weight.nbytes
    held, double = nf4.narrowed(), quantize_4bit(weight, "nf4", double_quant=True)
    return {
        "NF4": (QuantLinear(held), held.nbytes),
        "NF4, double": (QuantLinear(double), double.nbytes),
        "NF4, by torch": (partial(tiled_product, nf4), nf4.nbytes),
        "NF4, bitsandbytes": (_bitsandbytes(weight), nf4.nbytes),
        "int8": (QuantLinear(int8), int8.weight.nbytes),
        "bf16": (partial(linear, weight=weight), plain),
        "bf16, by torch": (partial(torch_linear, weight=weight), plain),
    }


def _bitsandbytes(weight: Tensor) -> Product:
    """Its layer in evaluation mode, which it packs anew for CPUs with AVX-512 BF16."""
    layer = bitsandbytes.nn.modules.Linear4bit(
        weight.shape[1], weight.shape[0], bias=False, compute_dtype=weight.dtype, quant_type="nf4"
    )
    layer.weight = bitsandbytes.nn.modules.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4")
    multiply: Product = layer.to("cpu").eval()
    return multiply


def seconds(product: Product, x: Tensor, repeats: int) -> float:
    """The wall time of one call, of several in a row."""
    start = time.perf_counter()
    for _ in range(repeats):
        product(x)
    return (time.perf_counter() - start) / repeats


def time_all(ways: dict[str, tuple[Product, int]], x: Tensor, rounds: int) -> dict[str, float]:
    """Seconds of each way; the first round warms up."""
    repeats = {name: max(1, CACHED_BYTES // nbytes) for name, (_, nbytes) in ways.items()}
    turns = [{name: seconds(way, x, repeats[name]) for name, (way, _) in ways.items()} for _ in range(rounds + 1)]
    return {name: statistics.median(turn[name] for turn in turns[1:]) for name in ways}


@torch.inference_mode()
def main() -> None:
    """Print a line for each number of vectors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rows", type=int, default=14336)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--vectors", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    ways = products((torch.randn(options.rows, options.columns) * 0.02).bfloat16())
    print(f"{options.rows} x {options.columns}, {options.threads} threads, kernels: {kernel_path()}")
    print(f"{'ms, vectors':12}" + "".join(f"{name:>19}" for name in ways))
    for count in options.vectors:
        found = time_all(ways, torch.randn(count, options.columns, dtype=torch.bfloat16), options.rounds)
        print(f"{count:<12}" + "".join(f"{1e3 * found[name]:19.3f}" for name in ways), flush=True)
        if count == 1:
            speeds = {name: nbytes / found[name] / 1e9 for name, (_, nbytes) in ways.items()}
            print(f"{'GB/s':12}" + "".join(f"{speeds[name]:19.1f}" for name in ways))
    print(f"memory bandwidth: {measure_ceilings(torch.device('cpu')).bandwidth / 1e9:.1f} GB/s")


if __name__ == "__main__":
    main()
