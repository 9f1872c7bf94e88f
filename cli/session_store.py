"""The user's saved conversations, as the chat opens and makes them."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lmx.core.errors import ConflictError, NotFoundError
from lmx.core.saved_session import OtherModelError, SavedSession
from lmx.core.session_folders import RECORD, list_sessions, session_folder
from lmx.core.snapshots import default_bytes
from lmx.core.user_folders import data_folder

if TYPE_CHECKING:
    from lmx.cli.loading import Loaded
    from lmx.core.session import ChatSession


def sessions_folder() -> Path:
    """Where conversations are saved. Raises NotFoundError where this user has no home."""
    try:
        return data_folder() / "sessions"
    except RuntimeError as error:
        raise NotFoundError("there is no home folder to keep sessions in", "set LMX_HOME to a folder") from error


class SessionStore:
    """Opens sessions for one model."""

    def __init__(
        self, running: "Loaded", *, reread: bool = False, confirm: Callable[[str], bool] | None = None
    ) -> None:
        """reread: let this model read what another one said; otherwise `confirm` is asked, or it is refused."""
        self._running = running
        self._reread = reread
        self._confirm = confirm

    def exists(self, name: str) -> bool:
        """Whether there is such a session. Raises UsageError for a name that cannot be."""
        return (session_folder(sessions_folder(), name) / RECORD).exists()

    def names(self) -> list[str]:
        """All sessions, the last used one first."""
        return [info.name for info in list_sessions(sessions_folder())]

    def save(self, session: "ChatSession", name: str) -> None:
        """Save the conversation under a new name. Raises ConflictError, UsageError, ResourceError."""
        if session.saved is not None and session.saved.name == name:
            raise ConflictError(f"the conversation is saved as {name} already", "go on: so is each turn")
        identity = self._running.identity
        session.save_to(SavedSession.create(sessions_folder(), name, identity, state_bytes=default_bytes()))

    def load(self, session: "ChatSession", name: str) -> None:
        """Go on with a saved conversation. Raises NotFoundError, ConflictError, UsageError, OtherModelError."""
        if session.saved is not None and session.saved.name == name:
            raise ConflictError(f"{name} is the conversation that is open", "go on with it, or load another one")
        try:
            session.resume(self._open(name, self._reread))
        except OtherModelError as error:
            if self._confirm is None or not self._confirm(f"{error.message}. Let this model read the messages again?"):
                raise
            session.resume(self._open(name, True))

    def load_or_save(self, session: "ChatSession", name: str, system: str | None) -> bool:
        """Go on with the session if there is one, else begin it; return whether there was.

        system: the system's message that was asked for; None leaves the session's own.
        """
        existed = self.exists(name)
        (self.load if existed else self.save)(session, name)
        if system is not None:
            session.set_system(system)
        return existed

    def _open(self, name: str, reread: bool) -> SavedSession:
        identity = self._running.identity
        return SavedSession.open(sessions_folder(), name, identity, reread=reread, state_bytes=default_bytes())
