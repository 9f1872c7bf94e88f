"""The tables of many pickles, read by as few children as survive them: each child imports torch anew."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from lmx.convert.pickle_table import Archive, _Child, _tensor
from lmx.convert.zip_entries import read_entries
from lmx.core.errors import InputError
from lmx.core.files import open_regular

SECONDS = 5.0  # that a child may take for a file


def refusals(paths: Sequence[Path]) -> list[str | None]:
    """Why the table of each archive is not believed, or None for one that has tensors and is."""
    told: list[str | None] = []
    while len(told) < len(paths):
        told += _until_the_child_dies(paths[len(told) :])
    return told


def _until_the_child_dies(paths: Sequence[Path]) -> list[str | None]:
    told: list[str | None] = []
    with ExitStack() as stack:
        descriptors = [stack.enter_context(open_regular(path)) for path in paths]
        entries = [read_entries(fd, path.stat().st_size, path) for fd, path in zip(descriptors, paths, strict=True)]
        child = stack.enter_context(_Child(descriptors))
        child.start(paths[0])
        for path, descriptor, directory in zip(paths, descriptors, entries, strict=True):
            archive, started = Archive(path, descriptor, directory), time.monotonic()
            message = _refusal(child, archive)
            assert len(message or "") < 1000
            assert (message or "").isprintable()
            assert time.monotonic() - started < SECONDS + 1
            told.append(message)
            if message is not None and ("died" in message or "too long" in message):
                break
    return told


def _refusal(child: _Child, archive: Archive) -> str | None:
    try:
        assert [_tensor(row, archive) for row in child.rows(archive.path)]
    except InputError as error:
        return error.message
    return None
