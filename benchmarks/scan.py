"""What the recurrences cost beside the matrix products of their layers: `python benchmarks/scan.py`.

The runtime's own FalconMamba layer at 7B width and RecurrentGemma recurrent block at 2B width, random weights, float32.
For each: the time of its recurrence, convolution and matrix products and of the whole layer over one prompt, taken in
turns so that a busy machine slows all alike, and the peak memory of a long prompt above the layer's weights, in one
pass and in chunks, each in a process of its own.
"""
# ruff: noqa: D102

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

SHARE_LIMIT = 15.0  # percent of the layer's time, at 512 tokens
MEMORY_LIMIT = 2.0  # GB above the layer's weights, at 8,192 tokens


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", choices=[*LAYERS, "all"], default="all")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--tokens", type=int, default=512, help="prompt of the timing")
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--memory-tokens", type=int, default=8192, help="prompt of the memory measurement")
    parser.add_argument("--chunk", type=int, default=512, help="tokens a call, in the chunked memory measurement")
    parser.add_argument("--measure-memory", type=int, metavar="CHUNK", help=argparse.SUPPRESS)
    return parser.parse_args()


LAYERS = ("falcon-mamba", "recurrent-gemma")
_arguments = options() if __name__ == "__main__" else None
if _arguments is not None:
    os.environ["OMP_NUM_THREADS"] = str(_arguments.threads)

import torch  # noqa: E402  (after the thread count is set)
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from lmx.core.decoder import Call, Record  # noqa: E402
from lmx.core.layers.conv import causal_conv  # noqa: E402
from lmx.core.layers.linear_recurrence import rg_lru  # noqa: E402
from lmx.core.layers.scan import selective_scan  # noqa: E402
from lmx.core.models.falcon_mamba import FalconMambaConfig, Mixer  # noqa: E402
from lmx.core.models.recurrent_gemma import RecurrentBlock, RecurrentGemmaConfig  # noqa: E402
from lmx.core.recurrent_state import GriffinState, MambaState  # noqa: E402
from lmx.core.state import Span  # noqa: E402

CPU = torch.device("cpu")


class Layer(Protocol):
    """What is measured: a layer of the runtime, and its parts on inputs made beforehand."""

    title: str
    hidden: int

    def begin(self) -> None: ...
    def __call__(self, hidden: Tensor) -> Tensor: ...
    def parts(self, hidden: Tensor) -> dict[str, Callable[[], object]]: ...


def fill(module: nn.Module) -> None:
    """Weights whose products keep the scale of their inputs."""
    for weight in module.parameters():
        weight.normal_(0.0, weight.shape[-1] ** -0.5)


class FalconMamba:
    """The mixer of FalconMamba-7B."""

    title = "FalconMamba-7B mixer: hidden 4096, inner 8192, state 16, dt rank 256, kernel 4"
    hidden = 4096

    def __init__(self) -> None:
        widths = {"hidden_size": self.hidden, "intermediate_size": 8192, "num_hidden_layers": 1, "vocab_size": 1}
        self.mixer = Mixer(FalconMambaConfig.parse(widths)).eval()
        fill(self.mixer)
        self.mixer.dt_proj.bias.uniform_(-6.9, -2.3)  # deltas of 0.001 to 0.1, as in the paper
        self.mixer.A_log.copy_(torch.arange(1.0, 17).log().expand_as(self.mixer.A_log))
        self.begin()

    def begin(self) -> None:
        """Start a new text."""
        self.state: MambaState = self.mixer.empty_state(1, torch.float32, CPU)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Run the layer over the text's next tokens."""
        answer: Tensor = self.mixer(hidden, None, self.state)
        return answer

    def parts(self, hidden: Tensor) -> dict[str, Callable[[], object]]:
        """Recurrence, convolution and matrix products, each alone."""
        mixer, inner = self.mixer, self.mixer.A_log.shape[0]
        rank, states, _ = mixer.sizes
        x, step = torch.randn(*hidden.shape[:2], inner), torch.randn(*hidden.shape[:2], rank)
        B, C = torch.randn(2, *hidden.shape[:2], states)
        A, delta = -torch.exp(mixer.A_log), F.softplus(mixer.dt_proj(step))
        start = mixer.empty_state(1, torch.float32, CPU)

        def products() -> None:
            mixer.in_proj(hidden)
            mixer.x_proj(x)
            mixer.dt_proj(step)
            mixer.out_proj(x)

        return {
            "recurrence": lambda: selective_scan(x, delta, A, B, C, start.hidden),
            "convolution": lambda: causal_conv(x, mixer.conv_weight.squeeze(1), mixer.conv_bias, start.conv),
            "products": products,
        }


