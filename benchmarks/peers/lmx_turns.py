"""Generate with lmx when asked to: `python lmx_turns.py HUB SCHEME HEAD DEPTH THREADS`, random weights.

Each line of its input is a number of tokens; the answer is one line of JSON: the seconds that they took, and the bytes
that one of them read.
"""

import json
import sys
from time import perf_counter

import torch

from lmx.core.bench import state_bytes_read
from lmx.core.native.pick import likeliest
from lmx.presets import build_dummy
from lmx.quant.footprint import measure_footprint

PROMPT = 512


@torch.no_grad()
def main(hub: str, scheme: str, head: str, depth: int, threads: int) -> None:
    """Load, read the tokens before, warm up, then serve."""
    torch.set_num_threads(threads)
    model = build_dummy(hub, scheme, head_scheme=head)
    state, empty = model.make_state(), model.make_state().layers
    for first in range(0, max(depth, 1), PROMPT):
        model(input_ids=_random(model.config.vocab_size, min(PROMPT, max(depth, 1) - first)), state=state)
    stepper = model.stepper(state)
    weights = measure_footprint(model).step_bytes

    def generate(count: int) -> float:
        steps = _random(model.config.vocab_size, count).split(1, dim=1)
        start = perf_counter()
        for ids in steps:
            likeliest(stepper.feed(ids)[0])
        return perf_counter() - start

    generate(3)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        seconds = generate(int(line))
        answer = {"seconds": seconds, "bytes": weights + state_bytes_read(empty, state.length)}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _random(vocabulary: int, count: int) -> torch.Tensor:
    return torch.randint(vocabulary, (1, count))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
