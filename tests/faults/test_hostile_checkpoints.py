"""Checkpoints made to hurt: each is one clear InputError (or NotFoundError), at once, in little memory."""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lmx.core.checkpoint import Checkpoint
from lmx.core.errors import InputError, NotFoundError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def sized(length: int, rest: bytes = b"") -> bytes:
    return length.to_bytes(8, "little") + rest


def packed(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return sized(len(text), text + data)


def tensor(dtype: object = "F32", shape: object = (2,), begin: object = 0, end: object = 8) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


OVERLAP = {"a": tensor(), "b": tensor(begin=4, end=12)}
HOLE = {"a": tensor(), "b": tensor(begin=12, end=20)}

FILES = {
    "empty": (b"", "too few"),
    "one byte": (b"\x01", "too few"),
    "seven bytes": (b"\x00" * 7, "too few"),
    "only a length": (sized(0), "does not begin"),
    "header of 10 GB": (sized(10_000_000_000, b"{}"), "claims 10,000,000,000 bytes"),
    "header of 2**63": (sized(2**63, b"{}"), "claims 9,223,372,036,854,775,808 bytes"),
    "header of 2**64-1": (b"\xff" * 8 + b"{}", "claims 18,446"),
    "header beyond the file": (sized(3, b"{}"), "only 2 follow"),
    "not utf-8": (packed(b'{"\xff": 1}'), "not UTF-8"),
    "not json": (packed(b"{pickle}"), "not valid JSON"),
    "a list": (packed(b"[]"), "does not begin"),
    "deep nesting": (packed(b'{"a":' + b"[" * 100_000), "nested too deeply"),
    "duplicate name": (packed(b'{"a": {}, "a": {}}'), "twice"),
    "no description": (packed({"a": {}}), "'a' is not described"),
    "entry is a list": (packed({"a": ["F32", [2], [0, 8]]}, bytes(8)), "'a' is not described"),
    "unknown dtype": (packed({"a": tensor("Q4_0")}, bytes(8)), "unknown dtype 'Q4_0'"),
    "dtype is an object": (packed({"a": tensor({})}, bytes(8)), "unknown dtype"),
    "negative shape": (packed({"a": tensor(shape=[-2])}, bytes(8)), "impossible shape"),
    "two negatives": (packed({"a": tensor(shape=[-1, -2])}, bytes(8)), "impossible shape"),
    "shape of booleans": (packed({"a": tensor(shape=[True, 2])}, bytes(8)), "impossible shape"),
    "shape of floats": (packed({"a": tensor(shape=[2.0])}, bytes(8)), "impossible shape"),
    "shape is a number": (packed({"a": tensor(shape=2)}, bytes(8)), "impossible shape"),
    "product wraps to the size": (packed({"a": tensor(shape=[2**33, 2**31, 2])}, bytes(8)), "impossible shape"),
    "product of digits": (packed({"a": tensor(shape=[10**4000] * 60)}, bytes(8)), "impossible shape"),
    "number too long": (packed(b'{"a": ' + b"9" * 100_000 + b"}"), "not acceptable JSON"),
    "hidden by a zero": (packed({"a": tensor(shape=[2**62, 4, 0], end=0)}), "impossible shape"),
    "a million dimensions": (packed({"a": tensor(shape=[1] * 1_000_000, end=4)}, bytes(4)), "impossible shape"),
    "offsets backwards": (packed({"a": tensor(begin=8, end=0)}, bytes(8)), "impossible data_offsets"),
    "offsets negative": (packed({"a": tensor(begin=-8, end=0)}, bytes(8)), "impossible data_offsets"),
    "one offset": (packed({"a": {**tensor(), "data_offsets": [8]}}, bytes(8)), "impossible data_offsets"),
    "too few bytes for the shape": (packed({"a": tensor(shape=[3])}, bytes(8)), "needs 12 bytes"),
    "offsets beyond the file": (packed({"a": tensor(shape=[2**40], end=2**42)}, bytes(8)), "truncated"),
    "first tensor not at 0": (packed({"a": tensor(begin=4, end=12)}, bytes(12)), "hole"),
    "overlap": (packed(OVERLAP, bytes(12)), "'b' overlaps"),
    "same bytes twice": (packed({"a": tensor(), "b": tensor()}, bytes(8)), "overlaps"),
    "hole": (packed(HOLE, bytes(20)), "'b' leaves a hole"),
    "bytes after the end": (packed({"a": tensor()}, bytes(9)), "belong to no tensor"),
    "metadata of numbers": (packed({"__metadata__": {"a": 1}}), "other than a string"),
    "metadata is a list": (packed({"__metadata__": []}), "__metadata__ is no object"),
    "terminal codes in a name": (packed({"\x1b]0;owned\x07\n": 1}), r"\x1b]0;owned\x07\n"),
    "a name of megabytes": (packed({"n" * 5_000_000: 1}), "is not described"),
    "half a surrogate": (packed(b'{"\\ud800": 1}'), "surrogate"),
    "300,000 tensors": (packed(b'{"a":[' + b"{}," * 300_000 + b"1]}"), "than 100,000 tensors need"),
}


def refused(action: Callable[[], object]) -> InputError | NotFoundError:
    start = time.perf_counter()
    with pytest.raises((InputError, NotFoundError)) as caught:
        action()
    assert time.perf_counter() - start < 1
    error = caught.value
    assert isinstance(error, InputError | NotFoundError)
    assert len(error.message) < 2000
    assert (error.message + error.hint).isprintable()
    return error


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_file(tmp_path: Path, name: str) -> None:
    content, expected = FILES[name]
    (tmp_path / SINGLE).write_bytes(content)
    error = refused(lambda: Checkpoint.open(tmp_path))
    assert isinstance(error, InputError)
    assert expected in error.message
    assert SINGLE in error.message
    assert "download" in error.hint


@pytest.mark.parametrize(
    "shard",
    [
        "../../etc/passwd",
        "../other/model.safetensors",
        "/etc/passwd",
        "/srv/model.safetensors",
        "sub/model.safetensors",
        "..",
        ".",
        "",
        "C:model.safetensors",
        "..\\model.safetensors",
        "C:\\windows\\model.safetensors",
        "model\x00.safetensors",
        "\x1b[2Jmodel.safetensors",
        "x" * 300 + ".safetensors",
        "tokenizer.json",
        "pytorch_model.bin",
    ],
)
def test_an_index_that_leaves_its_folder(tmp_path: Path, shard: str) -> None:
    folder = tmp_path / "model"
    for place in (folder, tmp_path / "other", folder / "sub"):
        place.mkdir(exist_ok=True)
        save_file({"a": torch.ones(1)}, place / "model-1.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": shard}}))
    error = refused(lambda: Checkpoint.open(folder))
    assert isinstance(error, InputError)
    assert "plain" in error.message
    assert INDEX in error.message


