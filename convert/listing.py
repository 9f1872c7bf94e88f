"""What a repository of the hub holds at one commit: names, sizes and digests, checked before they are trusted.

The digests are those that git and Git LFS know the files by (https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md):
SHA-256 of a large file, git's blob id (SHA-1 over a header and the content) of a small one.
"""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

from lmx.core.errors import InputError
from lmx.core.files import quoted

if TYPE_CHECKING:
    from hashlib import _Hash

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_DRIVE = re.compile(r"[A-Za-z]:")
# What Windows takes for a device in any folder and with any suffix
# (https://learn.microsoft.com/windows/win32/fileio/naming-a-file)
_DEVICE = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|com[0-9¹²³]|lpt[0-9¹²³]) *(\..*)?", re.IGNORECASE)
_NAME_BYTES, _PART_BYTES = 1024, 255
_LARGEST_FILE = 1 << 50
_HINT = "the repository, or whoever answers for the hub, is not to be trusted: nothing was written"


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file of a repository. `digest` is 64 hex digits of SHA-256, or 40 of git's blob id."""

    name: str
    size: int
    digest: str

    @property
    def kind(self) -> Literal["sha256", "git"]:
        """How `digest` was made."""
        return "sha256" if len(self.digest) == 64 else "git"


@dataclass(frozen=True, slots=True)
class Listing:
    """All files of a repository at a commit."""

    commit: str
    files: tuple[RemoteFile, ...]

    @classmethod
    def check(cls, commit: object, entries: Iterable[tuple[object, object, object]]) -> Self:
        """Believe a listing, of (name, size, digest) each, or raise InputError."""
        if not isinstance(commit, str) or _COMMIT.fullmatch(commit) is None:
            raise InputError(f"the hub calls its commit {quoted(str(commit))}, which is none", _HINT)
        files = tuple(_checked(*entry) for entry in entries)
        _check_apart([file.name for file in files])
        return cls(commit, files)


def new_hasher(digest: str, size: int) -> "_Hash":
    """A hash object of the digest's kind, for content of `size` bytes."""
    if len(digest) == 64:
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)


def is_digest(text: str) -> bool:
    """Whether `text` is a digest as this module knows them."""
    return _COMMIT.fullmatch(text) is not None or _SHA256.fullmatch(text) is not None


def _checked(name: object, size: object, digest: object) -> RemoteFile:
    if not isinstance(name, str) or _fault(name):
        fault = _fault(name) if isinstance(name, str) else "is no text"
        raise InputError(f"a file name of the repository {fault}: {quoted(str(name))}", _HINT)
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= _LARGEST_FILE:
        raise InputError(f"the hub says that {quoted(name)} has {size!s:.40} bytes", _HINT)
    if not isinstance(digest, str) or not is_digest(digest):
        raise InputError(f"the hub's digest of {quoted(name)} is none: {quoted(str(digest))}", _HINT)
    return RemoteFile(name, size, digest)


def _fault(name: str) -> str | None:
    """What makes a name unfit to be written below a folder on some platform, if anything does."""
    if _CONTROL.search(name):
        return "holds a control character"
    if "\\" in name or name.startswith("/") or _DRIVE.match(name):
        return "is no relative path"
    parts = name.split("/")
    # Windows drops dots and spaces at the end, so that "..  " is ".." there; this also finds empty parts
    if not all(part.rstrip(". ") for part in parts):
        return "leaves its folder"
    if any(_DEVICE.fullmatch(part) for part in parts):
        return "is a device"
    if parts[0].lower() == ".git":
        return "would lie among git's own files"
    if len(name.encode()) > _NAME_BYTES or any(len(part.encode()) > _PART_BYTES for part in parts):
        return "is too long"
    return None


def _check_apart(names: list[str]) -> None:
    """No name twice, and none that is another one's folder: the second would be written through the first, a link."""
    known = set(names)
    if len(known) != len(names):
        twice = next(name for position, name in enumerate(names) if name in names[:position])
        raise InputError(f"the repository lists {quoted(twice)} twice", _HINT)
    for name in names:
        folder = name.rpartition("/")[0]
        while folder:
            if folder in known:
                raise InputError(f"{quoted(folder)} is a file of the repository and also a folder", _HINT)
            folder = folder.rpartition("/")[0]
