"""The directory of a zip archive that torch wrote, checked before anything of it is believed. Imports no torch.

torch's archives (https://pytorch.org/docs/stable/notes/serialization.html#serialized-file-format-for-torch-save) store
every entry uncompressed, so that its bytes can be mapped where they lie: `NAME/data.pkl`, `NAME/byteorder`, and
`NAME/data/KEY` for each storage.
"""

import io
import os
import struct
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from lmx.core.errors import InputError
from lmx.core.files import quoted, read_range

# The stdlib's reader takes the directory in one piece; that of 20,000 tensors has 2 MB.
DIRECTORY_LIMIT_BYTES = 16 << 20
_LOCAL = struct.Struct("<4s5H3I2H")  # APPNOTE.TXT 4.3.7
_LOCAL_MARK = b"PK\x03\x04"
_ENCRYPTED = 0x1
# What the stdlib's reader raises; a kind of RuntimeError where an entry wants a newer version of the format.
_MALFORMED = (zipfile.BadZipFile, struct.error, ValueError, OSError, EOFError, RuntimeError, OverflowError)
_DAMAGED = "the file is damaged or hostile: get it again from its publisher, as safetensors if there are any"


@dataclass(frozen=True, slots=True)
class Entry:
    """One stored entry: where in the file its bytes lie. The name is without the archive's own first folder."""

    name: str
    offset: int
    nbytes: int


def read_entries(fd: int, size: int, path: Path) -> dict[str, Entry]:
    """All entries of the archive by name, as they are stored.

    Raises InputError for an archive that is damaged, compressed, encrypted or larger than its file, for entries that
    overlap each other or the directory, and for names that lie twice, lead out of the archive or have no common folder.
    """
    try:
        with os.fdopen(os.dup(fd), "rb") as file, zipfile.ZipFile(_Bounded(file, path)) as archive:
            infos, end = archive.infolist(), archive.start_dir
    except _MALFORMED as error:
        raise damaged(path, f"its zip directory is broken ({error})") from error
    entries = [(info.header_offset, _entry(info, fd, size, path)) for info in infos]
    _check_apart(entries, end, path)
    return _by_name([entry for _, entry in entries], path)


def damaged(path: Path, what: str) -> InputError:
    """The error for an archive that breaks the format."""
    return InputError(f"{quoted(str(path))}: {what}", _DAMAGED)


class _Bounded(io.RawIOBase):
    """A file that refuses to be read in larger pieces than a directory has."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path = file, path

    def read(self, size: int = -1) -> bytes:
        limit = DIRECTORY_LIMIT_BYTES
        data = self._file.read(limit + 1 if size < 0 else min(size, limit + 1))
        if len(data) > limit:
            raise damaged(self._path, f"its zip directory has more than {limit:,} bytes, more than any model needs")
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def seekable(self) -> bool:
        return True


def _entry(info: zipfile.ZipInfo, fd: int, size: int, path: Path) -> Entry:
    name = quoted(info.orig_filename)
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise damaged(path, f"its entry {name} is compressed, which torch never does")
    if info.flag_bits & _ENCRYPTED:
        raise damaged(path, f"its entry {name} is encrypted")
    start = _data_start(info, fd, size, path)
    if start + info.file_size > size:
        raise damaged(path, f"it is truncated: its entry {name} ends beyond the file's {size:,} bytes")
    return Entry(info.orig_filename, start, info.file_size)


def _data_start(info: zipfile.ZipInfo, fd: int, size: int, path: Path) -> int:
    """Where the entry's bytes begin, by the header in front of them, which must be that of the same entry."""
    name = info.orig_filename.encode()
    if not 0 <= info.header_offset <= size - _LOCAL.size:
        raise damaged(path, f"its entry {quoted(info.orig_filename)} begins outside of the file")
    mark, *_, name_length, extra_length = _LOCAL.unpack(read_range(fd, _LOCAL.size, info.header_offset, path))
    start = info.header_offset + _LOCAL.size
    if mark != _LOCAL_MARK or start + name_length > size or name_length != len(name):
        raise damaged(path, f"there is no entry {quoted(info.orig_filename)} where its directory says")
    if read_range(fd, name_length, start, path) != name:
        raise damaged(path, f"its entry {quoted(info.orig_filename)} has another name in its own header")
    return int(start + name_length + extra_length)


def _check_apart(entries: Iterable[tuple[int, Entry]], end: int, path: Path) -> None:
    """Entries follow each other, the directory follows them all."""
    before = 0
    for header, entry in sorted(entries, key=lambda item: item[0]):
        if header < before or entry.offset + entry.nbytes > end:
            raise damaged(path, f"its entry {quoted(entry.name)} overlaps another, or the directory")
        before = entry.offset + entry.nbytes


def _by_name(entries: list[Entry], path: Path) -> dict[str, Entry]:
    root = entries[0].name.partition("/")[0] + "/" if entries else ""
    named: dict[str, Entry] = {}
    for entry in entries:
        name = entry.name.removeprefix(root)
        if name == entry.name or ".." in name.split("/") or "\0" in name or name.startswith("/"):
            raise damaged(path, f"its entry {quoted(entry.name)} lies outside of the archive's folder {quoted(root)}")
        if name in named:
            raise damaged(path, f"its entry {quoted(entry.name)} stands twice in the directory")
        named[name] = Entry(name, entry.offset, entry.nbytes)
    return named
