"""What of a step of generation is kernels and what is Python, for each family at its published width.

    python benchmarks/step_profile.py [--models allenai/OLMoE-1B-7B-0924] [--layers 16] [--threads 2]

Milliseconds a token, medians over steps, of models with random weights in NF4, an int8 head and so many layers:
`modules` calls the model as a user would, `noted` calls the kernels of the first step again, as `lmx generate` does. Of
the latter, `kernels` is the time in them, from the embedding to the logits, and `rest` is Python; `head` is the output
matrix by itself, one of the kernels; `saved` is what noting saves, in milliseconds and as a share of `modules`.
"""

import argparse
import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

import torch

from lmx.core.heads import CausalHead
from lmx.core.native.tape import Tape
from lmx.presets import PRESETS, build_dummy, preset

MODELS = (
    "allenai/OLMoE-1B-7B-0924",
    "mistralai/Mixtral-8x7B-v0.1",
    "tiiuae/falcon-mamba-7b",
    "google/recurrentgemma-2b",
)
PARTS = ("modules", "noted", "kernels", "head", "rest", "saved")
PROMPT, WARM_UP = 32, 4


def timed(work: Callable[[], object]) -> float:
    """Milliseconds of one call."""
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3


@contextmanager
def replays() -> Iterator[list[float]]:
    """Milliseconds of each replay of a tape while the context is open."""
    found: list[float] = []
    replay = Tape.replay

    def timed_replay(self: Tape) -> None:
        found.append(timed(lambda: replay(self)))

    Tape.replay = timed_replay  # type: ignore[method-assign]
    try:
        yield found
    finally:
        Tape.replay = replay  # type: ignore[method-assign]


@torch.no_grad()
def profile(name: str, layers: int, steps: int) -> dict[str, float]:
    """Milliseconds of each part of a step; the parts take turns, on two states of the same length."""
    config = dict(preset(name))
    key = "n_layers" if "n_layers" in config else "num_hidden_layers"
    model = build_dummy({**config, key: layers}, quantize="nf4", head_scheme="int8")
    prompt, ids = torch.randint(0, 1000, (1, PROMPT)), torch.randint(0, 1000, (1, 1))
    state, other = model.make_state(), model.make_state()
    for one in (state, other):
        model(prompt, state=one, logits_to_keep=1)
    hidden = torch.randn(1, 1, model.decoder.embed.embedding_dim, dtype=torch.bfloat16)
    stepper, head = model.stepper(state), model.head
    if not isinstance(head, CausalHead):
        raise TypeError(f"{name} has no output head")
    works: dict[str, Callable[[], object]] = {
        "modules": lambda: model(ids, state=other, logits_to_keep=1, output_router_logits=False),
        "noted": lambda: stepper.step(1),
        "head": lambda: head(hidden, model.decoder.embed.weight),
    }
    for _ in range(WARM_UP):
        for work in works.values():
            work()
    with replays() as kernels:
        turns = [{part: timed(work) for part, work in works.items()} for _ in range(steps)]
    if len(kernels) != steps:
        raise SystemExit(f"{name}: a step was not noted; this needs the compiled kernels")
    found = {part: median(turn[part] for turn in turns) for part in works} | {"kernels": median(kernels)}
    rest = median(turn["noted"] - taken for turn, taken in zip(turns, kernels, strict=True))
    saved = median(turn["modules"] - turn["noted"] for turn in turns)
    return found | {"rest": rest, "saved": saved}


def main() -> None:
    """Print a line for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=PRESETS, default=MODELS, metavar="ORG/NAME")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{f'ms a token, {options.layers} layers':30}" + "".join(f"{part:>9}" for part in PARTS))
    for name in options.models:
        found = profile(name, options.layers, options.steps)
        share = f"{found['saved'] / found['modules']:8.0%}"
        print(f"{name:30}" + "".join(f"{found[part]:9.2f}" for part in PARTS) + share, flush=True)
        gc.collect()


if __name__ == "__main__":
    main()
