"""`lmx list`, `lmx rm` and `lmx verify`: what is in the Hugging Face cache."""

import time
from typing import TYPE_CHECKING, Annotated

import typer

from lmx.cli.console import may_animate, note, write_json
from lmx.cli.facts import human_bytes
from lmx.cli.options import CommonOptions, JsonOption, spread_groups
from lmx.cli.rows import write_rows
from lmx.core.errors import InputError
from lmx.core.text.safe import safe_line

if TYPE_CHECKING:
    from lmx.cache import Repository, Verified

_ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A hub id ORG/NAME[@REVISION] that lmx list shows.")
]
_RevisionOption = Annotated[str | None, typer.Option(help="Only this branch, tag or commit.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command("list", epilog="Example: lmx list --json")(spread_groups(list_command))
    app.command("rm", epilog="Example: lmx rm allenai/OLMoE-1B-7B-0924")(spread_groups(rm_command))
    app.command("verify", epilog="Example: lmx verify allenai/OLMoE-1B-7B-0924")(spread_groups(verify_command))


def list_command(*, json: JsonOption = False, common: CommonOptions) -> None:
    """List what is in the Hugging Face cache, of all tools."""
    from lmx.cache import cache_folder, scan

    repositories = scan()
    if json:
        facts = [_facts(repo) for repo in repositories]
        write_json({"cache": str(cache_folder()), "repositories": facts})
    elif repositories:
        write_rows([_row(repo) for repo in repositories], ("model", "architecture", "size", "revisions", "modified"))
    else:
        note(f"nothing is in {cache_folder()}", quiet=common.quiet)


def rm_command(
    model: _ModelArgument,
    *,
    revision: _RevisionOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be deleted; delete nothing.")] = False,
    json: JsonOption = False,
    common: CommonOptions,
) -> None:
    """Delete a model from the cache.

    All its snapshots go, or one, with every file that no other snapshot shares.
    """
    from lmx.cache import find_in_cache, remove

    repo, revisions = find_in_cache(model, revision)
    freed = 0 if dry_run else remove(repo, revisions)
    commits = [one.commit for one in revisions]
    if json:
        write_json({"model": repo.name, "commits": commits, "freed_bytes": freed, "dry_run": dry_run})
        return
    what = f"{repo.name}: {len(commits)} snapshot{'s' * (len(commits) != 1)}"
    if dry_run:
        note(f"{what} would be deleted, {human_bytes(sum(one.nbytes for one in revisions))}", quiet=common.quiet)
    else:
        note(f"{what} deleted, {human_bytes(freed)} freed", quiet=common.quiet)


def verify_command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A hub id that lmx list shows, or a folder that was pulled.")
    ],
    *,
    revision: _RevisionOption = None,
    json: JsonOption = False,
    common: CommonOptions,
) -> None:
    """Hash a model's files again and compare with the hub's digests."""
    from lmx.cache import verify

    verdicts = []
    for verdict in verify(model, revision):
        verdicts.append(verdict)
        if may_animate() or verdict.verdict != "right":
            note(f"{verdict.verdict:<8} {verdict.name}", quiet=common.quiet)
    bad = [verdict for verdict in verdicts if verdict.verdict in ("damaged", "missing")]
    if json:
        files = [{"name": one.name, "commit": one.commit, "verdict": one.verdict} for one in verdicts]
        write_json({"model": model, "is_right": not bad, "files": files})
    if bad:
        raise InputError(
            f"{model}: {len(bad)} of {len(verdicts)} files are damaged or missing: {_names(bad)}",
            f"delete it and pull it again: lmx rm {model}, then lmx pull {model}",
        )
    if not json:
        unknown = sum(verdict.verdict == "unknown" for verdict in verdicts)
        known = len(verdicts) - unknown
        note(
            f"{model}: {known} files are right" + f", {unknown} have no known digest" * bool(unknown),
            quiet=common.quiet,
        )


def _names(verdicts: "list[Verified]") -> str:
    return ", ".join(verdict.name for verdict in verdicts[:3]) + " ..." * (len(verdicts) > 3)


def _architecture(repo: "Repository") -> tuple[str | None, bool]:
    from lmx.cache import architecture_of

    return architecture_of(repo.revisions[-1].folder) if repo.revisions else (None, False)


def _facts(repo: "Repository") -> dict[str, object]:
    architecture, is_supported = _architecture(repo)
    return {
        "model": repo.name,
        "kind": repo.kind,
        "architecture": architecture,
        "is_supported": is_supported,
        "size_on_disk": repo.nbytes,
        "incomplete_bytes": repo.incomplete_bytes,
        "modified": int(repo.modified),
        "folder": str(repo.folder),
        "revisions": [
            {"commit": one.commit, "refs": list(one.refs), "files": len(one.files), "bytes": one.nbytes}
            for one in repo.revisions
        ],
    }


def _row(repo: "Repository") -> tuple[str, ...]:
    architecture, _ = _architecture(repo)
    refs = [", ".join(one.refs) or one.commit[:8] for one in repo.revisions]
    size = human_bytes(repo.nbytes) + (" (incomplete)" if repo.incomplete_bytes else "")
    cells = (
        repo.name,
        architecture or repo.kind,
        size,
        "; ".join(refs),
        time.strftime("%Y-%m-%d", time.localtime(repo.modified)),
    )
    return tuple(map(safe_line, cells))
