"""Compiles the kernels between a step's products, as the published models call them."""

import torch
from gpu_compile import noted, print_compiled

from lmx.core.gpu import heads, norm, router, stream

# hidden, heads, key heads, width of a head, of which turn, experts, chosen, slots
MODELS = {
    "Mixtral-8x7B": (4096, 32, 8, 128, 128, 8, 2, 512),
    "OLMoE": (2048, 16, 16, 128, 128, 64, 8, 256),
    "DBRX": (6144, 48, 8, 128, 128, 16, 4, 512),
    "RecurrentGemma-2B": (2560, 10, 1, 256, 128, 2, 1, 2048),
}


def bfloat16(*shape):
    return torch.empty(*shape, dtype=torch.bfloat16)


def step(hidden, query, kv, width, turned, experts, top_k, slots):
    for x in (bfloat16(1, 1, hidden), torch.empty(1, 1, hidden)):
        for offset in (False, True):
            stream.rms_norm(x, bfloat16(hidden), 1e-5, offset)
    for normalize in (None, 1.0):
        stream.route(bfloat16(1, experts), top_k, normalize)
    buffers = bfloat16(1, kv, slots, width), bfloat16(1, kv, slots, width)
    rotary = torch.empty(1, 1, 1, turned // 2), torch.empty(1, 1, 1, turned // 2)
    tensors = bfloat16(1, 1, query * width), bfloat16(1, 1, kv * width), bfloat16(1, 1, kv * width)
    for limit in (None, 8.0):
        stream.keep_heads(*tensors, rotary, torch.zeros(1, dtype=torch.int64), *buffers, limit)


if __name__ == "__main__":
    calls = []
    for name, sizes in MODELS.items():
        with noted(name, heads, norm, router) as made, torch.no_grad():
            step(*sizes)
        calls += made
    print_compiled(calls)
