"""Reading what a person types: with editing and a history kept across runs, or as plain lines."""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.key_binding.key_processor import KeyPressEvent

PROMPT, MORE = "> ", ". "
_CONTINUES = "\\"

Reader = Callable[[], str]


def open_reader(*, plain: bool) -> Reader:
    """A function that reads one message. It raises KeyboardInterrupt for Ctrl-C and EOFError for Ctrl-D.

    plain: nothing but lines, for any terminal; a trailing backslash continues a message on the next line in both.
    """
    return read_plain if plain or os.environ.get("TERM") == "dumb" else _editing_reader()


def read_plain() -> str:
    """One message from stdin, its lines joined where they end with a backslash."""
    lines: list[str] = []
    try:
        while True:
            line = input(MORE if lines else PROMPT)
            if not line.endswith(_CONTINUES):
                return "\n".join([*lines, line])
            lines.append(line.removesuffix(_CONTINUES))
    except (KeyboardInterrupt, EOFError):
        sys.stdout.write("\n")
        raise


def _editing_reader() -> Reader:
    from prompt_toolkit import PromptSession

    session: PromptSession[str] = PromptSession(
        history=_history(), key_bindings=_bindings(), multiline=True, prompt_continuation=lambda *_: MORE
    )
    return lambda: session.prompt(PROMPT)


def _bindings() -> "KeyBindings":
    """Enter sends, or after a backslash begins a new line; Alt-Enter begins a new line."""
    from prompt_toolkit.key_binding import KeyBindings

    bindings = KeyBindings()

    @bindings.add("enter")
    def _send(event: "KeyPressEvent") -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith(_CONTINUES):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def _new_line(event: "KeyPressEvent") -> None:
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


def state_folder() -> Path:
    """Where a user's state lies: XDG_STATE_HOME (the XDG base directory specification), on macOS its own place.

    Raises RuntimeError where no home is known: HOME is not set, and the system does not know the user.
    """
    named = os.environ.get("XDG_STATE_HOME", "")
    if os.path.isabs(named):
        return Path(named) / "lmx"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "lmx"
    return Path.home() / ".local" / "state" / "lmx"
