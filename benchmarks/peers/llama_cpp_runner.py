"""Time llama.cpp on a GGUF: `python llama_cpp_runner.py FILE THREADS TESTS`, TESTS as `pp512,tg128,tg64@3968`.

Prints one JSON object, test -> tokens a second. Its best path: memory-mapped, repacked weights (its default), flash
attention chosen by itself, the whole prompt in one micro-batch. Needs llama-cpp-python compiled for this machine.
"""

import ctypes
import json
import sys
import time
from typing import Any

import llama_cpp as llama

BATCH = 512


def main(path: str, threads: int, tests: list[str]) -> None:
    """Load, warm up, run every test once, print."""
    model = open_model(path)
    results = {}
    for test in tests:
        kind, _, depth = test.partition("@")
        results[test] = _time(model, threads, kind[:2], int(kind[2:]), int(depth or 0))
    sys.stdout.write(json.dumps(results) + "\n")


def open_model(path: str) -> Any:
    """Load a GGUF."""
    llama.llama_backend_init()
    return llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())


def open_context(model: Any, threads: int, tokens: int) -> Any:
    """A conversation with room for so many tokens."""
    params = llama.llama_context_default_params()
    params.n_ctx = tokens
    params.n_batch = params.n_ubatch = BATCH
    params.n_threads = params.n_threads_batch = threads
    return llama.llama_init_from_model(model, params)


def read(context: Any, tokens: int) -> None:
    """Read a prompt of so many tokens."""
    for start in range(0, tokens, BATCH):
        decode(context, list(range(1, min(BATCH, tokens - start) + 1)))


def decode(context: Any, ids: list[int]) -> None:
    """Feed some tokens, and wait until their logits are there."""
    tokens = (llama.llama_token * len(ids))(*ids)
    batch = llama.llama_batch_get_one(tokens, ctypes.c_int32(len(ids)))
    if llama.llama_decode(context, batch):
        raise RuntimeError("llama.cpp could not decode")
    llama.llama_synchronize(context)


def _time(model: Any, threads: int, kind: str, count: int, depth: int) -> float:
    context = open_context(model, threads, depth + count + 16)
    memory = llama.llama_get_memory(context)
    decode(context, [1, 2, 3] if kind == "tg" else list(range(1, count + 1)))  # warm up
    llama.llama_memory_clear(memory, True)
    read(context, depth)
    begin = time.perf_counter()
    if kind == "pp":
        decode(context, list(range(1, count + 1)))
    else:
        for step in range(count):
            decode(context, [1 + step])
    seconds = time.perf_counter() - begin
    llama.llama_free(context)
    return count / seconds


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3].split(","))
