"""Compiles the kernels of the recurrent layers, as prompts, padded prompts and steps of published models call them."""

import torch
from gpu_compile import noted, print_compiled

from lmx.core.gpu import conv, norm, recurrent, rg_lru, scan


def bfloat16(*shape):
    return torch.empty(*shape, dtype=torch.bfloat16)


def falcon_mamba(rows, length, lengths):
    """A mixer of FalconMamba-7B."""
    inner, states, rank = 8192, 16, 256
    x, gate = bfloat16(rows, length, 2 * inner).chunk(2, -1)
    taps, per_channel = bfloat16(inner, 4), bfloat16(inner)
    recurrent.convolve(x, taps, per_channel, bfloat16(rows, inner, 3), lengths, True, True)
    sizes = rank, states, states
    _, B, C = recurrent.normalise_parts(bfloat16(rows, length, sum(sizes)), sizes, 1e-6).split(sizes, -1)
    weights = torch.empty(inner, states), B, C, per_channel
    state = torch.empty(rows, inner, states)
    recurrent.gated_scan(bfloat16(rows, length, inner), per_channel, x, gate, *weights, state, lengths, torch.empty)


def recurrent_gemma(rows, length, lengths):
    """A recurrent block of RecurrentGemma-2B."""
    width, heads, part = 2560, 10, 256
    x, gate = bfloat16(rows, length, width), bfloat16(rows, length, width) if lengths is None else None
    recurrent.convolve(x, bfloat16(width, 4), bfloat16(width), bfloat16(rows, width, 3), lengths, False, True)
    rest = torch.empty(width), torch.zeros(rows, length, dtype=torch.bool), torch.empty(rows, width), gate
    products = bfloat16(heads, rows * length, part), bfloat16(heads, rows * length, part)
    recurrent.recur(x, products, *rest, lengths, True, torch.empty)
    if length == 1:
        matrix = bfloat16(heads, part, part), bfloat16(heads, part)
        recurrent.recur_step(x, matrix, matrix, *rest, True)


if __name__ == "__main__":
    calls = []
    for layer in (falcon_mamba, recurrent_gemma):
        for rows, length, lengths in ((1, 2048, None), (2, 1000, torch.empty(2, dtype=torch.int64)), (1, 1, None)):
            form = f"{layer.__name__}, {rows} rows of {length}"
            with noted(form, conv, norm, rg_lru, scan) as made, torch.no_grad():
                layer(rows, length, lengths)
            calls += made
    print_compiled(calls)
