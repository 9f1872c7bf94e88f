"""GGUFs that somebody broke, by accident or on purpose: an error that names the file, soon, in bounded memory."""

import json
import random
import struct
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from families import write_family
from toys import toy_tokenizer

from lmx.convert.gguf_header import MAX_ITEMS, read_header, write_header
from lmx.convert.gguf_source import GGUFCheckpoint
from lmx.convert.gguf_target import Options, write_gguf
from lmx.core.checkpoint import Checkpoint
from lmx.core.errors import InputError, NotFoundError
from lmx.core.loader import load_model
from lmx.quant.memory import peak_memory_bytes

HEADER_MUTANTS, BYTE_MUTANTS, COMMAND_MUTANTS = 650, 350, 20
SECONDS, BYTES = 5.0, 1 << 30
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> bytes:
    """A small OLMoE with a vocabulary, its keys first, its matrices Q8_0."""
    folder = write_family(tmp_path_factory.mktemp("good"), "olmoe", vocab_size=400)
    (folder / "tokenizer.json").write_text(toy_tokenizer().to_str())
    list(write_gguf(Checkpoint.open(folder), folder / "x.gguf", Options("Q8_0", folder)))
    return (folder / "x.gguf").read_bytes()


class Walker:
    """Where the fields of a header are that say how to read the rest of it: (offset, struct code, what)."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0
        self.fields: list[tuple[int, str, str]] = []

    def take(self, code: str, what: str) -> int:
        self.fields.append((self.at, code, what))
        (value,) = struct.unpack_from(f"<{code}", self.data, self.at)
        self.at += struct.calcsize(f"<{code}")
        return value

    def text(self, what: str) -> None:
        length = self.take("Q", f"length of {what}")
        self.at += length

    def walk(self) -> list[tuple[int, str, str]]:
        self.take("I", "magic")
        self.take("I", "version")
        tensors, pairs = self.take("Q", "tensors"), self.take("Q", "pairs")
        for _ in range(pairs):
            self.text("key")
            self.value(self.take("I", "type"))
        for _ in range(tensors):
            self.text("name")
            for _ in range(self.take("I", "rank")):
                self.take("Q", "dimension")
            self.take("I", "tensor type")
            self.take("Q", "offset")
        return self.fields

    def value(self, kind: int) -> None:
        if kind == 8:
            self.text("text")
        elif kind == 9:
            item, length = self.take("I", "type"), self.take("Q", "length of list")
            for _ in range(length if item == 8 else 0):
                self.at += 8 + struct.unpack_from("<Q", self.data, self.at)[0]
            self.at += 0 if item == 8 else length * _SIZES[item]
        else:
            self.at += _SIZES[kind]


@cache
def fields_of(data: bytes) -> list[tuple[int, str, str]]:
    return Walker(data).walk()


def header_mutants(data: bytes, count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """One field of the structure changed, or the file cut off in its header or its tensors."""
    chance, fields = random.Random(seed), fields_of(data)
    for number in range(count):
        if number % 8 == 7:
            end = chance.randrange(len(data) - 64)
            yield f"cut off at {end}", data[:end]
            continue
        kind = chance.choice(sorted({what for _, _, what in fields}))
        at, code, what = chance.choice([field for field in fields if field[2] == kind])
        (value,) = struct.unpack_from(f"<{code}", data, at)
        most = (1 << 8 * struct.calcsize(code)) - 1
        wrong = [most, most >> 1, most - 31, value + 1, value - 1, value * 2 + 3, value ^ 1 << 16, 1 << 30, 99]
        if "type" in what:  # another type of the same size would be another good file
            wrong = [most, 13, 99, 1 << 30, 15, 31, 4000]
        good = (value, 2) if what == "version" else (value,)  # the layout of version 2 is that of 3
        new = chance.choice([w for w in wrong if 0 <= w <= most and w not in good])
        yield (
            f"{what} at {at}: {value} -> {new}",
            data[:at] + struct.pack(f"<{code}", new) + data[at + struct.calcsize(code) :],
        )


def byte_mutants(data: bytes, count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """A few bytes changed, mostly in the header."""
    chance, start = random.Random(seed), data.index(b"blk.0")
    for _ in range(count):
        mutant = bytearray(data)
        places = [chance.randrange(start + 3000 if chance.random() < 0.8 else len(data)) for _ in range(3)]
        for place in places:
            mutant[place] = chance.randrange(256)
        yield f"bytes {places}", bytes(mutant)


def attempt(path: Path, data: bytes) -> bool:
    """Whether a file loads; anything but an InputError is the test's failure."""
    path.write_bytes(data)
    started = time.monotonic()
    message = ""
    try:
        load_model(GGUFCheckpoint.open(path), dtype=torch.bfloat16)
    except InputError as error:
        message = error.message
    assert message.isprintable()
    assert time.monotonic() - started < SECONDS
    return not message


