"""What all jobs that make a checkpoint from a source begin with: whether they may, and what tells one from another."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from lmx.core.checkpoint import Source
from lmx.core.errors import UsageError
from lmx.core.files import quoted
from lmx.core.output import SINGLE_FILE_SUFFIX, check_target, is_single_file
from lmx.core.shards import Shard


def check_job(source: Source, target: Path, *, force: bool, makes_file: bool = False) -> None:
    """Look at the names before any work is done. makes_file: the output is one file, not a folder.

    Raises:
        UsageError: the target's name is none for such an output, or it holds the source, which would be replaced.
        ConflictError: as `check_target`.

    """
    if makes_file and not is_single_file(target):
        raise UsageError(f"{quoted(str(target))} is no name for a GGUF", f"let it end in {SINGLE_FILE_SUFFIX}")
    if is_single_file(target) and not makes_file:
        raise UsageError(f"{quoted(str(target))} is the name of a GGUF, not of a folder", "choose another name")
    _check_apart(source, target)
    check_target(target, force=force)


def _check_apart(source: Source, target: Path) -> None:
    """Replacing the source, or a folder around it, by what is made of it would leave nothing to go back to."""
    places = {place for path in source.files for place in (path.parent.resolve(), path.resolve())}
    if any(place.is_relative_to(target.resolve()) for place in places):
        raise UsageError(f"{quoted(str(target))} holds the source itself", "choose another name for the output")


def job_identity(source: Source, shards: Sequence[Shard], *settings: object) -> str:
    """What must be the same for a half-made output to be continued: settings (as JSON), source, and every header."""
    stats = [(str(path), path.stat()) for path in source.files]
    files = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    headers = [hashlib.sha256(shard.header).hexdigest() for shard in shards]
    identity = [*settings, source.label, files, source.config, headers]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
