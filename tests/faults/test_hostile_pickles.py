"""Pickles and archives made to hurt: each is one clear InputError, soon, in little memory; none runs code."""

import io
import itertools
import json
import os
import pickle
import random
import struct
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from measured import measure
from pickle_tables import refusals

from lmx.convert.pickle_source import INDEX_BIN, SINGLE_BIN, PickleCheckpoint
from lmx.convert.zip_entries import DIRECTORY_LIMIT_BYTES, read_entries
from lmx.core.errors import InputError, LmxError

SECONDS = 5.0
START_SECONDS = 10.0  # of torch in the child, on a busy machine


class Stored:
    """What stands in a pickle for the storage `key` of `numel` floats."""

    def __init__(self, key: str = "0", numel: object = 4, kind: object = torch.FloatStorage) -> None:
        self.id = ("storage", kind, key, "cpu", numel)


class Call:
    """What becomes a call of `function` when it is unpickled."""

    def __init__(self, function: object, *arguments: object) -> None:
        self._reduced = (function, arguments)

    def __reduce__(self) -> tuple[object, ...]:
        return self._reduced


class Pickler(pickle.Pickler):
    def persistent_id(self, value: object) -> object:
        return value.id if isinstance(value, Stored) else None


def pickled(value: object) -> bytes:
    data = io.BytesIO()
    Pickler(data, protocol=2).dump(value)
    return data.getvalue()


def tensor(shape: tuple[int, ...], strides: tuple[int, ...], offset: int = 0, storage: Stored | None = None) -> Call:
    rebuild = torch._utils._rebuild_tensor_v2
    return Call(rebuild, storage or Stored(), offset, shape, strides, False, {})


def archive(pickle_bytes: bytes, storages: dict[str, bytes] | None = None, **options: object) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", **options) as file:  # type: ignore[call-overload]
        file.writestr("archive/data.pkl", pickle_bytes)
        file.writestr("archive/byteorder", b"little")
        for key, content in (storages if storages is not None else {"0": bytes(16)}).items():
            file.writestr(f"archive/data/{key}", content)
        file.writestr("archive/version", b"3\n")
    return data.getvalue()


GOOD = {"a": tensor((2, 2), (2, 1))}


def refused(folder: Path, content: bytes) -> LmxError:
    (folder / SINGLE_BIN).write_bytes(content)
    begun = time.monotonic()
    with pytest.raises(InputError) as caught:
        PickleCheckpoint.open(folder)
    assert time.monotonic() - begun < SECONDS + START_SECONDS
    assert caught.value.hint
    assert len(caught.value.message) < 1000
    assert caught.value.message.isprintable()
    return caught.value


def test_what_the_others_are_made_from_is_read(tmp_path: Path) -> None:
    floats = struct.pack("<4f", 1, 2, 3, 4)
    (tmp_path / SINGLE_BIN).write_bytes(archive(pickled(GOOD), {"0": floats}))
    assert PickleCheckpoint.open(tmp_path).tensor("a").tolist() == [[1, 2], [3, 4]]


CODE: list[Callable[[str], Call]] = [
    lambda canary: Call(os.system, f"touch {canary}"),
    lambda canary: Call(eval, f"open({canary!r}, 'w')"),
    lambda canary: Call(torch.save, torch.ones(1), canary),
]


@pytest.mark.parametrize("code", CODE)
def test_no_code_runs(tmp_path: Path, code: Callable[[str], Call]) -> None:
    canary = tmp_path / "canary"
    content = pickled({**GOOD, "b": code(str(canary))})
    assert "is refused" in refused(tmp_path, archive(content)).message
    assert not canary.exists()
    # The same bytes do run where nobody looks: else this test would show nothing
    if code is CODE[0]:
        pickle.loads(pickled(code(str(canary))))
        assert canary.exists()


MEMORY_BOMB = b"\x80\x02" + b"cbuiltins\nbytearray\n" + b"\x8a\x06" + (2**40).to_bytes(6, "little") + b"\x85R."
# One entry of a dictionary, replaced again and again by bytearray(2**28): little memory, much time
REPLACE = b"K\x00h\x00J" + (2**28).to_bytes(4, "little") + b"\x85Rs"
TIME_BOMB = b"\x80\x02cbuiltins\nbytearray\nq\x00}" + REPLACE * 100_000 + b"."

