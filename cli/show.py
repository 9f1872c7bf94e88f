"""`lmx show`: what a model is and what it needs, from its headers and configs alone."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from lmx.api import model_name
from lmx.cli.console import write_json
from lmx.cli.facts import human_bytes, human_count
from lmx.cli.options import CommonOptions, ModelArgument, spread_groups
from lmx.cli.pull_progress import pull_watcher
from lmx.cli.rows import write_rows
from lmx.core.text.safe import safe_line

if TYPE_CHECKING:
    from lmx.describe import Description


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("show", epilog="Example: lmx show mistralai/Mixtral-8x7B-Instruct-v0.1 --json")(
        spread_groups(show_command)
    )


def show_command(
    model: ModelArgument = None,
    *,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Never use the network.")] = False,
    revision: Annotated[str | None, typer.Option(help="A hub model's branch, tag or commit.")] = None,
    common: CommonOptions,
) -> None:
    """Show what a model is and what it needs, reading no weights."""
    from lmx.describe import describe, open_described

    checkpoint = open_described(model, revision=revision, offline=offline, watch=pull_watcher(common.quiet))
    description = describe(model_name(model, revision), checkpoint)
    if json:
        write_json(asdict(description) | {"memory_to_run": description.memory_to_run})
    else:
        write_rows(_rows(description))


def _rows(facts: "Description") -> list[tuple[str, str]]:
    """Names and values for people; names are those of the JSON, with spaces."""
    active = f"{human_count(facts.parameters)}, {human_count(facts.active_parameters)} active for a token"
    memory = f"{human_bytes(facts.memory_to_run)} = weights {human_bytes(facts.weight_bytes)} + state "
    rows = [
        ("model", facts.model),
        ("architecture", f"{facts.architecture} ({facts.model_type})"),
        ("parameters", active if facts.active_parameters < facts.parameters else human_count(facts.parameters)),
        ("dtype", facts.dtype),
        ("quantization", facts.quantization or "none"),
        ("size on disk", human_bytes(facts.size_on_disk)),
        ("memory to run", f"{memory}{human_bytes(facts.state_bytes)} at {facts.state_context:,} tokens"),
        ("context length", "no limit" if facts.context_length is None else f"{facts.context_length:,} tokens"),
        ("vocabulary", f"{facts.vocabulary:,} tokens"),
        ("chat template", "none" if facts.chat_template is None else f"in {facts.chat_template}"),
        ("license", facts.license),
        ("kernels", facts.kernels),
    ]
    return [(name, safe_line(value)) for name, value in rows]