@pytest.mark.parametrize(
    "index",
    [
        *(b"", b"{}", b"[]", b"{", b"\xff", b'{"weight_map": []}', b'{"weight_map": {}}', b'{"weight_map": {"a": 1}}'),
        *(b'{"weight_map": {"a": null}}', b'{"weight_map": {"a": ["x.safetensors"]}}', b'{"a":' * 50_000),
    ],
)
def test_an_index_that_is_none(tmp_path: Path, index: bytes) -> None:
    (tmp_path / INDEX).write_bytes(index)
    assert INDEX in refused(lambda: Checkpoint.open(tmp_path)).message


def test_an_index_that_names_a_missing_shard(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    assert "'model-1.safetensors'" in refused(lambda: Checkpoint.open(tmp_path)).message


def put_directory(path: Path) -> None:
    path.mkdir()


def put_loop(path: Path) -> None:
    path.symlink_to(path.name)


def put_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("put", [os.mkfifo, put_directory, put_loop, put_device])
@pytest.mark.parametrize("name", [SINGLE, INDEX, "model-1.safetensors", "config.json", "generation_config.json"])
def test_something_else_in_place_of_a_file(tmp_path: Path, put: Callable[[Path], None], name: str) -> None:
    if name.endswith("config.json"):
        save_file({"a": torch.ones(1)}, tmp_path / SINGLE)
    if name == "model-1.safetensors":
        (tmp_path / INDEX).write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    put(tmp_path / name)

    def use() -> None:
        checkpoint = Checkpoint.open(tmp_path)
        _ = checkpoint.generation_config
        _ = checkpoint.config

    assert name in refused(use).message


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_config_of_100_megabytes(tmp_path: Path, name: str) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / SINGLE)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b'{"a": 1}')
    os.truncate(tmp_path / name, 100_000_000)
    checkpoint = Checkpoint.open(tmp_path)
    assert "the limit" in refused(lambda: (checkpoint.config, checkpoint.generation_config)).message


