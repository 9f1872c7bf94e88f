"""`lmx bench`: how fast models run here, and how far from what this machine can do."""

import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from lmx.benchmark import Event, Making, Setting, Step, benchmark
from lmx.cli.bench_tables import Earlier, Printer, make_printer
from lmx.cli.console import may_animate, note
from lmx.cli.counts import parse_counts, parse_pair
from lmx.cli.facts import memory_line
from lmx.cli.options import CommonOptions, RuntimeOptions, spread_groups
from lmx.cli.pull_progress import pull_watcher
from lmx.core.errors import UsageError
from lmx.core.text.safe import safe_line
from lmx.device import choose_budgets, limit_threads
from lmx.pulling import Watcher

_EXAMPLE = "Example: lmx bench allenai/OLMoE-1B-7B-0924 --dummy --4bit --head int8 -p 512 -n 128 -d 0,3968"


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("bench", epilog=_EXAMPLE)(spread_groups(bench_command))


def bench_command(
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL", help="Folders, GGUFs, hub ids ORG/NAME[@REVISION]. None: the demo model."),
    ] = None,
    *,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", metavar="N,…", help="Tokens of a prompt: 512 or 128,512 or 64-512*2.  [512]"),
    ] = None,
    generate: Annotated[
        list[str] | None, typer.Option("--generate", "-n", metavar="N,…", help="Tokens to generate, as -p.  [128]")
    ] = None,
    pair: Annotated[
        list[str] | None, typer.Option("--pair", "-pg", metavar="P,N", help="A prompt and an answer as one test.")
    ] = None,
    depth: Annotated[
        list[str] | None,
        typer.Option("--depth", "-d", metavar="N,…", help="Tokens read before, untimed: 0-4096+1024.  [0]"),
    ] = None,
    repetitions: Annotated[int, typer.Option("--repetitions", "-r", min=1, help="How often to time a test.")] = 5,
    output: Annotated[
        Literal["md", "json", "jsonl", "csv"], typer.Option("--output", "-o", help="The results' form.")
    ] = "md",
    dummy: Annotated[
        bool, typer.Option("--dummy", help="Random weights at the published size: nothing is read or fetched.")
    ] = False,
    double_quant: Annotated[
        bool, typer.Option("--double-quant", help="With --4bit: quantize the scales of the blocks too.")
    ] = False,
    compare: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What -o json or jsonl wrote earlier: show the ratio to it.")
    ] = None,
    runtime: RuntimeOptions,
    common: CommonOptions,
) -> None:
    """Time models, and how far from this machine's limits they are.

    The two limits, of memory bandwidth and of matrix products, are measured in the same run. Tokens are random, and no
    stop token ends a test. -p 0 or -n 0 leaves these tests out.
    """
    depths = parse_counts("-d", depth or ["0"])
    prompts, generates = parse_counts("-p", prompt or ["512"]), parse_counts("-n", generate or ["128"])
    pairs = [parse_pair("-pg", text) for text in pair or []]
    tests = [(n, 0) for n in prompts if n] + [(0, n) for n in generates if n] + pairs
    if not tests:
        raise UsageError("there is nothing to measure", "give -p or -n a number above 0")
    if double_quant and not runtime.four_bit:
        raise UsageError("--double-quant is for --4bit", "give both, or leave it out")
    printer = make_printer(output, None if compare is None else Earlier.read(compare))
    gpu_memory = runtime.gpu_memory_bytes
    limit_threads(runtime.threads)
    if gpu_memory is not None:
        choose_budgets(runtime.device, gpu_memory)  # refuses it before anything is read
    workloads = [(p, n, d) for d in depths for p, n in tests]
    setting = _setting(runtime, dummy, double_quant, pull_watcher(common.quiet))
    events = _events(models or [None], workloads, repetitions, setting)
    _print(events, printer, quiet=common.quiet)


def _setting(runtime: RuntimeOptions, dummy: bool, double_quant: bool, watch: Watcher) -> Setting:
    return Setting(
        device=runtime.device,
        dtype=runtime.dtype,
        quantize=runtime.quantize,
        double_quant=double_quant,
        head_scheme=runtime.head_scheme,
        attention=runtime.attention,
        gpu_memory=runtime.gpu_memory_bytes,
        dummy=dummy,
        revision=runtime.revision,
        offline=runtime.offline or dummy,
        watch=watch,
    )


def _events(
    models: Sequence[str | None], tests: Sequence[tuple[int, int, int]], repetitions: int, setting: Setting
) -> Iterator[Event]:
    from lmx.core.bench import Workload

    return benchmark(models, [Workload(*test) for test in tests], repetitions, setting)


def _print(events: Iterator[Event], printer: Printer, *, quiet: bool) -> None:
    show = may_animate() and not quiet
    try:
        for event in events:
            if isinstance(event, Step):
                _tell(f"{event.model}: {event.doing}", show)
            elif isinstance(event, Making):
                note(memory_line(event.model, event.needed.nbytes, event.needed.kind), quiet=quiet)
            else:
                _tell("", show)  # makes room for the row
                printer.row(event)
    finally:
        _tell("", show)
    printer.finish()


def _tell(text: str, show: bool) -> None:
    """Put one line on stderr in the place of the last. No animation: it would take the CPU from what is timed."""
    if show:
        room = shutil.get_terminal_size().columns - 1
        sys.stderr.write(f"\r\x1b[2K{safe_line(text)[:room]}")
        sys.stderr.flush()
