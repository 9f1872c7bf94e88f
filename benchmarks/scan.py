"""What the recurrences cost beside the matrix products of their layers: `python benchmarks/scan.py`.

One FalconMamba layer at 7B width and one RecurrentGemma recurrent block at 2B width, random weights, float32. For each:
the time of its recurrence, convolution and matrix products and of the whole layer over one prompt, taken in turns so
that a busy machine slows all alike, and the peak memory of a long prompt above the layer's weights, in one pass and
in chunks, each in a process of its own.
"""
# ruff: noqa: D102, N806

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
import torch.nn.functional as F  # noqa: E402, N812
from torch import Tensor  # noqa: E402

from lmx.core.layers.conv import causal_conv  # noqa: E402
from lmx.core.layers.linear_recurrence import rg_lru  # noqa: E402
from lmx.core.layers.scan import selective_scan  # noqa: E402

State = tuple[Tensor, Tensor]


class Layer(Protocol):
    """What is measured: a call over [batch, length, hidden], and its parts on inputs made beforehand."""

    title: str
    hidden: int

    def start(self) -> State: ...
    def __call__(self, hidden: Tensor, state: State) -> tuple[Tensor, State]: ...
    def parts(self, hidden: Tensor) -> dict[str, Callable[[], object]]: ...


def random(*shape: int) -> Tensor:
    """Weights whose products keep the scale of their inputs."""
    return torch.randn(*shape).mul_(shape[-1] ** -0.5)  # in place: a second copy would count as a peak of its own


