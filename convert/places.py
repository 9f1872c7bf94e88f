"""Where pulled files lie: the cache that all Hugging Face tools share, or a folder of the user's choice.

The cache (https://huggingface.co/docs/huggingface_hub/guides/manage-cache), for config.json and one shard of a model:

    models--org--name/
        blobs/d7edf6bd...                     the content, named by its digest
        blobs/403450e2....lmx.incomplete      a file that is still arriving, and its journal
        snapshots/2439f60e.../config.json     -> ../../blobs/d7edf6bd...
        refs/main                             2439f60e...
    .locks/models--org--name/d7edf6bd....lock

A folder has the files under their own names, and under .cache/huggingface/download what huggingface_hub keeps there.
"""

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Iterator, Set
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from lmx.convert.listing import RemoteFile
from lmx.convert.part_file import discard_parts, part_digests
from lmx.core.files import sync_folder

POLL_SECONDS = 0.1
"""How often to try for a lock that another process holds."""

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)


class Place(Protocol):
    """Where files are put. Its methods raise OSError."""

    @property
    def folder(self) -> Path:
        """What the user will find the files in."""

    @property
    def parts(self) -> Path:
        """Where files lie while they arrive; on the same disk."""

    def has(self, file: RemoteFile) -> bool:
        """Whether the file is there, whole."""

    def lock_path(self, digest: str) -> Path:
        """The lock of all who fetch this content."""

    def blob(self, digest: str) -> Path:
        """Where content lies once its digest is right, until `put`."""

    def prepare(self) -> None:
        """Make the folders."""

    def put(self, file: RemoteFile) -> None:
        """Give the content of `blob` its name."""

    def finish(self, revision: str | None) -> None:
        """Note which revision this was."""


def cache_folder() -> Path:
    """The cache of this user, by huggingface_hub's own rules."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser()


def repository_name(repo: str) -> str:
    """What the cache calls the folder of a model `org/name`."""
    return "--".join(("models", *repo.split("/")))


class CachePlace:
    """A snapshot in the Hugging Face cache."""

    def __init__(self, cache: Path, repo: str, commit: str) -> None:
        name = repository_name(repo)
        self._repo, self._locks, self._commit = cache / name, cache / ".locks" / name, commit

    @property
    def folder(self) -> Path:
        """The snapshot."""
        return self._repo / "snapshots" / self._commit

    @property
    def parts(self) -> Path:
        """The repository's blobs."""
        return self._repo / "blobs"

    def has(self, file: RemoteFile) -> bool:
        """By its size: the snapshot is of one commit, so the name can have had no other content."""
        return _size(self.folder / file.name) == file.size

    def lock_path(self, digest: str) -> Path:
        """The one that huggingface_hub takes."""
        return self._locks / f"{digest}.lock"

    def blob(self, digest: str) -> Path:
        """Under the digest, where all snapshots find it."""
        return self.parts / digest

    def prepare(self) -> None:
        """Make the repository's folders, and that of its locks."""
        for folder in (self.folder, self.parts, self._locks):
            folder.mkdir(parents=True, exist_ok=True)

    def put(self, file: RemoteFile) -> None:
        """Link, where links can be made; elsewhere copy."""
        pointer, blob = self.folder / file.name, self.blob(file.digest)
        pointer.parent.mkdir(parents=True, exist_ok=True)
        beside = _beside(pointer, file)
        beside.unlink(missing_ok=True)
        if not _link(blob, beside):
            _copy(blob, beside)
        beside.replace(pointer)

    def finish(self, revision: str | None) -> None:
        """Let the branch or tag mean this snapshot, now that it is whole."""
        ref = self._repo / "refs" / (revision or "main")
        if revision == self._commit or _text(ref) == self._commit:
            return
        for folder in (ref.parent, self._locks):
            folder.mkdir(parents=True, exist_ok=True)
        # Not beside it: whatever a death leaves among the refs is a ref to other tools
        beside = self._locks / "ref.lmx"
        while not self._wrote(beside, ref):
            time.sleep(POLL_SECONDS)

    def _wrote(self, beside: Path, ref: Path) -> bool:
        with locked(beside) as held:
            if held:
                _replace(beside, ref, self._commit)
            return held


