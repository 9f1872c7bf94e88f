"""`lmx quantize`: a checkpoint in four or eight bits, and the truth about what became of it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lmx.cli.console import may_animate, note, write_json
from lmx.cli.facts import human_bytes, human_count
from lmx.cli.options import (
    CommonOptions,
    JsonOption,
    OfflineOption,
    RevisionOption,
    ThreadsOption,
    parse_size,
    spread_groups,
)
from lmx.cli.pull_progress import pull_watcher
from lmx.cli.rows import write_rows
from lmx.core.errors import LmxError, UsageError
from lmx.core.text.safe import safe_line
from lmx.device import limit_threads
from lmx.quantization import Checked, Finished, Progress, Quantization, Report

if TYPE_CHECKING:
    from rich.progress import ProgressColumn, Task

    from lmx.quantization import Scheme

_WORST = 5


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("quantize", epilog="Example: lmx quantize mistralai/Mixtral-8x7B-Instruct-v0.1 --4bit")(
        spread_groups(quantize_command)
    )


def quantize_command(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="A checkpoint's folder (of any layout), a GGUF, or a hub id.")
    ],
    output: Annotated[
        str | None, typer.Argument(metavar="DST", help="The new folder. Without it: ./NAME-SCHEME.")
    ] = None,
    *,
    four_bit: Annotated[bool, typer.Option("--4bit", help="NF4, the default.")] = False,
    eight_bit: Annotated[bool, typer.Option("--8bit", help="int8, row by row.")] = False,
    scheme: Annotated[
        Literal["nf4", "fp4", "int8", "qint8", "qint4", "qint2", "qfloat8"] | None,
        typer.Option(help="The scheme by its name; those with a q are optimum-quanto's."),
    ] = None,
    double_quant: Annotated[
        bool, typer.Option("--double-quant", help="Store the scales in 8 bits too: 0.4 bits less a parameter.")
    ] = False,
    block_size: Annotated[int, typer.Option(help="Numbers that share a scale, 32 to 4096.")] = 64,
    skip: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Modules to leave as they are. May be repeated.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="The most bytes of a file.")] = "5GB",
    max_memory: Annotated[str | None, typer.Option(metavar="SIZE", help="Do not take more memory than this.")] = None,
    threads: ThreadsOption = None,
    check: Annotated[
        Path | None,
        typer.Option(metavar="TEXTFILE", help="Compare the output with SRC on a text before it gets its name."),
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(metavar="X", min=0.0, help="Fail --check past this KL divergence, in nats a token."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an existing output, when the new one is done.")
    ] = False,
    json: JsonOption = False,
    offline: OfflineOption = False,
    revision: RevisionOption = None,
    common: CommonOptions,
) -> None:
    """Quantize a checkpoint's linear layers and experts. A run that was stopped goes on where it was."""
    name = _scheme(four_bit, eight_bit, scheme)
    shard_bytes = parse_size("--max-shard-size", max_shard_size)
    memory_bytes = None if max_memory is None else parse_size("--max-memory", max_memory)
    if threads is not None and threads < 1:
        raise UsageError(f"--threads is {threads}", "give 1 or more")
    limit_threads(threads)
    job = Quantization.open(
        source,
        output,
        scheme=name,
        block_size=block_size,
        double_quant=double_quant,
        skip=skip or (),
        max_shard_bytes=shard_bytes,
        max_memory_bytes=memory_bytes,
        check=check,
        max_kl=max_kl,
        force=force,
        revision=revision,
        offline=offline,
        watch=pull_watcher(common.quiet),
        headers_only=dry_run,
    )
    started = time.perf_counter()
    report = _predict(job, common.quiet) if dry_run else _run(job, common.quiet)
    if not dry_run:
        seconds = time.perf_counter() - started
        note(f"{report.output}: done in {seconds:.0f} s", quiet=common.quiet)
    if json:
        write_json(report.to_json())
    elif not common.quiet:
        write_rows(_rows(report, is_prediction=dry_run))


def _scheme(four_bit: bool, eight_bit: bool, scheme: "Scheme | None") -> "Scheme":
    if four_bit + eight_bit + (scheme is not None) > 1:
        raise UsageError("--4bit, --8bit and --scheme exclude each other", "give one of them")
    return scheme or ("int8" if eight_bit else "nf4")


def _predict(job: Quantization, quiet: bool) -> Report:
    report = job.predict()
    try:
        job.check_target()
    except LmxError as error:
        note(f"it would not be written: {error.message}: {error.hint}", quiet=quiet)
    return report


def _run(job: Quantization, quiet: bool) -> Report:
    with _progress(quiet) as show:
        for number, event in enumerate(job.run()):
            if isinstance(event, Finished):
                return event.report
            if isinstance(event, Checked):
                note(f"KL divergence from the source: {event.kl_divergence:.6f} nats a token", quiet=quiet)
                continue
            if not number and event.resumed:
                note(f"going on after the {event.resumed / event.total:.0%} of an earlier run", quiet=quiet)
            show(event)
    raise TypeError("the last event of a quantization is its report")


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[Progress], None]]:
    """A bar with the rate and the time left, where a person watches stderr; what it yields shows an event."""
    if quiet or not may_animate():
        yield lambda event: None
        return
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(*_columns(), console=Console(stderr=True), transient=True, speed_estimate_period=60) as bar:
        task = bar.add_task("", total=None)

        def show(event: Progress) -> None:
            if not bar.tasks[task].completed:
                bar.reset(task, total=event.total, completed=event.resumed)
            bar.update(task, completed=event.parameters, description=safe_line(event.name))

        yield show


def _columns() -> "Iterator[ProgressColumn]":
    from rich.progress import BarColumn, ProgressColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.table import Column
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: "Task") -> Text:
            speed = task.finished_speed or task.speed
            return Text("" if speed is None else f"{human_count(int(speed))} parameters/s")

    yield from (BarColumn(), TaskProgressColumn(), Rate(), TimeRemainingColumn())
    yield TextColumn("{task.description}", markup=False, table_column=Column(ratio=1, no_wrap=True))


def _rows(report: Report, *, is_prediction: bool) -> list[tuple[str, str]]:
    """Names and values for people."""
    would = " (predicted)" if is_prediction else ""
    share = f"{human_count(report.quantized_parameters)} of {human_count(report.parameters)} parameters"
    size = f"{human_bytes(report.output_bytes)}, {report.bits_per_parameter:.2f} bits a parameter{would}"
    rows = [
        ("source", report.source),
        ("output", report.output),
        ("before", human_bytes(report.source_bytes)),
        ("after", size),
        ("quantized", f"{share} ({report.quantized_share:.1%}) to {report.scheme}"),
    ]
    for reason, (count, nbytes) in report.kept_by_reason().items():
        rows.append((f"kept: {reason}", f"{count} tensor{'s' * (count > 1)}, {human_bytes(nbytes)}"))
    for name, error in report.worst(_WORST):
        rows.append((f"error {error:.2e}", name))
    rows.append(("peak memory", human_bytes(report.peak_memory_bytes) + would))
    return [(name, safe_line(value)) for name, value in rows]
