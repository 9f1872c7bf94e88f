"""`lmx convert`: write a model in another form."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from lmx.cli.console import may_animate, note, write_json
from lmx.cli.facts import human_bytes, human_count
from lmx.cli.options import CommonOptions, parse_size, spread_groups
from lmx.conversion import Finished, convert


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("convert", epilog="Example: lmx convert ./mixtral-nf4 ./mixtral --dtype bf16")(
        spread_groups(convert_command)
    )


def convert_command(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A checkpoint's folder, or a hub id.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="The new folder.")],
    *,
    dtype: Annotated[
        Literal["bf16", "fp16", "fp32"] | None,
        typer.Option(help="Of all weights. Without it: as stored; of quantized ones, as before."),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="The most bytes of a file.")] = "5GB",
    force: Annotated[bool, typer.Option("--force", help="Replace DST if it exists.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Never use the network.")] = False,
    revision: Annotated[str | None, typer.Option(help="A hub model's branch, tag or commit.")] = None,
    common: CommonOptions,
) -> None:
    """Write a model as a plain checkpoint in the Hugging Face layout. A quantized one is dequantized.

    A run that was stopped goes on where it stopped when the same command is given again.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    show = may_animate() and not common.quiet
    shard_bytes = parse_size("--max-shard-size", max_shard_size)
    steps = convert(
        source,
        target,
        dtype=dtype,
        max_shard_bytes=shard_bytes,
        force=force,
        revision=revision,
        offline=offline,
        show_progress=show,
    )
    columns = (TextColumn("convert"), BarColumn(), TextColumn("{task.percentage:.0f}%"), TimeRemainingColumn())
    finished: Finished | None = None
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not show) as bar:
        task = bar.add_task("convert", total=None)
        for step in steps:
            if isinstance(step, Finished):
                finished = step
            else:
                bar.update(task, completed=step.parameters, total=step.total)
    if finished is None:
        raise RuntimeError("a conversion ended without a result")
    if json:
        facts = {"source": source, "output": str(target), "parameters": finished.parameters}
        write_json(facts | {"output_bytes": finished.output_bytes})
    note(
        f"{target}: {human_count(finished.parameters)} parameters in {human_bytes(finished.output_bytes)}",
        quiet=common.quiet,
    )
