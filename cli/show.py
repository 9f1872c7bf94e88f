"""`lmx show`: what a model is and what it needs, from its headers and configs alone."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lmx.api import model_name
from lmx.cli.console import write_json
from lmx.cli.facts import human_bytes, human_count, share_line
from lmx.cli.options import (
    CommonOptions,
    JsonOption,
    ModelArgument,
    OfflineOption,
    RevisionOption,
    parse_size,
    spread_groups,
)
from lmx.cli.pull_progress import pull_watcher
from lmx.cli.rows import write_rows
from lmx.core.errors import InputError, LmxError, NetworkError, NotFoundError
from lmx.core.text.safe import safe_line
from lmx.device import planned_budgets

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
    json: JsonOption = False,
    offline: OfflineOption = False,
    revision: RevisionOption = None,
    gpu_memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="What would lie where if so much were taken of each GPU, or of one."),
    ] = None,
    common: CommonOptions,
) -> None:
    """Show what a model is and what it needs, reading no weights.

    Of a repository in the cache that lmx cannot run, it shows what is known.
    """
    from lmx.describe import describe, open_described

    memory = None if gpu_memory is None else parse_size("--gpu-memory", gpu_memory)
    try:
        checkpoint = open_described(model, revision=revision, offline=offline, watch=pull_watcher(common.quiet))
        description = describe(model_name(model, revision), checkpoint, planned_budgets(memory))
    except (InputError, NetworkError, NotFoundError) as error:
        _show_cached(model, revision, json, error)
        return
    if json:
        write_json(asdict(description) | {"memory_to_run": description.memory_to_run})
    else:
        write_rows(_rows(description))


def _show_cached(model: str | None, revision: str | None, json: bool, error: LmxError) -> None:
    """What the cache knows of a repository that cannot be described as a model. Raises `error` if it is not there."""
    from lmx.cache import describe_cached

    if model is None or Path(model).exists():
        raise error
    try:
        facts = describe_cached(model, revision)
    except NotFoundError:
        raise error from None
    if facts.is_supported and isinstance(error, InputError):  # it should run, and is broken
        raise error
    if json:
        write_json(asdict(facts) | {"problem": error.message})
        return
    rows = [
        ("model", facts.model),
        ("architecture", facts.architecture or "not stated"),
        ("commit", " ".join((facts.commit, *facts.refs))),
        ("files", str(facts.files)),
        ("size on disk", human_bytes(facts.size_on_disk)),
        ("license", facts.license),
        ("folder", facts.folder),
        ("runs", f"no: {error.message}"),
    ]
    write_rows([(name, safe_line(value)) for name, value in rows])


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
        *(("placement", share_line(share, facts.layers)) for share in facts.placement),
    ]
    if facts.read_as is not None:
        rows.insert(1, ("read as", facts.read_as))
    return [(name, safe_line(value)) for name, value in rows]
