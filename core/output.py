"""A checkpoint folder, or one large file, that appears whole or not at all, made by a job that can be killed and go on.

While the job runs there is only `NAME.partial`, with four things in it: `out`, the folder as it grows;
`journal.jsonl`, its first line the job's identity, then a line for each shard that is complete and synced, or is so up
to some tensor; `.lock`, locked by the process that works; and for a moment, where an old output is replaced, `old`. At
the end `out`, or the one file in it, is renamed to NAME.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import cast

from lmx.core.errors import ConflictError, ResourceError, UsageError
from lmx.core.files import quoted, read_bounded, sync_folder, write_atomically
from lmx.core.jsonfile import JSON
from lmx.core.shards import Shard, ShardWriter

_LOCK, _JOURNAL, _OUT, _OLD = ".lock", "journal.jsonl", "out", "old"
_COMPANION_LIMIT_BYTES = 256 << 20
_CONFIGS = ("config.json", "params.json")  # one of these makes a folder a checkpoint
SINGLE_FILE_SUFFIX = ".gguf"
"""A target of such a name is one file, not a folder."""


class OutputFolder:
    """The folder while it grows; made by `open_output`."""

    def __init__(
        self, target: Path, partial: Path, finished: dict[str, dict[str, JSON]], begun: Mapping[str, int]
    ) -> None:
        self.target = target
        self.begun = begun
        """Shards of an earlier run that are not complete, and how many of their slots, from the first on, are."""
        self.finished: Mapping[str, dict[str, JSON]] = finished
        """Shards of an earlier run that are complete, with the notes that were taken on them."""
        self._partial, self._finished = partial, finished

    @property
    def folder(self) -> Path:
        """Where the output grows until it has its name."""
        return self._partial / _OUT

    @contextmanager
    def shard(self, shard: Shard, notes: dict[str, JSON]) -> Iterator[ShardWriter]:
        """Write one shard in the block. `notes`, as they are at its end, are kept with it in the journal."""
        with ShardWriter(self._partial / _OUT / shard.name, shard, self.begun.get(shard.name, 0)) as writer:
            yield writer
        sync_folder(self._partial / _OUT)
        _append(self._partial / _JOURNAL, {"shard": shard.name, "bytes": shard.size, "notes": notes})
        self._finished[shard.name] = notes

    def keep(self, writer: ShardWriter, slots: int) -> None:
        """Note that a shard's first slots are complete, so that a run that is killed goes on behind them."""
        writer.sync()
        _append(self._partial / _JOURNAL, {"begun": writer.shard.name, "slots": slots})

    def add(self, name: str, data: bytes) -> None:
        """Write a small file, synced."""
        with (self._partial / _OUT / name).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def copy(self, paths: Sequence[Path]) -> None:
        """Take over small files that stand beside the source's weights. Raises InputError, NotFoundError."""
        for path in paths:
            self.add(path.name, read_bounded(path, _COMPANION_LIMIT_BYTES))

    def commit(self) -> None:
        """Give the folder, or the file, its name; an old output of that name goes with the partial folder."""
        made = self._partial / _OUT
        sync_folder(made)
        if _exists(self.target):
            self.target.rename(self._partial / _OLD)
        (made / self.target.name if is_single_file(self.target) else made).rename(self.target)
        sync_folder(self.target.parent)
        with suppress(OSError):  # the output is there; what may be left beside it is swept up by the next run
            _discard(self._partial)

    def discard(self) -> None:
        """Forget all that was written, where it would serve no later run."""
        _discard(self._partial)

    def check_room(self, shards: Sequence[Shard]) -> None:
        """Raise ResourceError where the disk has no room for what is yet to be written of these."""
        missing = [shard for shard in shards if shard.name not in self.finished]
        there = sum(slot.nbytes for shard in missing for slot in shard.slots[: self.begun.get(shard.name, 0)])
        needed, free = sum(shard.size for shard in missing) - there, self.free_bytes()
        if needed > free:
            raise ResourceError(
                f"{quoted(str(self.target))} needs {needed / 1e9:.2f} GB more, its disk has {free / 1e9:.2f} GB left",
                "free space on that disk, or choose another folder",
            )

    def free_bytes(self) -> int:
        """The room that is left on the disk."""
        return shutil.disk_usage(self._partial).free


@contextmanager
def open_output(target: Path, job: str, *, force: bool = False) -> Iterator[OutputFolder]:
    """Take `target` for a job, alone; go on where an earlier run of the same job stopped.

    job: what identifies it; after a run of another job on the same target, everything begins anew. What a failed run
    leaves in NAME.partial serves the next one. Nothing becomes visible before `commit`.

    Raises:
        ConflictError: the target exists and not `force`, or is not a checkpoint, or another process works on it.
        ResourceError: the disk is full, or may not be written; also for OSError in the block.
        UsageError: the target cannot be a folder's name.

    """
    target = Path(os.path.abspath(target))
    if not target.name:
        raise UsageError(f"{quoted(str(target))} cannot be an output folder", "name a new folder")
    partial = target.with_name(target.name + ".partial")
    try:
        if not _exists(partial):
            check_target(target, force=force)
        with _locked(partial):
            _settle(target, partial)
            if not (partial / _OUT).exists() and _exists(target) and not force:
                _discard(partial)  # the empty shell of a run that ended well but for removing it
            check_target(target, force=force)
            yield OutputFolder(target, partial, *_resume(partial, job))
    except OSError as error:
        raise ResourceError(
            f"{quoted(str(target))} cannot be written: {(error.strerror or str(error)).lower()}",
            "free space on its disk or choose another folder; the same command then goes on where it stopped",
        ) from error


