"""Run tests with llama.cpp when asked to: `python llama_cpp_turns.py FILE DEPTH THREADS ROOM`.

ROOM: how many tokens will be generated at most. Input and output as of lmx_turns.py, but seconds alone. Its best path:
memory-mapped, repacked weights (its default), flash attention chosen by itself, the whole prompt in one micro-batch.
Needs llama-cpp-python compiled for this machine.
"""

import ctypes
import sys
import time
from typing import Any

import llama_cpp as llama
from serve import serve

BATCH = 512


def main(path: str, depth: int, threads: int, room: int) -> None:
    """Load, read the tokens before, warm up, then serve."""
    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
    context, other = _open_context(model, threads, depth + room + 16), _open_context(model, threads, BATCH + 16)
    _read(context, max(depth, 1))
    for _ in range(3):
        _decode(context, [1])

    def run(kind: str, count: int) -> dict[str, float]:
        if kind == "tg":
            _decode(context, [1])  # as in lmx_turns.py
            start = time.perf_counter()
            for step in range(count):
                _decode(context, [2 + step])
        else:
            llama.llama_memory_clear(llama.llama_get_memory(other), True)
            start = time.perf_counter()
            _read(other, count)
        return {"seconds": time.perf_counter() - start}

    serve(run)


def _open_context(model: Any, threads: int, tokens: int) -> Any:
    """A conversation with room for so many tokens."""
    params = llama.llama_context_default_params()
    params.n_ctx = tokens
    params.n_batch = params.n_ubatch = BATCH
    params.n_threads = params.n_threads_batch = threads
    return llama.llama_init_from_model(model, params)


def _read(context: Any, tokens: int) -> None:
    for start in range(0, tokens, BATCH):
        _decode(context, list(range(1, min(BATCH, tokens - start) + 1)))


def _decode(context: Any, ids: list[int]) -> None:
    """Feed some tokens, and wait until their logits are there."""
    tokens = (llama.llama_token * len(ids))(*ids)
    batch = llama.llama_batch_get_one(tokens, ctypes.c_int32(len(ids)))
    if llama.llama_decode(context, batch):
        raise RuntimeError("llama.cpp could not decode")
    llama.llama_synchronize(context)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