def test_an_index_of_100_megabytes(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_bytes(b'{"a": 1}')
    os.truncate(tmp_path / INDEX, 100_000_000)
    assert "the limit" in refused(lambda: Checkpoint.open(tmp_path)).message


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to the superuser")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / SINGLE)
    (tmp_path / SINGLE).chmod(0)
    assert isinstance(refused(lambda: Checkpoint.open(tmp_path)), NotFoundError)


MEASURE = """
import sys, time
from pathlib import Path
from lmx.core.checkpoint import Checkpoint
from lmx.core.errors import InputError
start = time.perf_counter()
try:
    Checkpoint.open(Path(sys.argv[1]))
except InputError:
    print(time.perf_counter() - start, *[line.split()[1] for line in open("/proc/self/status") if line[:5] == "VmHWM"])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")
@pytest.mark.parametrize("filler", [b"[],", b"{},", b"1,", b'"",', b'"a":1,', b"[" * 500 + b"]" * 500 + b","])
def test_the_largest_header_allowed_is_refused_in_little_time_and_memory(tmp_path: Path, filler: bytes) -> None:
    (tmp_path / SINGLE).write_bytes(packed(b'{"a":[' + filler * (99_000_000 // len(filler)) + b"1]}"))
    result = subprocess.run([sys.executable, "-c", MEASURE, tmp_path], capture_output=True, text=True, check=True)
    seconds, kilobytes = result.stdout.split()
    assert float(seconds) < 1
    assert int(kilobytes) < 160_000  # the header was read, but not parsed


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")
@pytest.mark.parametrize(
    "body",
    [
        b",".join(b'"%07d":1' % i for i in range(790_000)),
        b'"a":[' + b",".join(b"[]" for _ in range(190_000)) + b"]",
        b'"a":[' + b",".join(b"{}" for _ in range(90_000)) + b"]",
        b'"a":[' + b",".join(b"%d.5" % i for i in range(1_500_000)) + b"]",
    ],
    ids=["keys", "lists", "objects", "numbers"],
)
def test_what_is_parsed_before_it_is_refused_is_bounded(tmp_path: Path, body: bytes) -> None:
    (tmp_path / SINGLE).write_bytes(packed(b"{" + body + b"}"))
    result = subprocess.run([sys.executable, "-c", MEASURE, tmp_path], capture_output=True, text=True, check=True)
    seconds, kilobytes = result.stdout.split()
    assert float(seconds) < 3  # the machine may be busy; alone it takes under 1
    assert int(kilobytes) < 400_000


def test_many_refusals_leak_no_descriptor(tmp_path: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    (tmp_path / SINGLE).write_bytes(packed(OVERLAP, bytes(12)))
    for _ in range(min(limit, 2000) + 10):
        with pytest.raises(InputError, match="overlaps"):
            Checkpoint.open(tmp_path)
