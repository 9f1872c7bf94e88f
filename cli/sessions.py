"""`lmx sessions`: the saved conversations."""

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import typer

from lmx.cli.console import is_terminal, note, write, write_json
from lmx.cli.facts import human_bytes
from lmx.cli.options import CommonOptions, JsonOption, spread_groups
from lmx.cli.rows import write_rows
from lmx.cli.session_store import sessions_folder
from lmx.core.conversation import Message
from lmx.core.errors import ConflictError, InputError
from lmx.core.files import quoted, write_atomically
from lmx.core.session_folders import SessionInfo, list_sessions, read_session, remove_session
from lmx.core.text.safe import safe_line

_HEADINGS = {"system": "System", "user": "User", "assistant": "Assistant"}
_TITLE_LENGTH = 60

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="A session's name, as lmx sessions list shows it.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    sessions = typer.Typer(
        help="List, show, delete and export saved conversations.",
        epilog="Example: lmx sessions list",
        invoke_without_command=True,
    )
    sessions.callback()(_help_alone)
    sessions.command("list", epilog="Example: lmx sessions list")(spread_groups(list_command))
    sessions.command("show", epilog="Example: lmx sessions show trip-to-rome")(spread_groups(show_command))
    sessions.command("rm", epilog="Example: lmx sessions rm trip-to-rome")(spread_groups(remove_command))
    sessions.command("export", epilog="Example: lmx sessions export trip-to-rome -o trip.md")(
        spread_groups(export_command)
    )
    app.add_typer(sessions, name="sessions")


def _help_alone(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def list_command(
    *,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each session.")] = False,
    common: CommonOptions,
) -> None:
    """List the saved conversations, the one used last first."""
    found = list_sessions(sessions_folder())
    if json:
        for info in found:
            write_json(_facts(info))
        return
    if not found:
        note("nothing is saved; lmx chat --session NAME does it", quiet=common.quiet)
    else:
        write_rows([(safe_line(info.name), _summary(info)) for info in found])


def show_command(
    name: NameArgument,
    *,
    json: JsonOption = False,
    common: CommonOptions,
) -> None:
    """Show a conversation, as it stands on its current branch."""
    info = read_session(sessions_folder(), name)
    if json:
        write_json(_facts(info) | {"messages": _as_json(_messages(info))})
    else:
        write(_markdown(info))


def remove_command(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Sessions to delete.")],
    *,
    common: CommonOptions,
) -> None:
    """Delete conversations with all that is saved of them."""
    for name in names:
        remove_session(sessions_folder(), name)
        note(f"deleted {safe_line(name)}", quiet=common.quiet)


def export_command(
    name: NameArgument,
    *,
    form: Annotated[
        Literal["md", "json"] | None,
        typer.Option("--format", help="Markdown, or a JSON list that lmx chat --messages reads. Default: by --output."),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Default: stdout.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
    common: CommonOptions,
) -> None:
    """Write a conversation as Markdown or JSON."""
    import json

    info = read_session(sessions_folder(), name)
    as_json = form == "json" or (form is None and output is not None and output.suffix == ".json")
    text = json.dumps(_as_json(_messages(info)), indent=2) + "\n" if as_json else _markdown(info)
    if output is None:
        # A file gets each character as it was said; a terminal does not
        (write if is_terminal(sys.stdout) else sys.stdout.write)(text)
        return
    if output.exists() and not force:
        raise ConflictError(f"{quoted(str(output))} exists already", "choose another name, or replace it with --force")
    write_atomically(output, text.encode())
    note(f"wrote {output}", quiet=common.quiet)


def _messages(info: SessionInfo) -> list[Message]:
    if info.record is None:
        raise InputError(info.problem or "the session cannot be read", "`lmx sessions rm` removes it")
    head = info.record.conversation.head
    system = [] if head is None or head.system is None else [Message("system", head.system)]
    return [*system, *([] if head is None else head.all_messages()), *info.record.question]


def _as_json(messages: list[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def _facts(info: SessionInfo) -> dict[str, object]:
    about: dict[str, object] = {"name": info.name, "bytes": info.nbytes, "modified": _time(info), "error": info.problem}
    if info.record is None:
        return about
    record, head = info.record, info.record.conversation.head
    return about | {
        "model": record.identity.model,
        "scheme": record.identity.scheme,
        "created": record.created,
        "turns": 0 if head is None else head.depth,
        "branches": len(record.conversation.heads),
        "tokens": 0 if head is None else head.length,
    }


def _summary(info: SessionInfo) -> str:
    if info.record is None:
        return safe_line(f"cannot be read: {info.problem}")
    facts = _facts(info)
    first = next((m.content for m in _messages(info) if m.role == "user"), "")
    title = safe_line(first, _TITLE_LENGTH)
    words = [f"{facts['turns']} turns", f"{facts['model']} ({facts['scheme']})", human_bytes(info.nbytes), _time(info)]
    return safe_line(" · ".join([*words, title]))


def _time(info: SessionInfo) -> str:
    return datetime.fromtimestamp(info.modified, UTC).isoformat(timespec="seconds")


def _markdown(info: SessionInfo) -> str:
    messages = _messages(info)
    identity = info.record.identity if info.record is not None else None
    lines = [f"# {info.name}", ""]
    if identity is not None:
        lines += [f"Model: {identity.model} ({identity.scheme})", ""]
    for message in messages:
        lines += [f"## {_HEADINGS.get(message.role, message.role)}", "", message.content, ""]
    return "\n".join(lines)
