"""The `lmx` command: its subcommands and what they share."""

from typing import Annotated

import typer

import lmx
from lmx.cli import bench, cache, chat, convert, evaluate, generate, pull, quantize, sessions, show

app = typer.Typer(
    help="Run FalconMamba, RecurrentGemma, OLMoE, DBRX and Mixtral on the machine you have.",
    epilog="Example: lmx chat",
    add_completion=False,
    rich_markup_mode=None,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


@app.callback()
def _main(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(f"lmx {lmx.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


# In the order of docs/cli.md, which is that of `lmx --help`
for command in (chat, sessions, generate, pull, cache, show, evaluate, bench, quantize, convert):
    command.register(app)
