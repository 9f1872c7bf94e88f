"""A file while it arrives: what the next process believes of it, and what a late thread may still do to it."""

import hashlib
from pathlib import Path

import pytest

from lmx.convert.listing import RemoteFile
from lmx.convert.part_file import PIECE_BYTES, PartFile, part_digests, resumable_bytes

CONTENT = b"0123456789abcdef" * ((3 * PIECE_BYTES + 1000) // 16)
FILE = RemoteFile("model.safetensors", len(CONTENT), hashlib.sha256(CONTENT).hexdigest())
HEAD = b"lmx 1 %d %d\n" % (len(CONTENT), PIECE_BYTES)


def write_piece(part: PartFile, piece: int) -> None:
    start, stop = part.span(piece)
    assert part.write(start, CONTENT[start:stop])
    part.finish(piece)


def journal(folder: Path) -> Path:
    return folder / f"{FILE.digest}.lmx-journal.incomplete"


@pytest.fixture
def half(tmp_path: Path) -> Path:
    """Pieces 2 and 0 of four are here, the last of them shorter than the others."""
    part = PartFile.open(tmp_path, FILE)
    for piece in (2, 0):
        write_piece(part, piece)
    part.close()
    return tmp_path


def test_the_next_process_goes_on_with_what_is_missing(half: Path) -> None:
    assert resumable_bytes(half, FILE) == 2 * PIECE_BYTES
    part = PartFile.open(half, FILE)
    assert (part.missing, part.resumed_bytes) == ([1, 3], 2 * PIECE_BYTES)
    for piece in part.missing:
        write_piece(part, piece)
    assert part.digest(lambda: True) == FILE.digest
    part.install(half / "whole")
    part.close()
    assert (half / "whole").read_bytes() == CONTENT
    assert [path.name for path in half.iterdir()] == ["whole"]


@pytest.mark.parametrize("tail", [b"", b"1", b"3"])
def test_of_a_torn_line_nothing_is_believed(half: Path, tail: bytes) -> None:
    journal(half).write_bytes(HEAD + b"2\n0\n" + tail)
    part = PartFile.open(half, FILE)
    assert part.missing == [1, 3]
    write_piece(part, 3)
    part.close()
    assert journal(half).read_bytes() == HEAD + b"2\n0\n3\n"


@pytest.mark.parametrize(
    "lines",
    [b"", b"lmx 1 5 5\n0\n1\n", HEAD[:-1], HEAD + b"x\n", HEAD + b"4\n", HEAD + b"-1\n", HEAD + b"\0\0\n", b"\xff"],
)
def test_a_journal_that_cannot_be_ours_is_not_believed(half: Path, lines: bytes) -> None:
    journal(half).write_bytes(lines)
    assert resumable_bytes(half, FILE) == 0
    part = PartFile.open(half, FILE)
    assert part.missing == [0, 1, 2, 3]
    part.close()
    assert journal(half).read_bytes() == HEAD


def test_a_journal_without_its_data_is_not_believed(half: Path) -> None:
    data = half / f"{FILE.digest}.lmx.incomplete"
    data.write_bytes(bytes(5))
    assert resumable_bytes(half, FILE) == 0
    data.unlink()
    assert resumable_bytes(half, FILE) == 0
    PartFile.open(half, FILE).close()
    assert part_digests(half) == {FILE.digest}


def test_a_late_thread_cannot_change_what_was_checked(half: Path) -> None:
    part = PartFile.open(half, FILE)
    for piece in part.missing:
        write_piece(part, piece)
    assert part.digest(lambda: True) == FILE.digest
    assert not part.write(5, b"other bytes of the same size")
    part.install(half / "whole")
    assert not part.write(5, b"other bytes of the same size")
    part.close()
    assert not part.write(5, b"other bytes of the same size")
    assert (half / "whole").read_bytes() == CONTENT


def test_a_file_that_begins_anew_can_be_written(half: Path) -> None:
    part = PartFile.open(half, FILE)
    assert part.digest(lambda: True) != FILE.digest
    part.begin_anew()
    assert (part.missing, part.resumed_bytes) == ([0, 1, 2, 3], 0)
    write_piece(part, 1)
    part.close()
    assert journal(half).read_bytes() == HEAD + b"1\n"
    part.finish(2)
    assert journal(half).read_bytes() == HEAD + b"1\n"
