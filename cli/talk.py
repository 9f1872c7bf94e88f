"""Answering for a script: `-p`, piped text and `--messages`, as text, JSON or a stream of events."""

from collections.abc import Generator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING

from lmx.cli.answers import MERGED, answer_object, cancel_on_interrupt, event_object, left_out
from lmx.cli.console import note, write, write_json
from lmx.core.answer import Event, Finished, Token
from lmx.core.session import ChatSession, Message
from lmx.core.text import types

if TYPE_CHECKING:
    from lmx.cli.chat import OutputOptions


def answer_script(
    name: str,
    session: ChatSession,
    history: Sequence[types.Message],
    turns: Sequence[str],
    output: "OutputOptions",
    *,
    quiet: bool = False,
) -> None:
    """Answer the last turn of `history`, then each of `turns`. Ctrl-C ends the answer and the script.

    quiet: do not say on stderr what the template or the end of the context did to the messages.

    Raises KeyboardInterrupt after an interrupted answer, and whatever the session raises.
    """
    with cancel_on_interrupt() as cancel:
        if history:
            session.load_messages([Message(message["role"], message["content"]) for message in history])
            _print(name, session, session.answer(cancel), output)
        for text in turns:
            if not cancel.is_set():
                _print(name, session, session.ask(text, cancel), output)
        if session.system_merged:
            note(f"lmx: {MERGED}", quiet=quiet)
        if session.left_out:
            note(f"lmx: {left_out(session.left_out)}", quiet=quiet)
        if session.save_error is not None:
            raise session.save_error
        if cancel.is_set():
            raise KeyboardInterrupt


def _print(name: str, session: ChatSession, events: Generator[Event, None, None], output: "OutputOptions") -> None:
    with closing(events):  # before the text process ends, which an answer cut short still needs
        for event in events:
            if isinstance(event, Finished):
                _print_end(name, session, event, output)
            elif output.jsonl:
                write_json(event_object(event))
            elif isinstance(event, Token) and not output.json:
                write(event.text)


def _print_end(name: str, session: ChatSession, finished: Finished, output: "OutputOptions") -> None:
    answer = answer_object(name, session.prompt_ids, finished)
    if output.jsonl:
        write_json(event_object(finished, answer))
    elif output.json:
        write_json(answer)
    else:
        write(finished.tail + "\n")
