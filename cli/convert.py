"""`lmx convert`: write a model in another form."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import typer

from lmx.cli.console import may_animate, note, write_json
from lmx.cli.facts import human_bytes, human_count
from lmx.cli.options import CommonOptions, JsonOption, OfflineOption, RevisionOption, parse_size, spread_groups
from lmx.cli.pull_progress import pull_watcher
from lmx.conversion import Conversion, Finished, Format, Progress, convert_events, predict_conversion
from lmx.core.errors import InputError

Last = TypeVar("Last")


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("convert", epilog="Example: lmx convert ./mixtral-nf4 ./mixtral.gguf --to gguf --dtype q8_0")(
        spread_groups(convert_command)
    )


def convert_command(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="A checkpoint's folder (of any layout), a GGUF, or a hub id.")
    ],
    target: Annotated[Path, typer.Argument(metavar="DST", help="The new folder; or file, NAME.gguf.")],
    *,
    to: Annotated[
        Format | None,
        typer.Option(help="The format; mistral of a Mixtral. Without it: gguf where DST ends in .gguf, else hf."),
    ] = None,
    dtype: Annotated[
        Literal["bf16", "fp16", "fp32", "q8_0", "q4_0"] | None,
        typer.Option(
            help="Of all weights; q8_0 and q4_0 of a GGUF's. Without it: as stored; of quantized ones, as before."
        ),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="The most bytes of a file.")] = "5GB",
    verify: Annotated[
        bool, typer.Option("--verify", help="Read both again and compare every weight, the vocabulary and logits.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be written; write nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace DST if it exists.")] = False,
    json: JsonOption = False,
    offline: OfflineOption = False,
    revision: RevisionOption = None,
    common: CommonOptions,
) -> None:
    """Write a model in another form: the hub's, a GGUF, or Mistral's.

    A quantized one is dequantized. A run that was stopped goes on where it stopped when the same command is given
    again.
    """
    job = Conversion(target, to, dtype, parse_size("--max-shard-size", max_shard_size), force)
    if dry_run:
        finished = predict_conversion(source, job, revision=revision, offline=offline)
    else:
        watch = pull_watcher(common.quiet)
        steps = convert_events(source, job, revision=revision, offline=offline, watch=watch)
        finished = _watch(steps, Finished, may_animate() and not common.quiet)
    if finished.read_as is not None:
        note(f"{source}: read as {finished.read_as}", quiet=common.quiet)
    size = f"{human_count(finished.parameters)} parameters in {human_bytes(finished.output_bytes)}"
    note(f"{target}: {size}{' (predicted)' * dry_run}", quiet=common.quiet)
    facts: dict[str, object] = {"source": source, "output": str(target), "parameters": finished.parameters}
    facts |= {"output_bytes": finished.output_bytes, "read_as": finished.read_as}
    failures: tuple[str, ...] = ()
    if verify and not dry_run:
        from lmx.verification import Verification, describe, verify_conversion

        checks = verify_conversion(source, target, dtype=dtype, revision=revision, offline=offline)
        report = _watch(checks, Verification, may_animate() and not common.quiet)
        facts["verification"], failures = report.to_json(), report.failures
        note(describe(report, str(target)), quiet=common.quiet)
    if json:
        write_json(facts)
    if failures:
        raise InputError(f"{target} is not the model of {source}: {failures[0]}", "do not use it, and report this")


def _watch(steps: Iterator[Progress | Last], kind: type[Last], show: bool) -> Last:
    """Take all steps, with a bar where a person watches stderr, and return the last."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("convert"), BarColumn(), TextColumn("{task.percentage:.0f}%"), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True, disable=not show) as bar:
        task = bar.add_task("convert", total=None)
        for step in steps:
            if isinstance(step, kind):
                return step
            if isinstance(step, Progress):
                bar.update(task, completed=step.parameters, total=step.total)
    raise RuntimeError("a conversion ended without a result")
