"""lmx beside transformers with bitsandbytes on one NVIDIA GPU, at the published sizes, with random weights made there.

    python benchmarks/gpu.py

Each runs in a process of its own and in turn, round after round; figures are medians over the rounds, ratios medians
of the rounds' ratios. The share is of the card's own limits, measured in the same run: memory bandwidth for what a
token reads, the bf16 matrix peak for prompts. Needs the extras `dev` and `gpu`, a CUDA build of torch, and 29 GB of
device memory (a model that does not fit would be split with the CPU, and no figure of the card's). --tiny runs all of
it on the CPU with models of a few kilobytes, whose figures mean nothing.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from peers import rounds

from lmx.presets import preset

FAILED = 1
"""The exit code where lmx failed in a model; the others were measured."""

NO_CARD = 2
"""The exit code where there is no CUDA device, as lmx itself has it for `--device cuda`."""


@dataclass(frozen=True)
class Case:
    """A model in NF4. prompt: tokens of a prompt that is timed beside the model's matrix products alone, if any.

    target: what we want of an H200-class card (docs/performance.md). tiny: what --tiny changes in its config.
    """

    hub: str
    tests: tuple[str, ...]
    target: str
    tiny: Mapping[str, int]
    transformers: tuple[str, ...] = ()
    prompt: int | None = None


_SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 256}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
CASES = {
    "mixtral": Case(
        "mistralai/Mixtral-8x7B-v0.1",
        ("tg128",),
        "tg128 at 50% of the memory's bandwidth or more, in under 29 GB",
        {**_SMALL, **_HEADS},
    ),
    "falcon_mamba": Case(
        "tiiuae/falcon-mamba-7b",
        ("tg128", "pp2048"),
        "tg128 at 40% or more, and at least 8 times transformers; pp2048 within 3 times its matrix products' time",
        {**_SMALL, "expand": 2, "state_size": 8, "time_step_rank": 16},
        transformers=("tg16",),
        prompt=2048,
    ),
    "olmoe": Case(
        "allenai/OLMoE-1B-7B-0924",
        ("tg128",),
        "tg128 at 700 tokens/s or more",
        {**_SMALL, **_HEADS, "num_key_value_heads": 4, "num_experts": 8},
        transformers=("tg16",),
    ),
}


@dataclass(frozen=True)
class Run:
    """How the cases are run."""

    device: str
    threads: int
    folder: Path
    tiny: bool
    with_transformers: bool

    def config(self, case: Case) -> dict[str, object]:
        """The published config.json, or a tiny one of the same kind."""
        return {**preset(case.hub), **(case.tiny if self.tiny else {})}

    def model(self, name: str, case: Case) -> str:
        """What `lmx bench --dummy` is given."""
        if not self.tiny:
            return case.hub
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config(case)))
        return str(folder)

    def test(self, name: str) -> str:
        """A test as it is run: a 64th of it where all is tiny."""
        return f"{name[:2]}{max(2, int(name[2:]) // 64)}" if self.tiny else name


def main() -> int:
    """Run the rounds; print a table after each model."""
    options = _options()
    if not options.tiny and not torch.cuda.is_available():
        rounds.say("gpu.py: error: no CUDA device: this machine has none, or torch was built without CUDA")
        rounds.say("gpu.py: hint: run it on a machine with an NVIDIA GPU, or with --tiny to see that it runs")
        return NO_CARD
    with tempfile.TemporaryDirectory() as folder:
        device, failed = "cpu" if options.tiny else "cuda", False
        run = Run(device, options.threads, Path(folder), options.tiny, not options.alone)
        sys.stdout.write(f"{_machine(device)}\n\n")
        for name in options.cases:
            try:
                sys.stdout.write("\n".join(_measure(name, CASES[name], run, options.rounds)) + "\n\n")
            except SystemExit as error:  # of a program that failed: the other models are still worth measuring
                rounds.say(f"gpu.py: error: {name}: {error}")
                failed = True
            sys.stdout.flush()
    return FAILED if failed else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU, for each program")
    parser.add_argument("--alone", action="store_true", help="leave transformers out")
    parser.add_argument("--tiny", action="store_true", help="on the CPU, with tiny models: does this script run?")
    return parser.parse_args()


def _machine(device: str) -> str:
    name = torch.cuda.get_device_name(0) if device == "cuda" else "the CPU, tiny models: the figures mean nothing"
    return f"{name}, torch {torch.__version__}"


def _measure(name: str, case: Case, run: Run, count: int) -> Iterator[str]:
    """The rounds of one case, then its table."""
    figures, alone = rounds.Figures(), list[float]()
    for number in range(count):
        rounds.say(f"{name}: round {number + 1} of {count}")
        _round(name, case, run, figures, alone)
    yield from figures.table(f"{case.hub}, lmx --4bit on {run.device}")
    if alone:
        tokens = int(run.test(f"pp{case.prompt}")[2:])
        speeds = figures.speeds["lmx", f"pp{tokens}"]
        times = median(tokens / speed / seconds for speed, seconds in zip(speeds, alone, strict=True))
        took = f"{times:.2f} times its matrix products' {median(alone) * 1e3:.1f} ms"
        yield f"A prompt of {tokens:,} tokens takes {took}."
    yield f"Wanted on an H200-class card: {case.target}."


def _round(name: str, case: Case, run: Run, figures: rounds.Figures, alone: list[float]) -> None:
    options = ["--4bit", "--device", run.device, "--threads", str(run.threads)]
    for test in map(run.test, case.tests):
        figures.add_lmx(test, rounds.time_lmx(run.model(name, case), test, options))
    if case.transformers and run.with_transformers and rounds.TRANSFORMERS not in figures.failed:
        tests = [run.test(test) for test in case.transformers]
        try:
            speeds = rounds.time_transformers(run.config(case), tests, run.threads, run.device)
        except SystemExit as error:
            rounds.say(f"  left out: {error}")
            figures.fail(rounds.TRANSFORMERS)
            speeds = {}
        for test, speed in speeds.items():
            figures.add(rounds.TRANSFORMERS, test, speed)
    if case.prompt is not None:
        tokens = run.test(f"pp{case.prompt}")[2:]
        alone.append(rounds.run_on_config("products_runner.py", run.config(case), tokens, run.device)["seconds"])
        rounds.say(f"  its matrix products alone: {alone[-1] * 1e3:.1f} ms")


if __name__ == "__main__":
    sys.exit(main())
