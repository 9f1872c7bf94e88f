"""Run tests with lmx when asked to: `python lmx_turns.py HUB SCHEME HEAD DEPTH THREADS`, random weights.

Each line of its input is a test: `tg 4` generates tokens behind DEPTH others, `pp 512` reads a prompt. The answer is a
line of JSON: the seconds that it took, the bytes that one generated token read (0 of a prompt), the peak of memory.
"""

import sys
from time import perf_counter

import torch
from serve import serve

from lmx.core.bench import state_bytes_read
from lmx.core.generate import prompt_chunk_for
from lmx.core.memory import peak_memory_bytes
from lmx.core.model import AnyState, LanguageModel
from lmx.core.native.pick import likeliest
from lmx.presets import build_dummy
from lmx.quant.footprint import measure_footprint


@torch.no_grad()
def main(hub: str, scheme: str, head: str, depth: int, threads: int) -> None:
    """Load, read the tokens before, warm up, then serve."""
    torch.set_num_threads(threads)
    model = build_dummy(hub, scheme, head_scheme=head)
    state, empty = model.make_state(), model.make_state().layers
    read(model, state, max(depth, 1))
    stepper = model.stepper(state)
    weights = measure_footprint(model).step_bytes

    def generate(count: int) -> float:
        token_ids = _random(model, count + 1)[0].tolist()
        likeliest(stepper.step(token_ids[0]))  # what another program left in the caches is none of this
        start = perf_counter()
        for token_id in token_ids[1:]:
            likeliest(stepper.step(token_id))
        return perf_counter() - start

    def run(kind: str, count: int) -> dict[str, float]:
        if kind == "tg":
            seconds, read_bytes = generate(count), weights + state_bytes_read(empty, state.length)
        else:
            seconds, read_bytes = read(model, model.make_state(), count), 0.0
        return {"seconds": seconds, "bytes": read_bytes, "peak_memory": peak_memory_bytes()}

    generate(3)
    serve(run)


def read(model: LanguageModel, state: AnyState, tokens: int) -> float:
    """Read random tokens as `lmx generate` reads a prompt, and choose the next one; the seconds that it took."""
    chunk, start = prompt_chunk_for(model.device), perf_counter()
    for first in range(0, tokens, chunk):
        output = model(input_ids=_random(model, min(chunk, tokens - first)), state=state, logits_to_keep=1)
        likeliest(output.logits[0, -1])
    return perf_counter() - start


def _random(model: LanguageModel, count: int) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (1, count))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
