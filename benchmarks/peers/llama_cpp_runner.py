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
    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
    results = {}
    for test in tests:
        kind, _, depth = test.partition("@")
        results[test] = _time(model, threads, kind[:2], int(kind[2:]), int(depth or 0))
    sys.stdout.write(json.dumps(results) + "\n")


def _time(model: Any, threads: int, kind: str, count: int, depth: int) -> float:
    params = llama.llama_context_default_params()
    params.n_ctx = depth + count + 16
    params.n_batch = params.n_ubatch = BATCH
    params.n_threads = params.n_threads_batch = threads
    context = llama.llama_init_from_model(model, params)
    memory = llama.llama_get_memory(context)
    _decode(context, [1, 2, 3] if kind == "tg" else list(range(1, count + 1)))  # warm up
    llama.llama_memory_clear(memory, True)
    for start in range(0, depth, BATCH):
        _decode(context, list(range(1, min(BATCH, depth - start) + 1)))
    begin = time.perf_counter()
    if kind == "pp":
        _decode(context, list(range(1, count + 1)))
    else:
        for step in range(count):
            _decode(context, [1 + step])
    seconds = time.perf_counter() - begin
    llama.llama_free(context)
    return count / seconds


def _decode(context: Any, ids: list[int]) -> None:
    tokens = (llama.llama_token * len(ids))(*ids)
    batch = llama.llama_batch_get_one(tokens, ctypes.c_int32(len(ids)))
    if llama.llama_decode(context, batch):
        raise RuntimeError("llama.cpp could not decode")
    llama.llama_synchronize(context)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3].split(","))