class FalconMamba:
    """The mixer of FalconMamba-7B."""

    title = "FalconMamba-7B mixer: hidden 4096, inner 8192, state 16, dt rank 256, kernel 4"
    hidden, inner, n, rank, kernel = 4096, 8192, 16, 256, 4

    def __init__(self) -> None:
        self.in_proj, self.out_proj = random(2 * self.inner, self.hidden), random(self.hidden, self.inner)
        self.x_proj, self.dt_proj = random(self.rank + 2 * self.n, self.inner), random(self.inner, self.rank)
        self.dt_bias = torch.empty(self.inner).uniform_(-6.9, -2.3)  # deltas of 0.001 to 0.1, as in the paper
        self.conv, self.conv_bias = random(self.inner, self.kernel), random(self.inner)
        self.A = -torch.arange(1.0, self.n + 1).repeat(self.inner, 1)
        self.D = torch.ones(self.inner)

    def start(self) -> State:
        """Convolution and scan state of an empty text."""
        return torch.zeros(1, self.inner, self.kernel - 1), torch.zeros(1, self.inner, self.n)

    def scan_inputs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Delta, B and C for x [batch, length, inner]."""
        step, B, C = F.linear(x, self.x_proj).split([self.rank, self.n, self.n], -1)
        step, B, C = (F.rms_norm(t, t.shape[-1:], eps=1e-6) for t in (step, B, C))
        return F.softplus(F.linear(step, self.dt_proj, self.dt_bias)), B, C

    def __call__(self, hidden: Tensor, state: State) -> tuple[Tensor, State]:
        """Run the layer."""
        x, gate = F.linear(hidden, self.in_proj).chunk(2, -1)
        x, conv = causal_conv(x, self.conv, self.conv_bias, state[0])
        x = F.silu(x, inplace=True)
        y, ssm = selective_scan(x, *self._ordered(x), state[1])
        y.addcmul_(x, self.D).mul_(F.silu(gate, inplace=True))
        return F.linear(y, self.out_proj), (conv, ssm)

    def _ordered(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        delta, B, C = self.scan_inputs(x)
        return delta, self.A, B, C

    def parts(self, hidden: Tensor) -> dict[str, Callable[[], object]]:
        """Recurrence, convolution and matrix products, each alone."""
        state = self.start()
        x, _ = F.linear(hidden, self.in_proj).chunk(2, -1)
        convolved = F.silu(causal_conv(x, self.conv, self.conv_bias, state[0])[0])
        inputs = self._ordered(convolved)
        step = torch.randn(*hidden.shape[:2], self.rank)

        def products() -> None:
            F.linear(hidden, self.in_proj)
            F.linear(convolved, self.x_proj)
            F.linear(step, self.dt_proj)
            F.linear(convolved, self.out_proj)

        return {
            "recurrence": lambda: selective_scan(convolved, *inputs, state[1]),
            "convolution": lambda: causal_conv(x, self.conv, self.conv_bias, state[0]),
            "products": products,
        }


class RecurrentGemma:
    """The recurrent block of RecurrentGemma-2B."""

    title = "RecurrentGemma-2B recurrent block: hidden 2560, lru width 2560, 10 gate heads, kernel 4"
    hidden, width, heads, kernel = 2560, 2560, 10, 4

    def __init__(self) -> None:
        self.linear_x, self.linear_y = random(self.width, self.hidden), random(self.width, self.hidden)
        self.linear_out = random(self.hidden, self.width)
        self.conv, self.conv_bias = random(self.width, self.kernel), random(self.width)
        block = self.width // self.heads
        self.input_gate, self.recurrence_gate = random(self.heads, block, block), random(self.heads, block, block)
        self.rate = torch.empty(self.width).uniform_(-4.3, -2.3)  # softplus(rate) of 0.013 to 0.1: decays near 1

    def start(self) -> State:
        """Convolution and recurrence state of an empty text."""
        return torch.zeros(1, self.width, self.kernel - 1), torch.zeros(1, self.width)

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The two block-diagonal products, before their sigmoids."""
        heads = x.unflatten(-1, (self.heads, -1)).flatten(0, 1).transpose(0, 1)  # [heads, tokens, block]
        first, second = (
            torch.bmm(heads, w).transpose(0, 1).reshape(x.shape) for w in (self.input_gate, self.recurrence_gate)
        )
        return first, second

    def recurrence_inputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Decay and gated input for x [batch, length, width]."""
        input_gate, recurrence_gate = self.gates(x)
        log_a = recurrence_gate.sigmoid_().mul_(-8 * F.softplus(self.rate))
        drive = input_gate.sigmoid_().mul_(x).mul_((2 * log_a).expm1_().neg_().sqrt_())
        return log_a.exp_(), drive

    def __call__(self, hidden: Tensor, state: State) -> tuple[Tensor, State]:
        """Run the layer."""
        x, conv = causal_conv(F.linear(hidden, self.linear_x), self.conv, self.conv_bias, state[0])
        h, lru = rg_lru(*self.recurrence_inputs(x), state[1])
        gate = F.gelu(F.linear(hidden, self.linear_y), approximate="tanh")
        return F.linear(h.mul_(gate), self.linear_out), (conv, lru)

    def parts(self, hidden: Tensor) -> dict[str, Callable[[], object]]:
        """Recurrence, convolution and matrix products, each alone."""
        state = self.start()
        x = F.linear(hidden, self.linear_x)
        inputs = self.recurrence_inputs(causal_conv(x, self.conv, self.conv_bias, state[0])[0])

        def products() -> None:
            F.linear(hidden, self.linear_x)
            F.linear(hidden, self.linear_y)
            self.gates(x)
            F.linear(x, self.linear_out)

        return {
            "recurrence": lambda: rg_lru(*inputs, state[1]),
            "convolution": lambda: causal_conv(x, self.conv, self.conv_bias, state[0]),
            "products": products,
        }


def make(name: str) -> Layer:
    """Build the named layer with the same random weights each time."""
    torch.manual_seed(0)
    return FalconMamba() if name == "falcon-mamba" else RecurrentGemma()


def time_parts(layer: Layer, tokens: int, repetitions: int) -> dict[str, list[float]]:
    """Milliseconds of every part and of the whole, in turns."""
    hidden, state = torch.randn(1, tokens, layer.hidden), layer.start()
    runs = {**layer.parts(hidden), "whole layer": lambda: layer(hidden, state)}
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
    _, state = layer(torch.randn(1, 2, layer.hidden), layer.start())
    before = peak_gigabytes()
    outputs = []
    for piece in torch.randn(1, tokens, layer.hidden).split(chunk, 1):
        y, state = layer(piece, state)
        outputs.append(y)
    return peak_gigabytes() - before


def verdict(kept: bool) -> str:
    """Say whether a limit is kept."""
    return "kept" if kept else "BROKEN"


@torch.inference_mode()
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