PICKLES: dict[str, tuple[object, str]] = {
    "a storage that is missing": ({"a": tensor((1,), (1,), storage=Stored("7", 1))}, "refused|not in the archive"),
    "a key that leads out": ({"a": tensor((1,), (1,), storage=Stored("../../version", 1))}, "refused|not in the arch"),
    "a storage of 2**60": ({"a": tensor((2**60,), (1,), storage=Stored("0", 2**60))}, "of another size"),
    "a shape beyond the storage": ({"a": tensor((5,), (1,))}, "refused|needs more|another size"),
    "an offset beyond the storage": ({"a": tensor((4,), (1,), 1)}, "refused|needs more|another size"),
    "strides beyond the storage": ({"a": tensor((2, 2), (1000, 1))}, "refused|needs more|another size"),
    "a million times the same number": ({"a": tensor((10**6, 10**6), (0, 0))}, "needs more"),
    "negative strides": ({"a": tensor((4,), (-1,), 3)}, "refused|negative|another size"),
    "a negative size": ({"a": tensor((-4,), (1,))}, "refused|negative"),
    "numbers among tensors": ({**GOOD, "b": 3}, "not a tensor"),
    "names that are no text": ({**GOOD, 3: tensor((1,), (1,))}, "not by text"),
    "a list": ([tensor((1,), (1,))], "not a dictionary"),
    "complex numbers": ({"a": tensor((1,), (1,), storage=Stored("0", 2, torch.ComplexDoubleStorage))}, "dtype|another"),
    "a terminal's codes": ({"\x1b]0;x\x07": 3, **GOOD}, "not a tensor"),
    "no pickle": (b"weights", "refused"),
    "half a pickle": (pickled(GOOD)[:-20], "refused"),
    "a terabyte": (MEMORY_BOMB, "memory|refused"),
    "hours": (TIME_BOMB, "too long"),
}


@pytest.fixture(scope="module")
def messages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """What is said of each of the pickles."""
    folder = tmp_path_factory.mktemp("pickles")
    for number, (value, _) in enumerate(PICKLES.values()):
        (folder / f"{number}.bin").write_bytes(archive(value if isinstance(value, bytes) else pickled(value)))
    told = refusals([folder / f"{number}.bin" for number in range(len(PICKLES))])
    return dict(zip(PICKLES, told, strict=True))


@pytest.mark.parametrize("name", PICKLES)
def test_pickles(messages: dict[str, str | None], name: str) -> None:
    message, words = messages[name], PICKLES[name][1]
    assert message is not None
    assert any(word in message for word in words.split("|")), message


@pytest.mark.parametrize("name", ["numbers among tensors", "half a pickle"])
def test_a_folder_with_such_a_pickle_is_refused(tmp_path: Path, name: str) -> None:
    value, words = PICKLES[name]
    content = archive(value if isinstance(value, bytes) else pickled(value))
    assert words in refused(tmp_path, content).message


def patched(content: bytes, old: bytes, new: bytes, last: bool = False) -> bytes:
    at = content.rindex(old) if last else content.index(old)
    return content[:at] + new + content[at + len(old) :]


def local_header_of(name: bytes, content: bytes, shift: int) -> bytes:
    """The directory's pointer to an entry, moved by `shift`."""
    at = content.rindex(name) - 4
    (offset,) = struct.unpack_from("<I", content, at)
    return content[:at] + struct.pack("<I", offset + shift) + content[at + 4 :]


def renamed(old: bytes, new: bytes) -> bytes:
    return archive(pickled(GOOD)).replace(b"archive/" + old, new)


PLAIN = archive(pickled(GOOD))
END = PLAIN.rindex(b"PK\x05\x06")


def with_end(field: int, code: str, value: int) -> bytes:
    data = bytearray(PLAIN)
    struct.pack_into(code, data, END + field, value)
    return bytes(data)


def same_place_twice() -> bytes:
    """The directory sends two storages of one size to the same bytes."""
    content = archive(pickled(GOOD), {"0": bytes(16), "1": bytes(16)})
    distance = content.index(b"archive/data/1") - content.index(b"archive/data/0")
    moved = local_header_of(b"archive/data/1", content, -distance)
    return patched(moved, b"archive/data/1", b"archive/data/0", last=True)


