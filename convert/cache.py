"""What is in the Hugging Face cache: list, delete, re-hash. Every repository that is there, whatever it holds.

The layout is that of `lmx.convert.places`. Deleting goes through huggingface_hub, which knows what its repositories
share. Imports huggingface_hub when asked for anything.
"""

import os
import re
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lmx.convert.listing import is_digest
from lmx.convert.part_file import digest_of
from lmx.convert.places import cache_folder, locked
from lmx.core.errors import ConflictError, InputError, NotFoundError, ResourceError
from lmx.core.files import open_regular, quoted

if TYPE_CHECKING:
    from huggingface_hub import HFCacheInfo

_FOLDER = re.compile(r"(model|dataset|space|kernel)s--(.+)")


@dataclass(frozen=True, slots=True)
class Revision:
    """One snapshot. `files` maps names, relative to `folder`, to sizes in bytes; None for a link that leads nowhere."""

    commit: str
    refs: tuple[str, ...]
    folder: Path
    files: dict[str, int | None]

    @property
    def nbytes(self) -> int:
        """The size of all its files."""
        return sum(size or 0 for size in self.files.values())


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository in the cache, newest snapshot last. Of what is no model, `name` begins with what it is.

    nbytes: on the disk, all snapshots together. incomplete_bytes: of that, what has begun to arrive and is not whole.
    modified: seconds since 1970, of the newest file.
    """

    name: str
    kind: str
    folder: Path
    revisions: tuple[Revision, ...]
    nbytes: int
    incomplete_bytes: int
    modified: float


@dataclass(frozen=True, slots=True)
class Verified:
    """The verdict on a file: its digest is right, wrong, or not known; or the file is not there."""

    commit: str
    name: str
    nbytes: int
    verdict: Literal["right", "damaged", "unknown", "missing"]


def scan() -> list[Repository]:
    """All repositories in the cache, by name; of one that we may not read, its name. Raises NotFoundError."""
    return sorted((_repository_or_name(match, folder) for match, folder in _folders()), key=lambda repo: repo.name)


def find_repository(name: str, revision: str | None = None) -> tuple[Repository, tuple[Revision, ...]]:
    """A repository by its name, or `name@revision`, and the snapshots that are meant: all, or the one of a revision.

    revision: a branch or tag as the cache knows it, or the beginning of a commit. Raises NotFoundError.
    """
    name, _, inline = name.partition("@")
    revision = revision or inline or None
    match, folder = next(((match, folder) for match, folder in _folders() if _name(match) == name), (None, None))
    if match is None or folder is None:
        raise NotFoundError(f"{quoted(name)} is not in the cache", "see what is there with lmx list")
    with _readable(folder):
        repo = _repository(match, folder)
    if revision is None:
        return repo, repo.revisions
    meant = [one for one in repo.revisions if revision in one.refs or one.commit == revision]
    meant = meant or [one for one in repo.revisions if len(revision) >= 6 and one.commit.startswith(revision)]
    if len(meant) != 1:
        raise NotFoundError(f"{repo.name} has no snapshot {quoted(revision)} in the cache", "see lmx list --json")
    return repo, tuple(meant)


def remove(repo: Repository, revisions: Sequence[Revision]) -> int:
    """Delete snapshots with all that no other one needs; all snapshots, with the whole repository. Returns bytes freed.

    Raises:
        ConflictError: another process is pulling it.
        InputError: it is so damaged that only all of it can be deleted.
        ResourceError: the disk does not let us.

    """
    _check_idle(repo)
    before = repo.nbytes
    try:
        if len(revisions) == len(repo.revisions):
            _remove_whole(repo)
        else:
            _remove_some(repo, revisions)
    except OSError as error:
        where = quoted(str(error.filename or repo.folder))
        raise ResourceError(
            f"{where} cannot be deleted: {(error.strerror or str(error)).lower()}", "check the folder's permissions"
        ) from error
    after = next((one.nbytes for one in scan() if one.folder == repo.folder), 0)
    if len(revisions) == len(repo.revisions) and repo.folder.exists():
        raise ResourceError(f"{quoted(str(repo.folder))} could not be deleted", "check the folder's permissions")
    return before - after


def verify(revisions: Sequence[Revision]) -> Iterator[Verified]:
    """Compute the digest of each file again. Raises NotFoundError, ResourceError for one that cannot be read."""
    for revision in revisions:
        for name, size in sorted(revision.files.items()):
            path = revision.folder / name
            digest = Path(os.readlink(path)).name if path.is_symlink() else ""
            yield Verified(revision.commit, name, size or 0, _verdict(path, size, digest))


def verify_folder(folder: Path) -> Iterator[Verified]:
    """The same for a folder that was pulled with `local_dir`, by the notes that were taken of its digests."""
    notes = folder / ".cache" / "huggingface" / "download"
    for note in sorted(notes.rglob("*.metadata")):
        lines = note.read_text("utf-8", errors="replace").splitlines()
        name = str(note.relative_to(notes)).removesuffix(".metadata")
        if len(lines) < 2:
            continue
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        yield Verified(lines[0], name, size or 0, _verdict(path, size, lines[1]))


def _verdict(path: Path, size: int | None, digest: str) -> Literal["right", "damaged", "unknown", "missing"]:
    if size is None:
        return "missing"
    if not is_digest(digest):
        return "unknown"
    with open_regular(path) as fd:
        return "right" if digest_of(fd, digest, os.fstat(fd).st_size) == digest else "damaged"


def _folders() -> list[tuple[re.Match[str], Path]]:
    cache = cache_folder()
    with _readable(cache):
        folders = _entries(cache)
        return [(match, path) for path in folders if (match := _FOLDER.fullmatch(path.name)) and path.is_dir()]


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where, reason = quoted(str(error.filename or folder)), (error.strerror or str(error)).lower()
        raise NotFoundError(f"{where} cannot be read: {reason}", "check the folder's permissions") from error


def _name(match: re.Match[str]) -> str:
    name = match[2].replace("--", "/")
    return name if match[1] == "model" else f"{match[1]}/{name}"


def _repository_or_name(match: re.Match[str], folder: Path) -> Repository:
    try:
        return _repository(match, folder)
    except OSError:  # somebody else's, in a cache that is shared; or being deleted just now
        return Repository(_name(match), match[1], folder, (), 0, 0, 0.0)


def _repository(match: re.Match[str], folder: Path) -> Repository:
    refs: dict[str, list[str]] = {}
    for path in (folder / "refs").rglob("*"):
        with suppress(OSError, UnicodeDecodeError):
            refs.setdefault(path.read_text("utf-8").strip(), []).append(str(path.relative_to(folder / "refs")))
    snapshots = [path for path in _entries(folder / "snapshots") if path.is_dir()]
    snapshots.sort(key=lambda path: (path.stat().st_mtime, path.name))
    revisions = tuple(
        Revision(path.name, tuple(sorted(refs.get(path.name, ()))), path, _files(path)) for path in snapshots
    )
    incomplete, nbytes, modified = 0, 0, folder.stat().st_mtime
    for found, is_incomplete in _content(folder):
        nbytes += found.st_size if not is_incomplete else _allocated(found)
        incomplete += _allocated(found) if is_incomplete else 0
        modified = max(modified, found.st_mtime)
    return Repository(_name(match), match[1], folder, revisions, nbytes, incomplete, modified)


def _content(folder: Path) -> Iterator[tuple[os.stat_result, bool]]:
    """All regular files of a repository, each once, and whether it is one that is still arriving."""
    seen = set()
    for below in ("blobs", "snapshots"):
        for path in (folder / below).rglob("*"):
            with suppress(OSError):
                found = path.stat()
                if stat.S_ISREG(found.st_mode) and (found.st_dev, found.st_ino) not in seen:
                    seen.add((found.st_dev, found.st_ino))
                    yield found, path.name.endswith(".incomplete")


def _allocated(found: os.stat_result) -> int:
    """What a file with holes takes on the disk."""
    return min(found.st_size, found.st_blocks * 512)


def _files(snapshot: Path) -> dict[str, int | None]:
    files: dict[str, int | None] = {}
    for path in snapshot.rglob("*"):
        if path.is_symlink() or not path.is_dir():
            files[str(path.relative_to(snapshot))] = path.stat().st_size if path.is_file() else None
    return files


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _check_idle(repo: Repository) -> None:
    """Raise ConflictError where somebody holds a lock of this repository: something is arriving just now."""
    for path in (repo.folder.parent / ".locks" / repo.folder.name).glob("*.lock"):
        with suppress(FileNotFoundError), locked(path) as held:
            if not held:
                raise ConflictError(f"{repo.name} is being pulled by another process", "wait for it to end, or stop it")


def _remove_whole(repo: Repository) -> None:
    alone = _alone(repo)
    known = [revision.commit_hash for one in alone.repos for revision in one.revisions]
    if known and repo.revisions:
        alone.delete_revisions(*known).execute()
    if repo.folder.exists():  # huggingface_hub leaves alone what it calls corrupted
        shutil.rmtree(repo.folder)


def _remove_some(repo: Repository, revisions: Sequence[Revision]) -> None:
    alone = _alone(repo)
    if not alone.repos:
        raise InputError(f"{repo.name} is damaged in the cache", f"delete all of it: lmx rm {repo.name}")
    alone.delete_revisions(*(revision.commit for revision in revisions)).execute()


def _alone(repo: Repository) -> "HFCacheInfo":
    """What huggingface_hub knows of this repository alone: others may have commits of the same name."""
    from huggingface_hub import scan_cache_dir

    info = scan_cache_dir(repo.folder.parent)
    return replace(info, repos=frozenset(one for one in info.repos if one.repo_path.name == repo.folder.name))
