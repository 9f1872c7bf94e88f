"""`lmx chat`: talk with a model, in a terminal or for a script."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lmx.cli.console import is_terminal
from lmx.cli.loading import Loaded, loaded
from lmx.cli.options import AnswersOption, CommonOptions, ModelArgument, RuntimeOptions, SamplingOptions, spread_groups
from lmx.cli.prompts import read_messages, read_stdin, read_text, text_prompt
from lmx.cli.session_store import sessions_folder
from lmx.core.errors import InputError, UsageError
from lmx.core.session_folders import session_folder
from lmx.core.text.types import Message

if TYPE_CHECKING:
    from lmx.core.session import ChatSession


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("chat", epilog='Example: lmx chat -p "What does lmx quantize do?"')(spread_groups(chat_command))


@dataclass(frozen=True)
class SystemOptions:
    """What the model is told before the conversation."""

    system: Annotated[str | None, typer.Option(metavar="TEXT", help="The system's message.")] = None
    system_file: Annotated[Path | None, typer.Option(metavar="FILE", help="The system's message from a file.")] = None

    def text(self) -> str | None:
        """The system's message. Raises UsageError, InputError, NotFoundError."""
        if self.system is not None and self.system_file is not None:
            raise UsageError("--system and --system-file exclude each other", "give one of them")
        return self.system if self.system_file is None else read_text(self.system_file, "--system-file")


@dataclass(frozen=True)
class OutputOptions:
    """In which form answers are printed."""

    json: AnswersOption = False
    jsonl: Annotated[bool, typer.Option("--jsonl", help="Print one JSON object for each event, as it comes.")] = False
    plain: Annotated[bool, typer.Option("--plain", help="No line editing and no colours, for any terminal.")] = False

    def __post_init__(self) -> None:
        """Raise UsageError where two forms are asked for."""
        if self.json and self.jsonl:
            raise UsageError("--json and --jsonl exclude each other", "give one of them")


@dataclass(frozen=True)
class SessionOptions:
    """Where the conversation is saved."""

    session: Annotated[
        str | None, typer.Option(metavar="NAME", help="Save each turn under this name; go on with it if it exists.")
    ] = None
    reread: Annotated[
        bool, typer.Option("--reread", help="Let this model read again what a session has from another one.")
    ] = False


def chat_command(
    model: ModelArgument = None,
    *,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", metavar="TEXT", help="Answer this and exit. Repeated: a conversation."),
    ] = None,
    messages: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Answer the last turn of a JSON list of role and content; - for stdin."),
    ] = None,
    system: SystemOptions,
    saving: SessionOptions,
    on_full: Annotated[
        Literal["stop", "drop"],
        typer.Option(help="Where the context is full: end the answer, or leave the oldest turns out."),
    ] = "stop",
    output: OutputOptions,
    sampling: SamplingOptions,
    runtime: RuntimeOptions,
    common: CommonOptions,
) -> None:
    """Talk with a model. What is piped in is answered as one message."""
    if saving.session is not None:
        if messages is not None:
            raise UsageError("--messages and --session exclude each other", "give one of them")
        session_folder(sessions_folder(), saving.session)  # a name that cannot be is told before a model is loaded
    script = _script(prompt or [], messages, system.text(), output)
    with loaded(model, runtime, common, script.opening) as running:
        session = running.model.chat(
            sampling=sampling.over(running.model.sampling),
            system=script.system,
            max_new_tokens=sampling.max_new_tokens,
            stop=sampling.stop,
            on_full=on_full,
        )
        try:
            _talk(running, session, script, saving, output, common)
        finally:
            session.detach()


@dataclass(frozen=True)
class Script:
    """What is said: a conversation so far, then turns to answer in order; neither means a person types."""

    system: str | None
    history: tuple[Message, ...]
    turns: tuple[str, ...]

    @property
    def is_interactive(self) -> bool:
        """Whether a person types the turns."""
        return not self.turns and not self.history

    @property
    def opening(self) -> list[Message]:
        """The first thing that the template will have to render, as far as it is known."""
        if self.history:
            return self._with_system([*self.history])
        first = self.turns[0] if self.turns else "Hello"
        return self._with_system([Message(role="user", content=first)])

    def _with_system(self, messages: list[Message]) -> list[Message]:
        if self.system is None or messages[0]["role"] == "system":
            return messages
        return [Message(role="system", content=self.system), *messages]


def _script(prompts: list[str], messages: str | None, system: str | None, output: OutputOptions) -> Script:
    """What to answer, from the one place that names it. Raises UsageError, InputError, NotFoundError."""
    if prompts and messages is not None:
        raise UsageError("--prompt and --messages exclude each other", "give one of them")
    if messages is not None:
        return Script(system, tuple(_conversation(messages)), ())
    if prompts:
        for text in prompts:
            text_prompt(text, "--prompt")
        return Script(system, (), tuple(prompts))
    if not is_terminal(sys.stdin):
        text = read_stdin()
        text_prompt(text, "the message from stdin")
        return Script(system, (), (text,))
    if output.json or output.jsonl or not is_terminal(sys.stdout):
        raise UsageError("there is no message to answer", "give it with -p TEXT, or pipe it into lmx chat")
    return Script(system, (), ())


def _conversation(file: str) -> list[Message]:
    messages = read_messages(file)
    if messages[-1]["role"] != "user":
        raise InputError("--messages: the last message is not the user's", "end it with what is to be answered")
    return messages


def _talk(
    running: Loaded,
    session: "ChatSession",
    script: Script,
    saving: SessionOptions,
    output: OutputOptions,
    common: CommonOptions,
) -> None:
    """Answer the script, or hand over to the person at the terminal."""
    if script.is_interactive:
        from lmx.cli.repl import Repl

        repl = Repl(running, session, plain=output.plain, quiet=common.quiet, reread=saving.reread)
        repl.run(saving.session, script.system)
        return
    from lmx.cli.session_store import SessionStore
    from lmx.cli.talk import answer_script

    if saving.session is not None:
        SessionStore(running, reread=saving.reread).load_or_save(session, saving.session, script.system)
        if session.waiting:  # what a killed run was about to answer: the script says what it wants
            session.undo()
    answer_script(running.name, session, script.history, script.turns, output, quiet=common.quiet)