def test_the_good_one_loads(good, tmp_path):
    assert attempt(tmp_path / "x.gguf", good)


def test_no_mutated_header_gets_past_the_checks(good, tmp_path):
    before = peak_memory_bytes()
    for what, mutant in header_mutants(good, HEADER_MUTANTS, 1):
        assert not attempt(tmp_path / "x.gguf", mutant), what
    assert peak_memory_bytes() - before < BYTES


def test_mutated_bytes_load_or_are_refused(good, tmp_path):
    before = peak_memory_bytes()
    loaded = [attempt(tmp_path / "x.gguf", mutant) for _, mutant in byte_mutants(good, BYTE_MUTANTS, 2)]
    assert 0 < sum(loaded) < BYTE_MUTANTS
    assert peak_memory_bytes() - before < BYTES


def test_mutants_through_the_command_line(commands, good, tmp_path):
    for number, (what, mutant) in enumerate(header_mutants(good, COMMAND_MUTANTS, 3)):
        path = tmp_path / f"{number}.gguf"
        path.write_bytes(mutant)
        ran = commands(*(("show", path) if number % 2 else ("generate", path, "Hello", "-n", "1")))
        assert ran.code == 3, (what, ran.err)
        assert ran.err.startswith("lmx: error: ")
        assert "Traceback" not in ran.err
        assert ran.seconds < SECONDS
        assert ran.peak_bytes < BYTES


