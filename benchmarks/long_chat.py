"""A chat of a thousand turns with a recurrent model: what a turn costs in the beginning and in the end.

    python benchmarks/long_chat.py [--turns 1000]

A small FalconMamba of random weights talks through the tokenizer and template of the demo, with a bound of 1 MiB for
copies of its state. Prints the CPU time of a turn in the first and in the last tenth, and what is kept.
"""

import argparse
import time
from statistics import median

import torch

from lmx.api import demo_path
from lmx.core.answer import Finished
from lmx.core.loader import build
from lmx.core.sampling import Sampling
from lmx.core.session import ChatSession
from lmx.core.text.engine import TextEngine

BOUND = 1 << 20
QUESTIONS = ("My name is Ada.", "What is 3 + 4?", "What is the capital of Japan?", "Hello")
CONFIG: dict[str, object] = {
    "model_type": "falcon_mamba",
    "vocab_size": 1536,
    "hidden_size": 128,
    "intermediate_size": 256,
    "state_size": 16,
    "time_step_rank": 8,
    "num_hidden_layers": 3,
}


def talk(session: ChatSession, turns: int) -> list[float]:
    """Milliseconds of CPU time, turn by turn."""
    spent = []
    for turn in range(turns):
        start = time.process_time()
        finished = list(session.ask(QUESTIONS[turn % len(QUESTIONS)]))[-1]
        spent.append((time.process_time() - start) * 1e3)
        if not isinstance(finished, Finished) or finished.computed_prompt_tokens >= 64:
            raise SystemExit(f"turn {turn + 1} read again what was read before: {finished}")
    return spent


def main() -> None:
    """Talk, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = build(CONFIG).eval()
    model.reset_parameters()
    with TextEngine.open(demo_path(), chat=True) as engine:
        session = ChatSession(model, engine, Sampling(), max_new_tokens=12, snapshot_bytes=BOUND)
        spent = talk(session, options.turns)
        tenth = max(1, options.turns // 10)
        parameters = sum(weight.numel() for weight in model.parameters())
        print(f"{parameters:,} parameters, {options.turns} turns, {session.context_used:,} tokens in the end")
        print(f"ms a turn: {median(spent[:tenth]):.1f} in the first tenth, {median(spent[-tenth:]):.1f} in the last")
        print(f"copies of the state: {session.snapshot_bytes / 1e6:.2f} MB of {BOUND / 1e6:.2f} MB allowed")


if __name__ == "__main__":
    main()