class FolderPlace:
    """A folder with the files under their own names."""

    def __init__(self, folder: Path, commit: str) -> None:
        self._folder, self._commit = folder, commit

    @property
    def folder(self) -> Path:
        """The user's folder."""
        return self._folder

    @property
    def parts(self) -> Path:
        """huggingface_hub's own place for this."""
        return self._folder / ".cache" / "huggingface" / "download"

    def has(self, file: RemoteFile) -> bool:
        """By the note that was taken when it came; a file that was changed since is not it."""
        path = self._folder / file.name
        lines = (_text(self._note(file)) or "").splitlines()
        if len(lines) != 3 or lines[1] != file.digest or _size(path) != file.size:
            return False
        with suppress(ValueError, OSError):
            return path.stat().st_mtime - 1 <= float(lines[2])
        return False

    def lock_path(self, digest: str) -> Path:
        """Beside the parts; removed by `finish`."""
        return self.parts / f"{digest}.lmx.lock"

    def blob(self, digest: str) -> Path:
        """For as long as `finish` has not removed it."""
        return self.parts / f"{digest}.lmx.whole"

    def prepare(self) -> None:
        """Make the folder."""
        self.parts.mkdir(parents=True, exist_ok=True)

    def put(self, file: RemoteFile) -> None:
        """Give the file its name, in place of any other content, and take a note of it."""
        path, note = self._folder / file.name, self._note(file)
        for parent in (path.parent, note.parent):
            parent.mkdir(parents=True, exist_ok=True)
        beside = _beside(path, file)
        beside.unlink(missing_ok=True)
        try:
            os.link(self.blob(file.digest), beside)
        except OSError:
            _copy(self.blob(file.digest), beside)
        beside.replace(path)
        beside.unlink(missing_ok=True)  # where both were links to one file, before a death, a rename does nothing
        sync_folder(path.parent)  # before the note, which would else tell of what a power cut has taken back
        # huggingface_hub's own form of it: commit, digest, and when that was so
        _replace(_beside(note, file), note, f"{self._commit}\n{file.digest}\n{time.time()}\n")

    def finish(self, revision: str | None) -> None:
        """Remove what only served the way here, but for what another process works on."""
        for path in self.parts.glob("*.lmx.lock"):
            with locked(path) as held:
                if held:
                    self.blob(path.name.removesuffix(".lmx.lock")).unlink(missing_ok=True)
                    path.unlink(missing_ok=True)

    def _note(self, file: RemoteFile) -> Path:
        return self.parts / f"{file.name}.metadata"


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Try to hold the lock of a path for the block; yields whether it is held. The kernel frees it after a death.

    `flock` on the path itself, as the filelock package does.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o664)
    try:
        yield _take(fd, path)
    finally:
        os.close(fd)


def is_whole(place: Place, file: RemoteFile) -> bool:
    """Whether content is at hand, by its name and size."""
    return _size(place.blob(file.digest)) == file.size


def sweep(place: Place, listed: Set[str]) -> None:
    """Remove what has begun to arrive and will not go on: of content that is not `listed` now, or is here whole."""
    for digest in part_digests(place.parts):
        if digest in listed and not place.blob(digest).exists():
            continue
        with suppress(OSError), locked(place.lock_path(digest)) as held:
            if held:
                discard_parts(place.parts, digest)


def _take(fd: int, path: Path) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except (BlockingIOError, FileNotFoundError):  # the second: whoever had it has removed it
        return False
    except OSError as error:
        # Some network disks have no locks. Two pulls at once may then do the work twice; the digests still hold
        if error.errno in _NO_LOCKS:
            return True
        raise


def _beside(path: Path, file: RemoteFile) -> Path:
    """Where a file's name is prepared: always the same, under the content's lock, so that no death leaves it there."""
    return path.with_name(f".{file.digest[:16]}.lmx")


def _copy(blob: Path, beside: Path) -> None:
    shutil.copyfile(blob, beside)
    with beside.open("rb") as file:
        os.fsync(file.fileno())


def _replace(beside: Path, path: Path, text: str) -> None:
    """Put a small file in place whole, and make that last."""
    with beside.open("wb") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    sync_folder(path.parent)


def _link(blob: Path, pointer: Path) -> bool:
    from huggingface_hub import constants

    if constants.HF_HUB_DISABLE_SYMLINKS:
        return False
    with suppress(OSError):
        pointer.symlink_to(os.path.relpath(blob, pointer.parent))
        return True
    return False


def _size(path: Path) -> int | None:
    """The size of a regular file, through links; None where there is none."""
    with suppress(OSError, ValueError):
        if path.is_file():
            return path.stat().st_size
    return None


def _text(path: Path) -> str | None:
    with suppress(OSError, ValueError):
        return path.read_text("utf-8")
    return None
