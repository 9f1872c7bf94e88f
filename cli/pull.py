"""`lmx pull`: a model from the hub into the cache."""

from pathlib import Path
from typing import Annotated

import typer

from lmx.cli.console import note, write, write_json
from lmx.cli.facts import human_bytes
from lmx.cli.options import CommonOptions, JsonOption, spread_groups
from lmx.cli.pull_progress import planned_line, pull_watcher
from lmx.cli.rows import write_rows
from lmx.core.errors import UsageError
from lmx.core.text.safe import safe_line
from lmx.pulling import Planned, Pulled, Wish, find_pulled, plan_pull, pull_events

_NAMES_SHOWN = 4


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("pull", epilog="Example: lmx pull mistralai/Mixtral-8x7B-Instruct-v0.1")(spread_groups(pull_command))


def pull_command(
    repo: Annotated[str, typer.Argument(metavar="REPO", help="A hub id ORG/NAME[@REVISION].")],
    *,
    revision: Annotated[str | None, typer.Option(help="A branch, tag or commit.")] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Take exactly the files that match, whatever a run needs. May be repeated."),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Leave out files that match. May be repeated.")
    ] = None,
    token: Annotated[
        str | None, typer.Option(help="For gated and private models. Without it: HF_TOKEN, or `hf auth login`.")
    ] = None,
    local_dir: Annotated[
        Path | None, typer.Option("--local-dir", metavar="DIR", help="Put the files here, not into the cache.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be pulled; write nothing.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Only look whether the cache has it.")] = False,
    json: JsonOption = False,
    common: CommonOptions,
) -> None:
    """Pull a model into the Hugging Face cache and print its folder.

    Only what a run needs is taken, and checked against its digests. A pull that was stopped goes on where it stopped.
    """
    if offline:
        if local_dir is not None or dry_run:
            raise UsageError("--offline only looks into the cache", "leave out --local-dir and --dry-run")
        _print_folder(find_pulled(repo, revision=revision), json)
        return
    wish = Wish.of(repo, revision, include or (), exclude or (), token, local_dir)
    if dry_run:
        _show_plan(plan_pull(wish), json)
        return
    pulled = pull_watcher(common.quiet)(pull_events(wish))
    note(_done_line(pulled), quiet=common.quiet)
    if json:
        write_json(_facts(pulled.plan) | {"folder": str(pulled.folder), "fetched_bytes": pulled.fetched_bytes})
    else:
        write(f"{pulled.folder}\n")


def _print_folder(folder: Path, json: bool) -> None:
    if json:
        write_json({"folder": str(folder), "fetched_bytes": 0})
    else:
        write(f"{folder}\n")


def _done_line(pulled: Pulled) -> str:
    if not pulled.plan.missing:
        return planned_line(pulled.plan)
    return f"{pulled.plan.repo}: {human_bytes(pulled.fetched_bytes)} fetched, every file checked"


def _show_plan(plan: Planned, json: bool) -> None:
    if json:
        write_json(_facts(plan))
        return
    missing = {file.name for file in plan.missing}
    rows = [("model", f"{plan.repo} at {plan.commit}")]
    for file in plan.files:
        rows.append((human_bytes(file.size), file.name + ("" if file.name in missing else " (here)")))
    for group in plan.left_out:
        names = ", ".join(group.names[:_NAMES_SHOWN])
        more = len(group.names) - _NAMES_SHOWN
        names += f" and {more} more" if more > 0 else ""
        rows.append(("left out", f"{human_bytes(group.nbytes)}, {group.reason}: {names}"))
    rows.append(("to fetch", f"{human_bytes(plan.missing_bytes)} of {human_bytes(plan.total_bytes)}"))
    write_rows([(name, safe_line(value)) for name, value in rows])


def _facts(plan: Planned) -> dict[str, object]:
    missing = {file.name for file in plan.missing}
    return {
        "model": plan.repo,
        "commit": plan.commit,
        "files": [
            {"name": file.name, "bytes": file.size, "digest": file.digest, "is_here": file.name not in missing}
            for file in plan.files
        ],
        "total_bytes": plan.total_bytes,
        "missing_bytes": plan.missing_bytes,
        "left_out": [
            {"reason": group.reason, "files": list(group.names), "bytes": group.nbytes} for group in plan.left_out
        ],
        "saved_bytes": plan.saved_bytes,
    }
