"""Reading what a person types: with editing and a history kept across runs, or as plain lines."""

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

from lmx.core.user_folders import state_folder

if TYPE_CHECKING:
    from prompt_toolkit.completion import Completer
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.key_binding.key_processor import KeyPressEvent

PROMPT, MORE = "> ", ". "
_CONTINUES = "\\"


class Reader(Protocol):
    """Reads one message after another."""

    multiline: bool
    """Whether Enter begins a new line; `sends` says what sends then."""
    edits: bool
    """Whether a text can be offered for editing."""

    def read(self, offered: str = "") -> str:
        """One message. offered: what stands there already, to be edited. Raises KeyboardInterrupt, EOFError."""
        ...

    @property
    def sends(self) -> str:
        """What sends a message of several lines, in words."""
        ...


def open_reader(*, plain: bool, commands: Sequence[str] = (), status: Callable[[], str] = str) -> Reader:
    """How messages are read. Ctrl-C raises KeyboardInterrupt and Ctrl-D EOFError.

    plain: nothing but lines, for any terminal; a trailing backslash continues a message on the next line in both.
    commands: what Tab completes. status: the line at the bottom while the prompt is up.
    """
    return PlainReader() if plain or os.environ.get("TERM") == "dumb" else EditingReader(commands, status)


class PlainReader:
    """Lines from stdin."""

    edits = False
    sends = "an empty line"

    def __init__(self) -> None:
        self.multiline = False

    def read(self, offered: str = "") -> str:
        """One message, its lines joined where they end with a backslash, or up to an empty one."""
        lines: list[str] = []
        try:
            while True:
                line = input(MORE if lines else PROMPT)
                if self.multiline and not line.startswith("/"):
                    if not line:
                        return "\n".join(lines)
                    lines.append(line)
                elif line.endswith(_CONTINUES):
                    lines.append(line.removesuffix(_CONTINUES))
                else:
                    return "\n".join([*lines, line])
        except (KeyboardInterrupt, EOFError):
            sys.stdout.write("\n")
            raise


class EditingReader:
    """prompt_toolkit's prompt."""

    edits = True
    sends = "Alt-Enter"

    def __init__(self, commands: Sequence[str], status: Callable[[], str]) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.styles import Style

        self.multiline = False
        self._session: PromptSession[str] = PromptSession(
            history=_history(),
            key_bindings=_bindings(self),
            multiline=True,
            prompt_continuation=lambda *_: MORE,
            completer=_completer(commands),
            complete_while_typing=False,
            bottom_toolbar=lambda: " " + status(),
            style=Style([("bottom-toolbar", "noreverse"), ("bottom-toolbar.text", "noreverse ansibrightblack")]),
        )

    def read(self, offered: str = "") -> str:
        """One message, as it was sent."""
        return self._session.prompt(PROMPT, default=offered)


def _completer(commands: Sequence[str]) -> "Completer":
    """Commands where the message begins with a slash; nothing elsewhere."""
    from prompt_toolkit.completion import WordCompleter

    return WordCompleter(list(commands), sentence=True)


def _bindings(reader: EditingReader) -> "KeyBindings":
    """Enter sends, or after a backslash begins a new line; Alt-Enter begins a new line; in multi-line the two swap."""
    from prompt_toolkit.key_binding import KeyBindings

    bindings = KeyBindings()

    @bindings.add("enter")
    def _enter(event: "KeyPressEvent") -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith(_CONTINUES):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        elif reader.multiline and not buffer.text.startswith("/"):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def _alt_enter(event: "KeyPressEvent") -> None:
        if reader.multiline:
            event.current_buffer.validate_and_handle()
        else:
            event.current_buffer.insert_text("\n")

    return bindings


def _history() -> "History":
    """What was typed in earlier runs, readable by this user alone; in memory only where it cannot be kept."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class KeptHistory(FileHistory):
        """Goes on without the file once the disk is full or the file is gone."""

        def store_string(self, string: str) -> None:
            with suppress(OSError):
                super().store_string(string)

    with suppress(OSError, RuntimeError):  # the second where there is no home
        path = state_folder() / "chat-history"
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        return KeptHistory(str(path))
    return InMemoryHistory()
