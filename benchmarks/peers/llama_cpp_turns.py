"""Generate with llama.cpp when asked to: `python llama_cpp_turns.py FILE DEPTH THREADS ROOM`.

ROOM: how many tokens will be asked for at most. Input and output as of lmx_turns.py, without the bytes; llama.cpp as in
llama_cpp_runner.py.
"""

import json
import sys
import time

from llama_cpp_runner import decode, open_context, open_model, read


def main(path: str, depth: int, threads: int, room: int) -> None:
    """Load, read the tokens before, warm up, then serve."""
    context = open_context(open_model(path), threads, depth + room + 16)
    read(context, max(depth, 1))
    for token in (1, 2, 3):
        decode(context, [token])
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        start = time.perf_counter()
        for step in range(int(line)):
            decode(context, [1 + step])
        sys.stdout.write(json.dumps({"seconds": time.perf_counter() - start}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
