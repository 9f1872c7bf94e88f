"""The conversation of a person at a terminal: lines in, answers streamed out, a few commands."""

import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

from lmx.cli.answers import cancel_on_interrupt, peak_memory_bytes
from lmx.cli.console import dim, note, write
from lmx.cli.facts import human_bytes, human_count
from lmx.cli.lines import open_reader
from lmx.cli.loading import Loaded
from lmx.core.answer import Finished, Token
from lmx.core.errors import LmxError
from lmx.core.session import ChatSession
from lmx.core.text.safe import safe_line

HINT = "/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves"
DEMO = "This is the small demo that comes with lmx. For a real model: lmx chat FOLDER, or lmx chat ORG/NAME"


@dataclass(frozen=True)
class Command:
    """What a line that begins with a slash does. `run` takes what follows the command's name."""

    usage: str
    help: str
    run: Callable[[str], None]


class Repl:
    """Reads what a person types and prints the model's answers, until they leave."""

    def __init__(self, running: Loaded, session: ChatSession, *, plain: bool, quiet: bool) -> None:
        self._running, self._session = running, session
        self._plain, self._quiet = plain, quiet
        self._leaving = False
        self._merge_told = False
        self._last: Finished | None = None
        self._commands = {
            "/help": Command("/help", "list the commands", self._help),
            "/system": Command("/system [TEXT]", "show or replace the system's message", self._system),
            "/clear": Command("/clear", "begin a new conversation", self._clear),
            "/show": Command("/show", "what model this is", self._show),
            "/stats": Command("/stats", "tokens, speed and memory so far", self._stats),
            "/exit": Command("/exit", "leave; Ctrl-D does, too", self._exit),
        }

    def run(self) -> None:
        """Talk until the person leaves. Raises only what ends the process."""
        self._greet()
        read = open_reader(plain=self._plain)
        while not self._leaving:
            try:
                line = read()
            except KeyboardInterrupt:
                continue
            except EOFError:
                break
            if line.strip():
                self._obey(line)

    def _obey(self, line: str) -> None:
        """One line: a command, or something to answer. What is wrong with it is told, and the conversation goes on."""
        try:
            if line.startswith("/"):
                self._command(line)
            else:
                self._answer(line)
        except LmxError as error:
            note(f"lmx: error: {error.message}")
            note(f"lmx: hint: {error.hint}")
        except KeyboardInterrupt:  # a second Ctrl-C: the session is as it was before the message
            write("\n")
            self._say("Stopped at once. The conversation is as it was before your message.")

    def _command(self, line: str) -> None:
        name, _, rest = line.strip().partition(" ")
        command = self._commands.get(name)
        if command is None:
            self._say(f"There is no {name}. {HINT}; begin with a space to send a text that begins with a slash.")
        else:
            command.run(rest.strip())

    def _answer(self, text: str) -> None:
        """Stream the answer. Ctrl-C ends it where it is; what was said so far stays in the conversation."""
        finished = None
        with cancel_on_interrupt() as cancel, closing(self._session.ask(text, cancel)) as events:
            for event in events:
                if isinstance(event, Token):
                    write(event.text)
                elif isinstance(event, Finished):
                    finished = event
        if finished is None:
            return
        write(finished.tail + "\n")
        self._last = finished
        self._status(finished)

    def _status(self, finished: Finished) -> None:
        if self._session.system_merged and not self._merge_told:
            self._merge_told = True
            self._say("The template has no system role: the system's message went into the first of yours.")
        if not self._quiet:
            self._say(f"[{self._summary(finished)}]")

    def _summary(self, finished: Finished) -> str:
        parts = [f"{finished.generated_tokens} tokens, {finished.generated_tokens_per_second:.1f} tokens/s"]
        parts.append(f"{finished.computed_prompt_tokens} of {finished.prompt_tokens} prompt tokens computed")
        parts.append(self._context())
        if finished.reason == "cancelled":
            parts.insert(0, "stopped")
        if finished.reason == "length":
            parts.insert(0, "cut off at the limit")
        return " · ".join(parts)

    def _context(self) -> str:
        used, length = self._session.context_used, self._session.context_length
        return f"context {used:,}" if length is None else f"context {used:,} of {length:,}"

    def _greet(self) -> None:
        if self._quiet:
            return
        self._say(f"lmx chat: {self._facts()}")
        if self._running.opened.is_demo:
            self._say(DEMO)
        self._say(HINT)

    def _facts(self) -> str:
        model = self._running.model
        parameters = human_count(sum(weight.numel() for weight in model.parameters()))
        dtype = str(model.decoder.embed.weight.dtype).removeprefix("torch.")
        return f"{self._running.name} ({model.family}, {parameters} parameters, {dtype} on {model.device.type})"

    def _say(self, text: str) -> None:
        """A remark of ours, not the model's."""
        line = safe_line(text)
        sys.stdout.write((line if self._plain else dim(line)) + "\n")
        sys.stdout.flush()

    def _help(self, _rest: str) -> None:
        for command in self._commands.values():
            self._say(f"{command.usage} - {command.help}")
        self._say(
            "A line that ends with a backslash goes on in the next one"
            + ("." if self._plain else "; so does Alt-Enter.")
        )

    def _system(self, text: str) -> None:
        if text:
            self._session.set_system(text)
            self._merge_told = False
        system = self._session.system
        self._say("No system message is set." if system is None else f"System: {system}")

    def _clear(self, _rest: str) -> None:
        self._session.clear()
        self._last = None
        self._say("A new conversation begins.")

    def _show(self, _rest: str) -> None:
        self._say(self._facts())

    def _stats(self, _rest: str) -> None:
        if self._last is not None:
            self._say(f"last answer: {self._summary(self._last)}")
        answers = sum(message.role == "assistant" for message in self._session.messages)
        self._say(f"{answers} answers, {self._context()}, at most {human_bytes(peak_memory_bytes())} of memory so far")

    def _exit(self, _rest: str) -> None:
        self._leaving = True
