"""What the recurrences cost inside of their layers: `python benchmarks/scan.py`.

FalconMamba's mixer at 7B width and RecurrentGemma's recurrent block at 2B width, the models' own modules with random
weights, in float32. For each: the time that the layer spends in its recurrence, its convolution and its matrix products
over one prompt, and the peak memory of a long prompt above the layer's weights, in one pass and in chunks, each in a
process of its own. Keep other work off the cores: a recurrence is many short calls, and suffers from it most.
`--json` prints one object a layer instead.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SHARE_LIMIT = 15.0  # percent of the layer's time, at 512 tokens
MEMORY_LIMIT = 2.0  # GB above the layer's weights, at 8,192 tokens
LAYERS = ("falcon-mamba", "recurrent-gemma")


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", choices=[*LAYERS, "all"], default="all")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--tokens", type=int, default=512, help="prompt of the timing")
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--memory-tokens", type=int, default=8192, help="prompt of the memory measurement")
    parser.add_argument("--chunk", type=int, default=512, help="tokens a call, in the chunked memory measurement")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--measure-memory", type=int, metavar="CHUNK", help=argparse.SUPPRESS)
    return parser.parse_args()


_arguments = options() if __name__ == "__main__" else None
if _arguments is not None:
    os.environ["OMP_NUM_THREADS"] = str(_arguments.threads)

import torch  # noqa: E402  (after the thread count is set)
from torch import Tensor  # noqa: E402

from lmx.core.call import AttentionCall, Record  # noqa: E402
from lmx.core.layers import rg_lru  # noqa: E402
from lmx.core.layers.attention import Visibility  # noqa: E402
from lmx.core.loader import build  # noqa: E402
from lmx.core.models import falcon_mamba, recurrent_gemma  # noqa: E402
from lmx.core.recurrent_state import GriffinState, MambaState  # noqa: E402
from lmx.core.state import Span  # noqa: E402

# Functions that the layers call, those of the CPU's kernels or of torch: the time in them is a part's time.
PARTS: dict[str, list[tuple[Any, str]]] = {
    "recurrence": [
        *((falcon_mamba, "gated_scan"), (falcon_mamba, "selective_scan")),
        *((rg_lru, "recur"), (rg_lru, "rg_lru")),
    ],
    "convolution": [(falcon_mamba, "causal_conv"), (recurrent_gemma, "causal_conv")],
    "products": [(torch.nn.functional, "linear"), (torch, "baddbmm")],
}

# The published widths; one layer, and hardly a vocabulary.
CONFIGS: dict[str, dict[str, object]] = {
    "falcon-mamba": {
        "model_type": "falcon_mamba",
        "vocab_size": 8,
        "hidden_size": 4096,
        "intermediate_size": 8192,
        "state_size": 16,
        "time_step_rank": 256,
        "num_hidden_layers": 1,
    },
    "recurrent-gemma": {
        "model_type": "recurrent_gemma",
        "vocab_size": 8,
        "hidden_size": 2560,
        "intermediate_size": 2,
        "lru_width": 2560,
        "num_attention_heads": 10,
        "num_hidden_layers": 1,
        "block_types": ["recurrent"],
    },
}


@dataclass
class Layer:
    """A layer of a model, and how to call it with a state of its own."""

    title: str
    hidden: int
    run: Callable[[Tensor, Any], Tensor]
    empty_state: Callable[[], MambaState | GriffinState]


def make(name: str) -> Layer:
    """Build the named layer with the same random weights each time."""
    torch.manual_seed(0)
    model = build(CONFIGS[name]).eval()
    model.reset_parameters()
    (block,) = model.decoder.layers
    on_cpu = (1, torch.float32, torch.device("cpu"))
    if name == "falcon-mamba":
        mixer = block.mixer
        title = "FalconMamba-7B mixer: hidden 4096, inner 8192, state 16, dt rank 256, kernel 4"
        return Layer(title, 4096, lambda x, state: mixer(x, None, state), lambda: mixer.empty_state(*on_cpu))
    recurrent = block.temporal
    title = "RecurrentGemma-2B recurrent block: hidden 2560, lru width 2560, 10 gate heads, kernel 4"
    return Layer(
        title,
        2560,
        lambda x, state: recurrent(x, plain_call(x.shape[1]), state),
        lambda: recurrent.empty_state(*on_cpu),
    )


def plain_call(length: int) -> recurrent_gemma.GriffinCall:
    """What a recurrent block is told about tokens in the middle of a text."""
    positions = torch.arange(1, length + 1)[None]
    nothing = (positions[:, :0], positions[:, :0])
    call = AttentionCall(
        Span(1, length), positions, Record(), implementation="sdpa", rotary=nothing, visibility=Visibility(None)
    )
    return recurrent_gemma.GriffinCall.of(call, None)


@contextmanager
def stopwatch() -> Iterator[dict[str, float]]:
    """Milliseconds spent in each part while the context is open."""
    spent = dict.fromkeys(PARTS, 0.0)

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            answer = function(*args, **kwargs)
            spent[part] += (time.perf_counter() - begin) * 1e3
            return answer

        return call

    places = [(part, owner, name, getattr(owner, name)) for part, found in PARTS.items() for owner, name in found]
    try:
        for part, owner, name, function in places:
            setattr(owner, name, timed(part, function))
        yield spent
    finally:
        for _, owner, name, function in places:
            setattr(owner, name, function)


def time_layer(layer: Layer, tokens: int, repetitions: int) -> list[dict[str, float]]:
    """Milliseconds of every part and of the whole, run by run; the first run warms up and does not count."""
    hidden, runs = torch.randn(1, tokens, layer.hidden), []
    for _ in range(repetitions + 1):
        state = layer.empty_state()
        with stopwatch() as spent:
            begin = time.perf_counter()
            layer.run(hidden, state)
            whole = (time.perf_counter() - begin) * 1e3
        if not all(spent.values()):
            raise SystemExit(f"{layer.title}: PARTS names functions that are not called: {spent}")
        runs.append({**spent, "elsewhere": whole - sum(spent.values()), "whole layer": whole})
    return runs[1:]


@dataclass
class Result:
    """The figures of one layer: median milliseconds a part, its share in percent, and peak gigabytes."""

    layer: str
    tokens: int
    threads: int
    load_average: float
    milliseconds: dict[str, float]
    share: dict[str, float]
    memory_tokens: int
    peak_gigabytes: dict[str, float]


def measure(name: str, arguments: argparse.Namespace) -> Result:
    """All figures of one layer; a part's share is the median of the runs' own ratios."""
    layer = make(name)
    runs = time_layer(layer, arguments.tokens, arguments.repetitions)
    parts = list(runs[0])
    peaks = {}
    for label, chunk in (("one pass", arguments.memory_tokens), (f"chunks of {arguments.chunk}", arguments.chunk)):
        command = [sys.executable, __file__, "--layer", name, "--measure-memory", str(chunk)]
        command += ["--memory-tokens", str(arguments.memory_tokens), "--threads", str(arguments.threads)]
        peaks[label] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return Result(
        layer.title,
        arguments.tokens,
        arguments.threads,
        os.getloadavg()[0],
        {part: statistics.median(run[part] for run in runs) for part in parts},
        {part: statistics.median(100 * run[part] / run["whole layer"] for run in runs) for part in parts},
        arguments.memory_tokens,
        peaks,
    )


def report(result: Result) -> None:
    """Print the figures, and whether the limits are kept."""
    print(result.layer)
    print(f"  {result.tokens} tokens, float32, {result.threads} threads, load average {result.load_average:.1f}")
    for part, milliseconds in result.milliseconds.items():
        print(f"    {part:<12} {milliseconds:8.1f} ms {result.share[part]:6.1f}% of the layer")
    kept = verdict(result.share["recurrence"] < SHARE_LIMIT)
    print(f"    limit: the recurrence under {SHARE_LIMIT:g}% at 512 tokens -> {kept}")
    print(f"  {result.memory_tokens} tokens, float32: peak above the weights, input and output included")
    for label, peak in result.peak_gigabytes.items():
        print(f"    {label:<14} {peak:6.2f} GB   limit {MEMORY_LIMIT:g} GB -> {verdict(peak < MEMORY_LIMIT)}")


def verdict(kept: bool) -> str:
    """Say whether a limit is kept."""
    return "kept" if kept else "BROKEN"


def peak_gigabytes() -> float:
    """Peak resident set of this process.

    On Linux from /proc, since ru_maxrss there begins with the peak of the process that started this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def measure_memory(layer: Layer, tokens: int, chunk: int) -> float:
    """Growth of the peak resident set over a prompt; the first call has already loaded what torch loads lazily."""
    state = layer.empty_state()
    layer.run(torch.randn(1, 2, layer.hidden), state)
    before = peak_gigabytes()
    outputs = [layer.run(piece, state) for piece in torch.randn(1, tokens, layer.hidden).split(chunk, 1)]
    assert sum(output.shape[1] for output in outputs) == tokens
    return peak_gigabytes() - before


@torch.inference_mode()
def main(arguments: argparse.Namespace) -> None:
    """Measure what was asked for."""
    torch.set_num_threads(arguments.threads)
    if arguments.measure_memory is not None:
        print(measure_memory(make(arguments.layer), arguments.memory_tokens, arguments.measure_memory))
        return
    for name in LAYERS if arguments.layer == "all" else [arguments.layer]:
        result = measure(name, arguments)
        if arguments.json:
            print(json.dumps(asdict(result)))
        else:
            report(result)


if _arguments is not None:
    main(_arguments)