class RecurrentGemma:
    """The recurrent block of RecurrentGemma-2B."""

    title = "RecurrentGemma-2B recurrent block: hidden 2560, lru width 2560, 10 gate heads, kernel 4"
    hidden = 2560

    def __init__(self) -> None:
        widths = {"hidden_size": self.hidden, "num_attention_heads": 10, "num_hidden_layers": 1, "vocab_size": 1}
        self.block = RecurrentBlock(RecurrentGemmaConfig.parse(widths)).eval()
        fill(self.block)
        self.block.rg_lru.reset_parameters(0.01)  # decays near 1
        self.begin()

    def begin(self) -> None:
        """Start a new text."""
        self.state: GriffinState = self.block.empty_state(1, torch.float32, CPU)
        self.length = 0

    def __call__(self, hidden: Tensor) -> Tensor:
        """Run the layer over the text's next tokens."""
        span = Span(self.length, hidden.shape[1])
        self.length += hidden.shape[1]
        answer: Tensor = self.block(hidden, Call(span, span.positions(CPU), Record()), self.state)
        return answer

    def parts(self, hidden: Tensor) -> dict[str, Callable[[], object]]:
        """Recurrence, convolution and matrix products, each alone."""
        block, unit = self.block, self.block.rg_lru
        x = block.linear_x(hidden)
        heads = x.unflatten(-1, unit.input_gate_weight.shape[:2]).flatten(0, 1).transpose(0, 1)
        decay, start = torch.rand_like(x).mul_(0.1).add_(0.9), block.empty_state(1, torch.float32, CPU)

        def products() -> None:
            block.linear_x(hidden)
            block.linear_y(hidden)
            torch.bmm(heads, unit.input_gate_weight)
            torch.bmm(heads, unit.recurrent_gate_weight)
            block.linear_out(x)

        return {
            "recurrence": lambda: rg_lru(decay, x, start.hidden),
            "convolution": lambda: causal_conv(x, block.conv_weight.squeeze(1), block.conv_bias, start.conv),
            "products": products,
        }


def make(name: str) -> Layer:
    """Build the named layer with the same random weights each time."""
    torch.manual_seed(0)
    return FalconMamba() if name == "falcon-mamba" else RecurrentGemma()


def time_parts(layer: Layer, tokens: int, repetitions: int) -> dict[str, list[float]]:
    """Milliseconds of every part and of the whole, in turns."""
    hidden = torch.randn(1, tokens, layer.hidden)
    runs = {**layer.parts(hidden), "whole layer": lambda: layer(hidden)}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for repetition in range(repetitions + 1):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            if repetition:  # the first round warms up
                samples[name].append((time.perf_counter() - begin) * 1e3)
    return samples


def report_times(layer: Layer, arguments: argparse.Namespace) -> None:
    """Print the medians and the recurrence's share, the median of the rounds' own ratios."""
    samples = time_parts(layer, arguments.tokens, arguments.repetitions)
    whole = samples["whole layer"]
    print(f"  {arguments.tokens} tokens, float32, {arguments.threads} threads, median of {arguments.repetitions}")
    print(
        f"  load average {os.getloadavg()[0]:.1f} (a recurrence is many short calls: others on the cores slow it most)"
    )
    for name, times in samples.items():
        share = 100 * statistics.median(a / b for a, b in zip(times, whole, strict=True))
        print(
            f"    {name:<12} {statistics.median(times):8.1f} ms  (best {min(times):7.1f})  {share:5.1f}% of the layer"
        )
    share = 100 * statistics.median(a / b for a, b in zip(samples["recurrence"], whole, strict=True))
    print(f"    limit: the recurrence under {SHARE_LIMIT:g}% at 512 tokens -> {verdict(share < SHARE_LIMIT)}")


def report_memory(name: str, arguments: argparse.Namespace) -> None:
    """Print the peak of one long prompt, in one pass and in chunks."""
    total = arguments.memory_tokens
    print(f"  {total} tokens, float32: peak above the weights, input and output included")
    for label, chunk in (("one pass", total), (f"chunks of {arguments.chunk}", arguments.chunk)):
        command = [sys.executable, __file__, "--layer", name, "--measure-memory", str(chunk)]
        command += ["--memory-tokens", str(total), "--threads", str(arguments.threads)]
        peak = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"    {label:<14} {peak:6.2f} GB   limit {MEMORY_LIMIT:g} GB -> {verdict(peak < MEMORY_LIMIT)}")


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
    """Growth of the peak resident set over a prompt; a first call has already loaded what torch loads lazily."""
    layer(torch.randn(1, 2, layer.hidden))
    layer.begin()
    before = peak_gigabytes()
    outputs = [layer(piece) for piece in torch.randn(1, tokens, layer.hidden).split(chunk, 1)]
    del outputs
    return peak_gigabytes() - before


def verdict(kept: bool) -> str:
    """Say whether a limit is kept."""
    return "kept" if kept else "BROKEN"


@torch.no_grad()
def main(arguments: argparse.Namespace) -> None:
    """Measure what was asked for."""
    torch.set_num_threads(arguments.threads)
    if arguments.measure_memory is not None:
        print(measure_memory(make(arguments.layer), arguments.memory_tokens, arguments.measure_memory))
        return
    for name in LAYERS if arguments.layer == "all" else [arguments.layer]:
        layer = make(name)
        print(layer.title)
        report_times(layer, arguments)
        del layer
        report_memory(name, arguments)


if _arguments is not None:
    main(_arguments)
