"""The folders of saved conversations: their names, who holds one, and what is in each, without taking it."""

import fcntl
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from lmx.core.errors import ConflictError, LmxError, NotFoundError, ResourceError, UsageError
from lmx.core.files import is_plain_name, quoted
from lmx.core.session_record import SessionRecord, read_record

RECORD = "session.jsonl"
_LOCK = "lock"
_MAX_NAME = 100


@dataclass(frozen=True)
class SessionInfo:
    """A session in a list. nbytes: on the disk; problem: why it cannot be read, if so."""

    name: str
    nbytes: int
    modified: float
    record: SessionRecord | None
    problem: str | None = None


def session_folder(root: Path, name: str) -> Path:
    """Where the session lies: a plain name within the folder of sessions. Raises UsageError for any other name."""
    folder = root / name
    if not is_plain_name(name) or name.startswith(".") or len(name.encode()) > _MAX_NAME or folder.is_symlink():
        raise UsageError(
            f"{quoted(name)} cannot be a session's name", f"give a plain name of up to {_MAX_NAME} bytes, without /"
        )
    return folder


def list_sessions(root: Path) -> list[SessionInfo]:
    """All sessions, the one that was used last first. Those that cannot be read are in it, with the reason."""
    if not root.is_dir():
        return []
    folders = [path for path in root.iterdir() if (path / RECORD).is_file() and not path.is_symlink()]
    return sorted((_info(folder) for folder in folders), key=lambda info: info.modified, reverse=True)


def read_session(root: Path, name: str) -> SessionInfo:
    """One session, without taking it. Raises UsageError, NotFoundError, InputError."""
    folder = session_folder(root, name)
    if not (folder / RECORD).is_file():
        raise NotFoundError(f"there is no session {quoted(name)}", "`lmx sessions list` shows those there are")
    return replace(_about(folder), record=read_record(folder / RECORD))


def remove_session(root: Path, name: str) -> None:
    """Delete a session. Raises UsageError, NotFoundError, ConflictError where a process has it open, ResourceError."""
    folder = session_folder(root, name)
    if not folder.is_dir():
        raise NotFoundError(f"there is no session {quoted(name)}", "`lmx sessions list` shows those there are")
    lock = take_lock(folder)
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise cannot_write(folder, error) from error
    finally:
        os.close(lock)


def _info(folder: Path) -> SessionInfo:
    about = _about(folder)
    try:
        return replace(about, record=read_record(folder / RECORD))
    except LmxError as error:
        return replace(about, problem=error.message)


def _about(folder: Path) -> SessionInfo:
    sizes = [path.stat().st_size for path in folder.iterdir() if path.is_file()]
    return SessionInfo(folder.name, sum(sizes), (folder / RECORD).stat().st_mtime, None)


def take_lock(folder: Path) -> int:
    """Lock the session; the kernel frees it, whatever ends the process. Raises ConflictError."""
    fd = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise ConflictError(
            f"the session {quoted(folder.name)} is open in another process", "end that one, or choose another name"
        ) from None
    return fd


def cannot_write(folder: Path, error: OSError) -> ResourceError:
    """The error for a folder whose disk failed."""
    return ResourceError(
        f"{quoted(str(folder))} cannot be written: {(error.strerror or str(error)).lower()}",
        "check the free space and the folder's permissions",
    )
