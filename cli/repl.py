"""The conversation of a person at a terminal: messages in, answers streamed out, commands in between."""

import sys
import threading
from collections.abc import Callable, Generator
from contextlib import closing

from lmx.cli.answers import MERGED, cancel_on_interrupt, left_out
from lmx.cli.commands import Commands
from lmx.cli.console import dim, note, write
from lmx.cli.facts import human_bytes, human_count
from lmx.cli.lines import open_reader
from lmx.cli.loading import Loaded
from lmx.cli.screen import open_screen, quiet_keys
from lmx.cli.session_store import SessionStore
from lmx.core.answer import Event, Finished, Token
from lmx.core.errors import LmxError
from lmx.core.memory import resident_memory_bytes
from lmx.core.session import ChatSession
from lmx.core.text.safe import safe_line

HINT = "/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves"
DEMO = "This is the small demo that comes with lmx. For a real model: lmx chat FOLDER, or lmx chat ORG/NAME"

Ask = Callable[[threading.Event], Generator[Event, None, None]]


class Repl:
    """Reads what a person types and prints the model's answers, until they leave."""

    def __init__(
        self, running: Loaded, session: ChatSession, *, plain: bool, quiet: bool, reread: bool = False
    ) -> None:
        self.session = session
        self.plain = plain
        self.leaving = False
        self.editing = False
        """Whether the last message is being edited: what is sent next replaces it."""
        self.merge_told = False
        self.last: Finished | None = None
        self.store = SessionStore(running, reread=reread, confirm=_confirm)
        self._running, self._quiet = running, quiet
        self._left_out_told, self._full_told = 0, False
        self._commands = Commands(self)
        self.reader = open_reader(plain=plain, commands=sorted(self._commands.by_name), status=self.status_line)

    def run(self, session_name: str | None = None, system: str | None = None) -> None:
        """Talk until the person leaves; first go on with the session of this name, or begin it.

        system: the system's message that was asked for, for a session that has another one.

        Raises what opening the session raises, and otherwise only what ends the process.
        """
        existed = session_name is not None and self.store.load_or_save(self.session, session_name, system)
        self._greet()
        if existed:
            self.tell_resumed()
        while not self.leaving:
            try:
                line = self._read()
            except KeyboardInterrupt:
                self.editing = False
                continue
            except EOFError:
                break
            if line.strip():
                self._obey(line)

    def say(self, text: str) -> None:
        """A remark of ours, not the model's."""
        line = safe_line(text)
        sys.stdout.write((line if self.plain else dim(line)) + "\n")
        sys.stdout.flush()

    def stream(self, ask: Ask) -> None:
        """Show an answer. Ctrl-C ends it where it is; what was said so far stays in the conversation."""
        finished = None
        with cancel_on_interrupt() as cancel, closing(ask(cancel)) as events, quiet_keys():
            first = next(events, None)  # what is wrong with a message is told before anything is drawn
            with open_screen(plain=self.plain) as screen:
                for event in _behind(first, events):
                    if isinstance(event, Token):
                        screen.add(event.text)
                    elif isinstance(event, Finished):
                        screen.add(event.tail)
                        finished = event
        if finished is not None:
            self.last = finished
            self._tell(finished)

    def summary(self, finished: Finished) -> str:
        """An answer in numbers."""
        parts = [f"{finished.generated_tokens} tokens, {finished.generated_tokens_per_second:.1f} tokens/s"]
        parts.append(f"{finished.computed_prompt_tokens} of {finished.prompt_tokens} prompt tokens computed")
        parts.append(self.context())
        if finished.reason == "cancelled":
            parts.insert(0, "stopped")
        if finished.reason == "length":
            parts.insert(0, "cut off at the limit")
        return " · ".join(parts)

    def context(self) -> str:
        """How much of the context is used."""
        used, length = self.session.context_used, self.session.context_length
        return f"context {used:,}" if length is None else f"context {used:,} of {length:,}"

    def facts(self) -> str:
        """What model this is."""
        model = self._running.model
        parameters = human_count(sum(weight.numel() for weight in model.parameters()))
        dtype = str(model.decoder.embed.weight.dtype).removeprefix("torch.")
        return f"{self._running.name} ({model.family}, {parameters} parameters, {dtype} on {model.device.type})"

    def status_line(self) -> str:
        """The line at the bottom: model, scheme, context, speed, memory."""
        parts = [self._running.name.rstrip("/").rpartition("/")[2], self._running.scheme, self.context()]
        if self.last is not None:
            parts.append(f"{self.last.generated_tokens_per_second:.1f} tokens/s")
        parts.append(human_bytes(resident_memory_bytes()))
        if self.session.saved is not None:
            parts.append(self.session.saved.name)
        if len(self.session.branches) > 1:
            parts.append(f"branch {self.session.branch + 1} of {len(self.session.branches)}")
        if self.reader.multiline:
            parts.append(f"{self.reader.sends} sends")
        return safe_line(" · ".join(parts))

    def tell_resumed(self) -> None:
        """What the conversation was about, and that it goes on."""
        session = self.session
        for message in session.messages[-2:]:
            write(f"{'> ' if message.role == 'user' else ''}{message.content}\n")
        turns, saved = len(session.turns), session.saved
        if saved is not None and not self._quiet:
            self.say(f"{saved.name} goes on: {turns} messages, {self.context()}, nothing is read again")
        if session.waiting:
            self.say("The last message was not answered: /regen answers it; anything else you say replaces it.")

    def _read(self) -> str:
        if not self.editing:
            return self.reader.read()
        said = [message.content for message in self.session.messages if message.role == "user"]
        return self.reader.read(said[-1] if said else "")

    def _obey(self, line: str) -> None:
        """One message: a command, or something to answer. What is wrong with it is told, and the talk goes on."""
        editing, self.editing = self.editing, False
        try:
            if line.startswith("/"):
                self._commands.run(line)
            elif editing:
                self.stream(lambda cancel: self.session.edit(line, cancel))
            else:
                self._answer(line)
        except LmxError as error:
            note(f"lmx: error: {error.message}")
            note(f"lmx: hint: {error.hint}")
        except KeyboardInterrupt:  # a second Ctrl-C: the session is as it was before the message
            write("\n")
            self.say("Stopped at once. The conversation is as it was before your message.")

    def _answer(self, text: str) -> None:
        if self.session.waiting:
            self.session.undo()
        self.stream(lambda cancel: self.session.ask(text, cancel))

    def _tell(self, finished: Finished) -> None:
        """What a person should know after an answer."""
        session = self.session
        if session.system_merged and not self.merge_told:
            self.merge_told = True
            self.say(MERGED)
        if session.left_out > self._left_out_told:
            self.say(left_out(session.left_out))
        self._left_out_told = session.left_out
        if session.save_error is not None:
            note(f"lmx: error: {session.save_error.message}")
            note("lmx: hint: the conversation goes on and is no longer saved; /save NAME saves all of it elsewhere")
            session.save_error = None
        if not self._quiet:
            self.say(f"[{self.summary(finished)}]")
        if session.is_nearly_full and not self._full_told:
            self.say(
                "The context is nearly full. /set on-full drop leaves the oldest messages out; /clear begins anew."
                if session.on_full == "stop"
                else "The context is nearly full: the oldest messages will be left out."
            )
        self._full_told = session.is_nearly_full

    def _greet(self) -> None:
        if self._quiet:
            return
        self.say(f"lmx chat: {self.facts()}")
        if self._running.opened.is_demo:
            self.say(DEMO)
        self.say(HINT)


def _behind(first: Event | None, others: Generator[Event, None, None]) -> Generator[Event, None, None]:
    if first is not None:
        yield first
        yield from others


def _confirm(question: str) -> bool:
    """Ask the person at the terminal; anything but yes is no."""
    try:
        return input(safe_line(question) + " [y/N] ").strip().lower() in ("y", "yes")
    except (EOFError, KeyboardInterrupt):
        write("\n")
        return False