def header(pairs: bytes, count: int, tensors: bytes = b"", tensor_count: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensor_count, count) + pairs + tensors


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def pair(key: bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


ARCH = pair(b"general.architecture", 8, text(b"olmoe"))
MANY = struct.pack("<IQ", 0, MAX_ITEMS // 2 + 1) + bytes(MAX_ITEMS // 2 + 1)
HOSTILE = {
    "empty": (b"", "empty"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
    "another file": (b"PK\x03\x04" + bytes(100), "no GGUF"),
    "version 1": (b"GGUF" + struct.pack("<III", 1, 0, 0), "version is 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version"),
    "2**63 tensors": (b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0), "claims"),
    "2**63 keys": (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63), "claims"),
    "no architecture": (header(b"", 0), "architecture"),
    "another architecture": (header(pair(b"general.architecture", 8, text(b"qwen2")), 1), "not supported"),
    "an architecture that is a number": (header(pair(b"general.architecture", 4, bytes(4)), 1), "not supported"),
    "a terminal's codes": (header(pair(b"general.architecture", 8, text(b"\x1b]0;x\x07")), 1), "not supported"),
    "a key twice": (header(ARCH * 2, 2), "twice"),
    "a text of 2**63 bytes": (header(pair(b"a", 8, struct.pack("<Q", 2**63)), 1), "claims"),
    "a key of a megabyte": (header(pair(b"a" * 2**20, 4, bytes(4)), 1), "claims"),
    "a text that is no UTF-8": (header(pair(b"a", 8, text(b"\xff\xfe")), 1), "UTF-8"),
    "a list of 2**63": (header(pair(b"a", 9, struct.pack("<IQ", 4, 2**63)), 1), "claims"),
    "a list of lists": (header(pair(b"a", 9, struct.pack("<IQ", 9, 1) * 1000), 1), "unknown type 9"),
    "two lists of too many": (header(pair(b"a", 9, MANY) + pair(b"b", 9, MANY), 2), "claims"),
    "a boolean of 2": (header(pair(b"a", 7, b"\x02"), 1), "neither"),
    "an alignment of 3": (header(ARCH + pair(b"general.alignment", 4, struct.pack("<I", 3)), 2), "power of two"),
    "an alignment of 0": (header(ARCH + pair(b"general.alignment", 4, bytes(4)), 2), "power of two"),
    "an alignment that is a text": (header(ARCH + pair(b"general.alignment", 8, text(b"32")), 2), "power of two"),
    "a tensor of 2**80": (
        header(ARCH, 1, text(b"a") + struct.pack("<I2QIQ", 2, 2**40, 2**40, 0, 0), 1), "shape"
    ),
    "a tensor of nothing": (header(ARCH, 1, text(b"a") + struct.pack("<IQIQ", 1, 0, 0, 0), 1), "shape"),
    "a tensor without dimensions": (header(ARCH, 1, text(b"a") + struct.pack("<IIQ", 0, 0, 0), 1), "shape"),
    "an unknown type": (header(ARCH, 1, text(b"a") + struct.pack("<IQIQ", 1, 32, 77, 0), 1), "unknown type 77"),
    "a type that is not read": (header(ARCH, 1, text(b"a") + struct.pack("<IQIQ", 1, 256, 10, 0), 1), "Q2_K"),
    "half a block": (header(ARCH, 1, text(b"a") + struct.pack("<IQIQ", 1, 33, 2, 0), 1), "whole blocks"),
    "an unknown tensor": (header(ARCH, 1, text(b"rope_freqs.weight") + struct.pack("<IQIQ", 1, 8, 0, 0), 1), "unknown"),
    "only a vocabulary": (header(ARCH, 1), "no weights"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers(tmp_path, name):
    data, words = HOSTILE[name]
    (tmp_path / "x.gguf").write_bytes(data + (bytes(64) if name == "an unknown tensor" else b""))
    before = peak_memory_bytes()
    with pytest.raises(InputError, match=words) as caught:
        GGUFCheckpoint.open(tmp_path / "x.gguf")
    assert "x.gguf" in caught.value.message or name == "an unknown tensor"
    assert caught.value.message.isprintable()
    assert peak_memory_bytes() - before < BYTES


CHANGES = {
    "a layer too many": ("olmoe.block_count", 3),
    "4096 layers": ("olmoe.block_count", 4096),
    "no layers": ("olmoe.block_count", 0),
    "experts that are not there": ("olmoe.expert_count", 4096),
    "more experts chosen than there are": ("olmoe.expert_used_count", 5),
    "heads that do not fit": ("olmoe.attention.head_count", 7),
    "heads of several sizes": ("olmoe.attention.head_count_kv", [4, 2]),
    "negative heads": ("olmoe.attention.head_count_kv", -4),
    "half a head turned": ("olmoe.rope.dimension_count", 8),
    "stretched positions": ("olmoe.rope.scaling.type", "yarn"),
    "a base that is not a number": ("olmoe.rope.freq_base", float("nan")),
    "an endless epsilon": ("olmoe.attention.layer_norm_rms_epsilon", float("inf")),
    "a width that is a text": ("olmoe.embedding_length", "64"),
    "a stop token beyond the vocabulary": ("tokenizer.ggml.eos_token_id", 4000),
}


@pytest.mark.parametrize("name", CHANGES)
def test_keys_that_cannot_be(good, tmp_path, name):
    key, value = CHANGES[name]
    assert not attempt(tmp_path / "x.gguf", with_key(tmp_path, good, key, value))


def with_key(folder: Path, data: bytes, key: str, value: object) -> bytes:
    path = folder / "good.gguf"
    path.write_bytes(data)
    with path.open("rb") as file:
        found = read_header(file.fileno(), path)
    return write_header({**found.metadata, key: value}, found.tensors, found.alignment) + data[found.data_start :]


def test_a_decay_that_grows(tmp_path):
    folder = write_family(tmp_path / "m", "falcon_mamba")
    list(write_gguf(Checkpoint.open(folder), tmp_path / "x.gguf", Options("F32", folder)))
    opened = GGUFCheckpoint.open(tmp_path / "x.gguf")
    info, data = opened.infos["backbone.layers.0.mixer.A_log"], bytearray((tmp_path / "x.gguf").read_bytes())
    data[info.offset : info.offset + 4] = struct.pack("<f", 1.0)
    assert not attempt(tmp_path / "x.gguf", bytes(data))


def test_a_pipe_or_nothing(tmp_path):
    import os

    os.mkfifo(tmp_path / "x.gguf")
    with pytest.raises(InputError, match="regular"):
        GGUFCheckpoint.open(tmp_path / "x.gguf")
    with pytest.raises(NotFoundError):
        GGUFCheckpoint.open(tmp_path / "y.gguf")


def test_small_files_are_json(good, tmp_path):
    (tmp_path / "x.gguf").write_bytes(good)
    opened = GGUFCheckpoint.open(tmp_path / "x.gguf")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert isinstance(json.loads((opened.folder / name).read_text()), dict)
