"""A file while it arrives, in pieces and in any order, so that another process can go on with it.

Two files: the data, sparse and of full length from the start, and a journal, a line for each piece that is whole. A
piece is written before its line, so what a killed process leaves is right as far as it says. A power cut can leave
lines without their data: the digest tells, and then the file begins anew.
"""

import os
import stat
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from lmx.convert.listing import RemoteFile, new_hasher
from lmx.core.files import sync_folder

PIECE_BYTES = 2_000_000
"""What is asked for at a time, and what a death can cost for each connection."""

DATA_SUFFIX, JOURNAL_SUFFIX = ".lmx.incomplete", ".lmx-journal.incomplete"
_HASH_BYTES = 4 << 20


class PartFile:
    """The pieces of one file. `write` and `finish` may be called by several threads, even after `close`.

    A thread that is late, of a connection that was given up, so writes nothing into a file that was checked.
    """

    def __init__(self, file: RemoteFile, data: int, journal: int, paths: tuple[Path, Path], whole: set[int]) -> None:
        """Use `PartFile.open`."""
        self.file = file
        self.resumed_bytes = sum(_length(file, piece) for piece in whole)
        """What an earlier process had left here."""
        self._data, self._journal = data, journal
        self._data_path, self._journal_path = paths
        self._whole = whole
        self._lock, self._sealed, self._closed = threading.Lock(), False, False

    @classmethod
    def open(cls, folder: Path, file: RemoteFile) -> "PartFile":
        """Go on with what is there of `file`, or begin. The caller holds the file's lock. Raises OSError."""
        paths = (folder / (file.digest + DATA_SUFFIX), folder / (file.digest + JOURNAL_SUFFIX))
        whole, length = _read_journal(paths, file)
        if not whole:
            discard_parts(folder, file.digest)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        data = os.open(paths[0], flags, 0o666)
        try:
            os.ftruncate(data, file.size)
            journal = os.open(paths[1], flags | os.O_APPEND, 0o666)
        except BaseException:
            os.close(data)
            raise
        if whole:  # a death may have left half a line, in which the next would go on
            os.ftruncate(journal, length)
        else:
            os.write(journal, _head(file))
        return cls(file, data, journal, paths, whole)

    @property
    def pieces(self) -> int:
        """How many pieces the file has."""
        return -(-self.file.size // PIECE_BYTES)

    @property
    def missing(self) -> list[int]:
        """The pieces that are not here yet."""
        return [piece for piece in range(self.pieces) if piece not in self._whole]

    def span(self, piece: int) -> tuple[int, int]:
        """Where a piece begins and ends, in bytes."""
        return piece * PIECE_BYTES, min(self.file.size, (piece + 1) * PIECE_BYTES)

    def write(self, offset: int, data: bytes) -> bool:
        """Write bytes where they belong, and say yes; no once it is sealed or closed. Raises OSError."""
        view = memoryview(data)
        with self._lock:
            while view and not self._sealed:
                written = os.pwrite(self._data, view, offset)
                offset, view = offset + written, view[written:]
            return not self._sealed

    def finish(self, piece: int) -> None:
        """Take note that a piece is whole; nothing once it is sealed or closed. Raises OSError."""
        with self._lock:
            if not self._sealed:
                os.write(self._journal, b"%d\n" % piece)
                self._whole.add(piece)

    def begin_anew(self) -> None:
        """Forget all pieces, and the seal. Raises OSError."""
        with self._lock:
            self._whole.clear()
            self.resumed_bytes = 0
            os.ftruncate(self._journal, 0)
            os.write(self._journal, _head(self.file))
            self._sealed = self._closed

    def digest(self, go_on: Callable[[], bool]) -> str | None:
        """Seal the file, so that what is checked stays, and compute its digest; None once `go_on` says no.

        Raises OSError.
        """
        with self._lock:
            self._sealed = True
        return digest_of(self._data, self.file.digest, self.file.size, go_on)

    def install(self, target: Path) -> None:
        """Give the file its name, synced, and remove the journal. Raises OSError."""
        os.fsync(self._data)
        os.replace(self._data_path, target)
        sync_folder(target.parent)
        self._journal_path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of the files; what is in them stays, and does not change any more."""
        with self._lock:
            if not self._closed:
                self._sealed = self._closed = True
                os.close(self._data)
                os.close(self._journal)


def resumable_bytes(folder: Path, file: RemoteFile) -> int:
    """How much of a file is here from an earlier run."""
    paths = (folder / (file.digest + DATA_SUFFIX), folder / (file.digest + JOURNAL_SUFFIX))
    return sum(_length(file, piece) for piece in _read_journal(paths, file)[0])


def digest_of(fd: int, like: str, size: int, go_on: Callable[[], bool] = lambda: True) -> str | None:
    """The digest of an open file of `size` bytes, of the kind of `like`; None once `go_on` says no. Raises OSError."""
    hasher = new_hasher(like, size)
    offset = 0
    while part := os.pread(fd, _HASH_BYTES, offset):
        if not go_on():
            return None
        hasher.update(part)
        offset += len(part)
    return hasher.hexdigest()


def discard_parts(folder: Path, digest: str) -> None:
    """Remove what there is of a file that never became whole."""
    for suffix in (DATA_SUFFIX, JOURNAL_SUFFIX):
        (folder / (digest + suffix)).unlink(missing_ok=True)


def part_digests(folder: Path) -> set[str]:
    """The digests of all files that have begun to arrive in a folder."""
    names = [path.name for path in folder.glob("*.incomplete")]
    return {name.removesuffix(end) for end in (DATA_SUFFIX, JOURNAL_SUFFIX) for name in names if name.endswith(end)}


def _head(file: RemoteFile) -> bytes:
    return b"lmx 1 %d %d\n" % (file.size, PIECE_BYTES)


def _length(file: RemoteFile, piece: int) -> int:
    return min(PIECE_BYTES, file.size - piece * PIECE_BYTES)


def _read_journal(paths: tuple[Path, Path], file: RemoteFile) -> tuple[set[int], int]:
    """The pieces that are whole, and the journal's bytes up to its last whole line.

    None, and 0, where anything about the two files is not as it should be.
    """
    data, journal = paths
    with suppress(OSError, ValueError):
        found = data.lstat()
        if stat.S_ISREG(found.st_mode) and found.st_size == file.size and not journal.is_symlink():
            text = journal.read_bytes()
            length = text.rfind(b"\n") + 1
            head, *lines = text[:length].splitlines(keepends=True)
            pieces = set(map(int, lines))
            if head == _head(file) and all(0 <= piece * PIECE_BYTES < file.size for piece in pieces):
                return pieces, length
    return set(), 0