def check_target(target: Path, *, force: bool) -> None:
    """Raise ConflictError for a target that exists, or, with `force`, one that is no checkpoint and holds something.

    For a job that takes time before it opens its output.
    """
    if not _exists(target):
        return
    if not force:
        raise ConflictError(f"{quoted(str(target))} exists already", "choose another name, or replace it with --force")
    if is_single_file(target):
        replaced = target.is_file()
    else:
        configs = [target / name for name in _CONFIGS]
        replaced = target.is_dir() and (any(path.exists() for path in configs) or not any(target.iterdir()))
    if not replaced:
        kind = "file" if is_single_file(target) else "checkpoint folder"
        raise ConflictError(f"{quoted(str(target))} is no {kind}, and is not replaced", "choose another name")


def is_single_file(target: Path) -> bool:
    """Whether an output of this name is one file."""
    return target.suffix == SINGLE_FILE_SUFFIX


@contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """Hold the lock of a partial folder, made if need be. The kernel frees it, whatever ends the process."""
    partial.mkdir(parents=True, exist_ok=True)
    fd = os.open(partial / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            same = os.path.samestat(os.fstat(fd), os.stat(partial / _LOCK))
        except (BlockingIOError, FileNotFoundError):
            same = False  # FileNotFoundError: its owner has just finished and removed it
        if not same:
            raise ConflictError(
                f"{quoted(str(partial))} is being written by another process", "wait for it to end, or stop it"
            )
        yield
    finally:
        os.close(fd)


def _settle(target: Path, partial: Path) -> None:
    """Finish what a run that was killed between its two last renames left: the old output is put back, or removed."""
    old = partial / _OLD
    if not _exists(old):
        return
    if _exists(target):
        _remove(old)
    else:
        old.rename(target)
        sync_folder(target.parent)


def _resume(partial: Path, job: str) -> tuple[dict[str, dict[str, JSON]], dict[str, int]]:
    """The shards of the same job that are complete, and those begun, with the journal cut to them.

    After another job, or none, a fresh start.
    """
    out, journal = partial / _OUT, partial / _JOURNAL
    lines = _read_journal(journal)
    if lines[:1] != [{"job": job}]:
        lines = [{"job": job}]
    whole = [line for line in lines[1:] if _is_whole(line, out)]
    finished = {str(line["shard"]): cast("dict[str, JSON]", line["notes"]) for line in whole}
    out.mkdir(exist_ok=True)
    begun = {
        str(line["begun"]): slots
        for line in lines[1:]
        if isinstance(slots := line.get("slots"), int) and (out / str(line.get("begun"))).is_file()
    }
    begun = {name: slots for name, slots in begun.items() if name not in finished}
    for path in [path for path in out.iterdir() if path.name not in finished and path.name not in begun]:
        _remove(path)
    halves: list[dict[str, JSON]] = [{"begun": name, "slots": slots} for name, slots in begun.items()]
    write_atomically(journal, b"".join(map(_line, [lines[0], *whole, *halves])))
    return finished, begun


def _is_whole(line: dict[str, JSON], out: Path) -> bool:
    """Whether a line of the journal tells of a shard that is there."""
    path = out / str(line.get("shard"))
    return isinstance(line.get("notes"), dict) and path.is_file() and path.stat().st_size == line.get("bytes")


def _read_journal(path: Path) -> list[dict[str, JSON]]:
    """Its lines, up to one that a killed run left unfinished."""
    lines: list[dict[str, JSON]] = []
    with suppress(FileNotFoundError, ValueError):
        for line in path.read_text("ascii").splitlines(keepends=True):
            entry = json.loads(line)
            if not isinstance(entry, dict) or not line.endswith("\n"):
                break
            lines.append(entry)
    return lines


def _append(path: Path, entry: Mapping[str, JSON]) -> None:
    """Add a line to the journal, synced."""
    with path.open("ab") as file:
        file.write(_line(entry))
        file.flush()
        os.fsync(file.fileno())


def _line(entry: Mapping[str, JSON]) -> bytes:
    return (json.dumps(entry) + "\n").encode("ascii")


def _exists(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _discard(partial: Path) -> None:
    """Remove a partial folder, its lock last, so that who comes meanwhile finds it held."""
    halves = partial.glob(f".{_JOURNAL}.*.partial")  # a journal that a killed run was about to put in place
    for path in (*halves, partial / _OUT, partial / _OLD, partial / _JOURNAL, partial / _LOCK):
        _remove(path)
    with suppress(OSError):
        partial.rmdir()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
