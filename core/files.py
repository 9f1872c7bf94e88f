"""Opening files that we do not trust: only regular ones, never more of them than asked, errors that say what to do."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lmx.core.errors import InputError, NotFoundError, ResourceError

MAX_QUOTED = 200

_ABSENT = {errno.ENOENT, errno.ENOTDIR}
_DENIED = {errno.EACCES, errno.EPERM}
_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}


def quoted(text: str) -> str:
    """Foreign text made fit for a one-line error: control characters escaped, its length bounded."""
    return repr(text) if len(text) <= MAX_QUOTED else repr(text[:MAX_QUOTED]) + "..."


def is_plain_name(name: str) -> bool:
    r"""Whether `name` names a file of its own folder and nothing else, on any platform.

    Refused: separators, `.` and `..`, drive letters and streams (`:`), NUL and other control characters, wildcards and
    more than 255 bytes. Only the name is judged. A symbolic link of a plain name is followed: the Hugging Face cache
    keeps its files as links (`snapshots/REVISION/x -> ../../blobs/HASH`), and a download cannot make a link: only
    whoever owns the folder can.
    """
    if not name.isprintable() or set(name) & set('/\\:*?"<>|') or name in ("", ".", ".."):
        return False
    return len(name.encode()) <= 255


def names_in(folder: Path) -> set[str]:
    """What lies in a folder; nothing where it cannot be read, which whoever opens it next will say."""
    try:
        return {entry.name for entry in folder.iterdir()}
    except (OSError, ValueError):
        return set()


@contextmanager
def open_regular(path: Path) -> Iterator[int]:
    """Open a regular file for reading and yield its descriptor, closed at the end of the block.

    A FIFO, socket or device is refused without waiting for its other end (O_NONBLOCK).

    Raises:
        NotFoundError: there is no such file, or we may not read it.
        InputError: it is no regular file, or cannot be read.
        ResourceError: the process has no descriptor or memory left for it.

    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except (OSError, ValueError) as error:
        raise _open_error(path, error) from error
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise InputError(f"{quoted(str(path))} is not a regular file", "give the file itself, not a folder or pipe")
        yield fd
    finally:
        os.close(fd)


def read_range(fd: int, size: int, offset: int, path: Path) -> bytes:
    """Exactly `size` bytes from `offset` on. Raises InputError where the file ends sooner or the disk fails."""
    parts: list[bytes] = []
    while size > 0:
        try:
            part = os.pread(fd, min(size, 1 << 30), offset)
        except OSError as error:
            raise _open_error(path, error) from error
        if not part:
            raise InputError(f"{quoted(str(path))} ends before its size says", "it is being written, or damaged")
        parts.append(part)
        offset += len(part)
        size -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def read_bounded(path: Path, limit_bytes: int) -> bytes:
    """The whole of a regular file of at most `limit_bytes`; a larger one is refused before any of it is read.

    Raises what `open_regular` raises, and InputError for a larger file.
    """
    with open_regular(path) as fd:
        size = os.fstat(fd).st_size
        if size > limit_bytes:
            raise InputError(
                f"{quoted(str(path))} is {size:,} bytes long; the limit for such a file is {limit_bytes:,}",
                "no published model has one as large: it is damaged or was not meant for a model",
            )
        return read_range(fd, size, 0, path)


def _open_error(path: Path, error: OSError | ValueError) -> InputError | NotFoundError | ResourceError:
    where = quoted(str(path))
    if not isinstance(error, OSError):
        return InputError(f"{where} is no file name: {error}", "check the path")
    if error.errno in _ABSENT:
        if path.is_symlink():
            return NotFoundError(f"{where} is a link to a file that does not exist", "download the model again")
        return NotFoundError(f"{where} does not exist", "check the path")
    reason = f"{where} cannot be read: {(error.strerror or str(error)).lower()}"
    if error.errno in _DENIED:
        return NotFoundError(reason, "check the file's permissions")
    if error.errno in _EXHAUSTED:
        return ResourceError(reason, "close other programs, or raise the limit of open files (ulimit -n)")
    return InputError(reason, "check the path and the disk")


def write_atomically(path: Path, data: bytes) -> None:
    """Put a file in place whole: written beside its name, synced, renamed, the rename synced.

    Raises ResourceError where the disk is full or the folder cannot be written; what stood there before stays.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise ResourceError(
            f"cannot write {quoted(str(path))}: {error.strerror}", "Check the free space and the folder's permissions."
        ) from error


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
