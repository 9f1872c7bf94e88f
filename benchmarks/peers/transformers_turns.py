"""Generate with transformers and bitsandbytes when asked to: `python transformers_turns.py CONFIG.json THREADS`.

Input and output as of lmx_turns.py, but `tg` and seconds alone; the model as in transformers_runner.py.
"""

import sys
import time

import torch
from serve import serve
from transformers_runner import forward, load


def main(config_file: str, threads: int) -> None:
    """Load, warm up, then serve."""
    torch.set_num_threads(threads)
    with torch.inference_mode():
        model = load(config_file)
        cache = forward(model, [1, 2, 3], None)

        def run(kind: str, count: int) -> dict[str, float]:
            nonlocal cache
            if kind != "tg":
                raise ValueError(f"no test {kind} here")
            cache = forward(model, [1], cache)  # as in lmx_turns.py
            start = time.perf_counter()
            for step in range(count):
                cache = forward(model, [2 + step], cache)
            return {"seconds": time.perf_counter() - start}

        serve(run)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