ARCHIVES: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "no archive"),
    "noise": (lambda: bytes(range(256)) * 40, "no archive"),
    "only a beginning": (lambda: b"PK\x03\x04" + bytes(100), "directory is broken"),
    "the older format": (lambda: b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "before 1.6"),
    "a pointer": (lambda: b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
    "cut off": (lambda: PLAIN[: END - 30], "directory is broken"),
    "nothing in it": (lambda: b"PK\x03\x04" + PLAIN[END:][:8] + bytes(14), "no archive|broken"),
    "a compressed pickle of a gigabyte": (
        lambda: archive(bytes(1 << 26), compression=zipfile.ZIP_DEFLATED),
        "compressed",
    ),
    "a compressed storage": (lambda: archive(pickled(GOOD), compression=zipfile.ZIP_DEFLATED), "compressed"),
    "sizes that differ": (lambda: patched(PLAIN, struct.pack("<II", 16, 16), struct.pack("<II", 9, 16), True), "compr"),
    "a large pickle": (lambda: archive(b"N" * (5 << 20)), "more than any table"),
    "no pickle": (lambda: renamed(b"data.pkl", b"archive/data.pkx"), "no archive of weights"),
    "big-endian": (lambda: PLAIN.replace(b"little", b"big   "), "little-endian"),
    "a script": (lambda: renamed(b"version", b"archive/constants.pkl"), "broken|no archive|no entry"),
    "a directory of gigabytes": (lambda: with_end(12, "<I", 2**31), "broken"),
    "a directory elsewhere": (lambda: with_end(16, "<I", 2**31), "broken|begins outside|no entry"),
    "a directory before the file": (lambda: with_end(16, "<I", 0), "broken|no entry|overlaps"),
    "an entry elsewhere": (lambda: local_header_of(b"archive/data/0", PLAIN, 1 << 30), "outside"),
    "an entry between": (lambda: local_header_of(b"archive/data/0", PLAIN, 3), "no entry"),
    "an entry over the directory": (
        lambda: PLAIN.replace(struct.pack("<II", 16, 16), struct.pack("<II", 150, 150)),
        "overlaps",
    ),
    "an entry beyond the file": (
        lambda: PLAIN.replace(struct.pack("<II", 16, 16), struct.pack("<II", 10**9, 10**9)),
        "truncated",
    ),
    "two names in one place": (same_place_twice, "overlaps"),
    "another name in front": (lambda: patched(PLAIN, b"archive/data/0", b"archive/data/1"), "another name"),
    "an encrypted entry": (
        lambda: patched(PLAIN, b"PK\x01\x02\x14\x03\x14\x00\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01\x00", True),
        "encrypted",
    ),
    "the way out": (lambda: renamed(b"data/0", b"archive/../../"), "outside"),
    "dots": (lambda: renamed(b"data/0", b"archive/../..0"), "outside"),
    "a root": (lambda: renamed(b"data/0", b"//etc//passwd0"), "outside"),
    "another folder": (lambda: renamed(b"data/0", b"brchive/data/0"), "outside"),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_archives(tmp_path: Path, name: str) -> None:
    make, words = ARCHIVES[name]
    message = refused(tmp_path, make()).message
    assert any(word in message for word in words.split("|")), message


def test_a_name_that_stands_twice(tmp_path: Path) -> None:
    content = archive(pickled(GOOD), {"0": bytes(16), "1": bytes(16)}).replace(b"archive/data/1", b"archive/data/0")
    assert "twice" in refused(tmp_path, content).message


def test_a_directory_larger_than_any_models(tmp_path: Path) -> None:
    entry = PLAIN[PLAIN.index(b"PK\x01\x02") : PLAIN.index(b"PK\x01\x02", PLAIN.index(b"PK\x01\x02") + 4)]
    count = DIRECTORY_LIMIT_BYTES // len(entry) + 2
    start = PLAIN.index(b"PK\x01\x02")
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, count * len(entry), start, 0)
    assert "more than any model needs" in refused(tmp_path, PLAIN[:start] + entry * count + end).message


def test_no_changed_byte_of_the_archive_gets_past_the_checks(tmp_path: Path) -> None:
    """Whatever a byte is changed to, the entries are refused, or lie apart from each other within the file."""
    chance, path = random.Random(0), tmp_path / "x.bin"
    refusals = 0
    for _ in range(3000):
        content = bytearray(PLAIN)
        content[chance.randrange(len(content))] = chance.randrange(256)
        path.write_bytes(content)
        with path.open("rb") as file:
            try:
                entries = read_entries(file.fileno(), len(content), path)
            except InputError:
                refusals += 1
                continue
        ends = sorted((entry.offset, entry.offset + entry.nbytes) for entry in entries.values())
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ends))
        assert 0 < ends[0][0] <= ends[-1][1] <= len(content)
    assert 500 < refusals < 3000


@pytest.mark.parametrize("shard", ["../pytorch_model.bin", "/etc/passwd.bin", "a.safetensors", "a\0.bin", ".bin/x"])
def test_an_index_stays_in_its_folder(tmp_path: Path, shard: str) -> None:
    (tmp_path / INDEX_BIN).write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(InputError, match="plain"):
        PickleCheckpoint.open(tmp_path)


def test_a_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / SINGLE_BIN)
    with pytest.raises(InputError, match="regular"):
        PickleCheckpoint.open(tmp_path)


OPEN = """
import sys
from pathlib import Path
from lmx.convert.pickle_source import PickleCheckpoint
from lmx.core.errors import InputError
try:
    PickleCheckpoint.open(Path(sys.argv[1]))
except InputError:
    print("refused")
"""


def test_memory_stays_bounded(tmp_path: Path) -> None:
    """Four million lists in as many bytes, and what the process takes while it holds them."""
    (tmp_path / SINGLE_BIN).write_bytes(archive(b"\x80\x02(" + b"]" * 4_000_000 + b"t."))
    ran = measure(sys.executable, "-c", OPEN, str(tmp_path))
    assert (ran.code, ran.out) == (0, "refused\n")
    assert ran.peak_bytes < 2 << 30
