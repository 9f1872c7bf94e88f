"""What a pull reports while it runs. Sizes are in bytes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from lmx.convert.choose import LeftOut
from lmx.convert.listing import RemoteFile


@dataclass(frozen=True, slots=True)
class Planned:
    """What will be done. `missing` are those of `files` that are not here whole; `missing_bytes` what is to come."""

    repo: str
    commit: str
    files: tuple[RemoteFile, ...]
    missing: tuple[RemoteFile, ...]
    missing_bytes: int
    left_out: tuple[LeftOut, ...]

    @property
    def total_bytes(self) -> int:
        """The size of all files that are taken."""
        return sum(file.size for file in self.files)

    @property
    def saved_bytes(self) -> int:
        """The size of all files that are not."""
        return sum(group.nbytes for group in self.left_out)


@dataclass(frozen=True, slots=True)
class Arrived:
    """So much of a file is here; `resumed` of it since an earlier run."""

    name: str
    done: int
    size: int
    resumed: int


@dataclass(frozen=True, slots=True)
class Waiting:
    """Another process fetches this file; this one waits for it."""

    name: str


@dataclass(frozen=True, slots=True)
class Checking:
    """A file is here, and its digest is computed."""

    name: str


@dataclass(frozen=True, slots=True)
class Retrying:
    """A connection failed, and is tried again after a while."""

    name: str
    reason: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Restarted:
    """What an earlier run had left of a file was damaged; the file begins anew."""

    name: str


@dataclass(frozen=True, slots=True)
class Installed:
    """A file has its right digest and its name."""

    name: str


@dataclass(frozen=True, slots=True)
class Pulled:
    """The last event: all files are in `folder`."""

    folder: Path
    plan: Planned
    fetched_bytes: int


FileEvent: TypeAlias = Arrived | Waiting | Checking | Retrying | Restarted | Installed
Event: TypeAlias = Planned | FileEvent | Pulled
Watcher: TypeAlias = Callable[[Iterator[Event]], Pulled]
"""Takes all events of a pull, shows what it likes, and returns the last one."""


def unwatched(events: Iterator[Event]) -> Pulled:
    """Take all events and show nothing."""
    for event in events:
        if isinstance(event, Pulled):
            return event
    raise TypeError("the last event of a pull is Pulled")
