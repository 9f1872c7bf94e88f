"""What a line that begins with a slash does."""

import base64
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmx.cli import settings
from lmx.cli.console import is_terminal
from lmx.cli.facts import human_bytes
from lmx.core.conversation import Turn
from lmx.core.errors import UsageError
from lmx.core.memory import peak_memory_bytes
from lmx.core.text.safe import safe_line

if TYPE_CHECKING:
    from lmx.cli.repl import Repl

_SNIPPET = 40


@dataclass(frozen=True)
class Command:
    """A command. `run` takes what follows its name."""

    usage: str
    help: str
    run: Callable[[str], None]


class Commands:
    """All of them, over one running chat."""

    def __init__(self, repl: "Repl") -> None:
        self._repl = repl
        self.by_name = {
            "/help": Command("/help", "list the commands", self._help),
            "/system": Command("/system [TEXT]", "show or replace the system's message; off removes it", self._system),
            "/set": Command("/set [NAME VALUE]", "show or change how tokens are chosen, and the like", self._set),
            "/show": Command("/show", "what model this is, and where the conversation is saved", self._show),
            "/regen": Command("/regen", "answer the last message again; the first answer stays a branch", self._regen),
            "/undo": Command("/undo [N]", "take the last message and its answer back, or the last N", self._undo),
            "/edit": Command("/edit [TEXT]", "say the last message otherwise; the old one stays a branch", self._edit),
            "/fork": Command("/fork [N]", "begin a branch here, or after message N", self._fork),
            "/branches": Command("/branches [N]", "list the branches, or go on with branch N", self._branches),
            "/save": Command("/save NAME", "save the conversation, and from now on each turn", self._save),
            "/load": Command("/load NAME", "go on with a saved conversation", self._load),
            "/sessions": Command("/sessions", "list the saved conversations", self._sessions),
            "/clear": Command("/clear", "begin a new conversation; what is saved stays", self._clear),
            "/stats": Command("/stats", "tokens, speed and memory so far", self._stats),
            "/multiline": Command("/multiline", "let Enter begin a new line, or send again", self._multiline),
            "/copy": Command("/copy", "copy the last answer to the clipboard, through the terminal", self._copy),
            "/exit": Command("/exit", "leave; Ctrl-D does, too", self._exit),
        }

    def run(self, line: str) -> None:
        """One line. Raises what the command raises."""
        name, _, rest = line.strip().partition(" ")
        command = self.by_name.get(name)
        if command is None:
            self._repl.say(
                f"There is no {name}. /help lists the commands; begin with a space to send a text that begins with a "
                "slash."
            )
        else:
            command.run(rest.strip())

    def _help(self, _rest: str) -> None:
        for command in self.by_name.values():
            self._repl.say(f"{command.usage} - {command.help}")
        self._repl.say(
            "A line that ends with a backslash goes on in the next one"
            + ("; so does Alt-Enter." if self._repl.reader.edits else ".")
        )

    def _system(self, text: str) -> None:
        session = self._repl.session
        if text:
            session.set_system(None if text == "off" else text)
            self._repl.merge_told = False
        system = session.system
        self._repl.say("No system message is set." if system is None else f"System: {system}")

    def _set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        if bool(name) != bool(value.strip()):
            raise UsageError(f"/set {name} has no value", "write it like /set temperature 0.7")
        if name:
            settings.change(self._repl.session, name, value.strip())
        for line in settings.show(self._repl.session):
            if not name or line.split()[0] == name.replace("_", "-"):
                self._repl.say(line)

    def _show(self, _rest: str) -> None:
        repl = self._repl
        repl.say(repl.facts())
        saved = repl.session.saved
        repl.say("not saved: /save NAME does it" if saved is None else f"saved after each turn as {saved.name}")

    def _regen(self, _rest: str) -> None:
        session = self._repl.session
        self._repl.stream(session.answer if session.waiting else session.regenerate)

    def _undo(self, rest: str) -> None:
        session = self._repl.session
        session.undo(_number(rest, "/undo", 1))
        left = len(session.turns)
        last = f"; the last one is now: {_snippet(session.turns[-1])}" if left else ""
        self._repl.say(f"Taken back. The conversation has {left} messages of yours{last}")

    def _edit(self, text: str) -> None:
        session = self._repl.session
        if not session.turns:
            raise UsageError("there is no message to edit", "say something first")
        if not text and self._repl.reader.edits:
            self._repl.editing = True
            return
        if not text:
            raise UsageError("/edit has no text", "write the message as it should be behind /edit")
        self._repl.stream(lambda cancel: session.edit(text, cancel))

    def _fork(self, rest: str) -> None:
        session = self._repl.session
        session.fork(_number(rest, "/fork", None) if rest else None)
        turns = len(session.turns)
        where = f"after message {turns}" if turns else "at the beginning"
        self._repl.say(f"Branch {session.branch + 1} begins {where}. /branches lists them.")

    def _branches(self, rest: str) -> None:
        session = self._repl.session
        if rest:
            session.switch(_number(rest, "/branches", 1) - 1)
        for number, head in enumerate(session.branches):
            mark = " (here)" if number == session.branch else ""
            what = "nothing was said yet" if head is None else f"{head.depth} messages, the last: {_snippet(head)}"
            self._repl.say(f"branch {number + 1}{mark}: {what}")

    def _save(self, name: str) -> None:
        if not name:
            raise UsageError("/save has no name", "write it like /save trip-to-rome")
        self._repl.store.save(self._repl.session, name)
        self._repl.say(f"Saved as {name}, and so will be each turn. Later: lmx chat --session {name}")

    def _load(self, name: str) -> None:
        if not name:
            raise UsageError("/load has no name", "/sessions lists what there is")
        if self._repl.session.turns and self._repl.session.saved is None:
            raise UsageError("this conversation is not saved", "/save NAME keeps it, /clear lets it go; then load")
        self._repl.store.load(self._repl.session, name)
        self._repl.tell_resumed()

    def _sessions(self, _rest: str) -> None:
        names = self._repl.store.names()
        self._repl.say("Saved: " + ", ".join(names) if names else "Nothing is saved. /save NAME does it.")

    def _clear(self, _rest: str) -> None:
        self._repl.session.clear()
        self._repl.last = None
        self._repl.say("A new conversation begins.")

    def _stats(self, _rest: str) -> None:
        repl, session = self._repl, self._repl.session
        if repl.last is not None:
            repl.say(f"last answer: {repl.summary(repl.last)}")
        answers = sum(message.role == "assistant" for message in session.messages)
        states = f"state {human_bytes(session.state_bytes)}, copies to go back to {human_bytes(session.snapshot_bytes)}"
        memory = f"at most {human_bytes(peak_memory_bytes())} of memory so far"
        repl.say(f"{answers} answers, {repl.context()}, {states}, {memory}")

    def _multiline(self, _rest: str) -> None:
        reader = self._repl.reader
        reader.multiline = not reader.multiline
        sends = reader.sends if reader.multiline else "Enter"
        self._repl.say(f"Multi-line is {'on' if reader.multiline else 'off'}: {sends} sends.")

    def _copy(self, _rest: str) -> None:
        """By OSC 52 (xterm's control sequences): the text goes as base64, so that nothing in it is obeyed."""
        session = self._repl.session
        if not session.turns:
            raise UsageError("there is no answer to copy", "say something first")
        if self._repl.plain or not is_terminal(sys.stdout) or os.environ.get("TERM") == "dumb":
            raise UsageError("/copy needs a terminal that takes escape sequences", "leave --plain out")
        text = session.turns[-1].messages[-1].content
        sys.stdout.write(f"\x1b]52;c;{base64.b64encode(text.encode()).decode('ascii')}\x07")
        sys.stdout.flush()
        self._repl.say(f"Copied {len(text)} characters, if this terminal lets programs do that.")

    def _exit(self, _rest: str) -> None:
        self._repl.leaving = True


def _number(text: str, command: str, default: int | None) -> int:
    if not text and default is not None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise UsageError(f"{command} {text[:40]}: that is no number", f"write it like {command} 2")
    return int(text)


def _snippet(turn: Turn) -> str:
    """The beginnings of what the person said and of the answer."""
    said = next((message.content for message in reversed(turn.messages) if message.role == "user"), "")
    return f"{safe_line(said, _SNIPPET)} - {safe_line(turn.messages[-1].content, _SNIPPET)}"
