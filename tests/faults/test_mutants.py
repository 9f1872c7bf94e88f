"""Safetensors headers, indices and pickles with something changed: refused or read, soon, in bounded memory.

No code runs: what would run leaves a canary. Of GGUFs, `test_hostile_ggufs` makes as many.
"""

import io
import json
import pickletools
import random
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from families import write_family
from measured import Commands
from pickle_tables import refusals
from safetensors.torch import load_file, save_file

from lmx.api import check_runnable, open_folder
from lmx.convert.pickle_source import SINGLE_BIN
from lmx.convert.pickle_table import PICKLE
from lmx.core.checkpoint import INDEX, SINGLE
from lmx.core.errors import InputError
from lmx.core.loader import load_model
from lmx.quant.memory import peak_memory_bytes

HEADERS, INDICES, BYTES, PICKLES, COMMANDS = 300, 150, 150, 400, 10
SECONDS, MEMORY = 5.0, 1 << 30
BATCH = 100


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small OLMoE in two shards."""
    folder = write_family(tmp_path_factory.mktemp("good") / "model", "olmoe", num_hidden_layers=1)
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    names = sorted(tensors)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, group in shards.items():
        save_file({name: tensors[name] for name in group}, folder / file, {"format": "pt"})
    weight_map = {name: file for file, group in shards.items() for name in group}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return folder


def attempt(folder: Path) -> bool:
    """Whether a folder loads; anything but an InputError is the test's failure."""
    started, message = time.monotonic(), ""
    try:
        opened = open_folder(folder)
        check_runnable(opened)
        load_model(opened)
    except InputError as error:
        message = error.message
    assert message.isprintable()
    assert time.monotonic() - started < SECONDS
    return not message


Header = dict[str, dict[str, object]]


def header_mutants(data: bytes, count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """One thing in the header that no other good file would have, or the file cut off."""
    chance, length = random.Random(seed), int.from_bytes(data[:8], "little")
    for number in range(count):
        header: Header = json.loads(data[8 : 8 + length])
        if number % 5 == 0:
            end = chance.randrange(len(data))
            yield f"cut off at {end}", data[:end]
        elif number % 5 == 1:
            wrong = chance.choice([0, 1, length - 1, length + 1, length * 2, 2**31, 2**63, 2**64 - 1])
            yield f"length {wrong}", wrong.to_bytes(8, "little") + data[8:]
        else:
            what = change(header, chance)
            text = json.dumps(header).encode()
            yield what, len(text).to_bytes(8, "little") + text + data[8 + length :]


def change(header: Header, chance: random.Random) -> str:
    """Change one entry so that it cannot be; returns what was done."""
    name = chance.choice([name for name in header if name != "__metadata__"])
    entry = header[name]
    (begin, end), shape = entry["data_offsets"], entry["shape"]  # type: ignore[misc]
    numbers = [-1, 1 << 31, 1 << 62, 1 << 64, 1.5, "8", None, [], True]
    kinds: dict[str, Callable[[], object]] = {
        "dtype": lambda: entry.update(dtype=chance.choice(["F32", "F64", "U8", "X", "", None, 3, [], "bf16"])),
        "shape": lambda: entry.update(shape=[*shape, chance.choice([2, 0, *numbers])]),
        "no shape": lambda: entry.update(shape=chance.choice([*numbers, {}])),
        "begin": lambda: entry.update(data_offsets=[chance.choice([begin + 2, end, *numbers]), end]),
        "end": lambda: entry.update(data_offsets=[begin, chance.choice([end + 2, begin - 1, *numbers])]),
        "offsets": lambda: entry.update(data_offsets=chance.choice([[begin], [begin, end, end], {}, *numbers])),
        "gone": lambda: header.pop(name),
        "name": lambda: header.update({name + chance.choice(["x", "\x1b[2J", "\x00"]): header.pop(name)}),
        "another key": lambda: entry.update(extra=1),
        "no entry": lambda: header.update({name: chance.choice([*numbers, {}])}),  # type: ignore[dict-item]
    }
    kind = chance.choice(list(kinds))
    kinds[kind]()
    return f"{kind} of {name}: {header.get(name)}"


def test_no_mutated_header_gets_past_the_checks(good: Path, tmp_path: Path) -> None:
    folder, before = shutil.copytree(good, tmp_path / "model"), peak_memory_bytes()
    assert attempt(folder)
    for what, mutant in header_mutants((good / "model-1.safetensors").read_bytes(), HEADERS, 1):
        (folder / "model-1.safetensors").write_bytes(mutant)
        assert not attempt(folder), what
    assert peak_memory_bytes() - before < MEMORY


def test_mutated_bytes_load_or_are_refused(good: Path, tmp_path: Path) -> None:
    folder, chance = shutil.copytree(good, tmp_path / "model"), random.Random(2)
    data = (good / "model-2.safetensors").read_bytes()
    loaded = 0
    for _ in range(BYTES):
        mutant = bytearray(data)
        mutant[chance.randrange(4000 if chance.random() < 0.5 else len(data))] = chance.randrange(256)
        (folder / "model-2.safetensors").write_bytes(mutant)
        loaded += attempt(folder)
    assert 0 < loaded < BYTES


def index_mutants(text: str, count: int, seed: int) -> Iterator[tuple[str, str]]:
    """One entry of the map that does not fit the shards, or a map that is none."""
    chance = random.Random(seed)
    wrong = ["model-3.safetensors", "../model-1.safetensors", "", "\x1b[2J", "x" * 300, None, 1, [], "config.json"]
    for number in range(count):
        index = json.loads(text)
        name = chance.choice(sorted(index["weight_map"]))
        shard = index["weight_map"][name]
        if number % 3 == 0:
            end = chance.randrange(len(text) - 1)
            yield f"cut off at {end}", text[:end]
            continue
        if number % 3 == 1:
            other = "model-2.safetensors" if shard == "model-1.safetensors" else "model-1.safetensors"
            index["weight_map"][name] = chance.choice([other, *wrong])
        else:
            index["weight_map"][name + "x"] = shard
        yield f"{name} in {index['weight_map'][name]}", json.dumps(index)


def test_no_mutated_index_gets_past_the_checks(good: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(good, tmp_path / "model")
    for what, mutant in index_mutants((good / INDEX).read_text(), INDICES, 3):
        (folder / INDEX).write_text(mutant)
        assert not attempt(folder), what


@pytest.fixture(scope="module")
def pickled(good: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as torch saves it."""
    folder = tmp_path_factory.mktemp("pickled")
    shutil.copy(good / "config.json", folder)
    torch.save({k: v for file in sorted(good.glob("*.safetensors")) for k, v in load_file(file).items()}, folder / "x")
    (folder / "x").rename(folder / SINGLE_BIN)
    return folder


def pickle_mutants(archive: bytes, canary: Path, count: int, seed: int) -> Iterator[bytes]:
    """Its pickle with bytes changed, or with a call put in at some opcode: what the canary sits on."""
    chance = random.Random(seed)
    with zipfile.ZipFile(io.BytesIO(archive)) as file:
        (name,) = [name for name in file.namelist() if name.endswith(PICKLE)]
        data = file.read(name)
    places = [position for _, _, position in pickletools.genops(data) if position]
    for number in range(count):
        if number % 2:
            at = chance.choice(places)
            module, function = chance.choice([("os", "system"), ("posix", "system"), ("subprocess", "getoutput")])
            call = f"c{module}\n{function}\n(S'touch {canary}'\ntR0".encode()
            yield with_entry(archive, name, data[:at] + call + data[at:])
        else:
            mutant = bytearray(data)
            for _ in range(chance.randrange(1, 4)):
                mutant[chance.randrange(len(mutant))] = chance.randrange(256)
            yield with_entry(archive, name, bytes(mutant))


def with_entry(archive: bytes, name: str, content: bytes) -> bytes:
    """As torch wrote archives before it aligned storages and said so in entries of their own, which are left out."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as file, zipfile.ZipFile(made, "w") as out:
        for info in file.infolist():
            if "/." not in info.filename:
                out.writestr(info.filename, content if info.filename == name else file.read(info))
    return made.getvalue()


def test_mutated_pickles_are_read_or_refused_and_run_nothing(pickled: Path, tmp_path: Path) -> None:
    canary, archive = tmp_path / "canary", (pickled / SINGLE_BIN).read_bytes()
    (tmp_path / "good").write_bytes(archive)
    assert refusals([tmp_path / "good"]) == [None]
    paths = []
    for number, mutant in enumerate(pickle_mutants(archive, canary, PICKLES, 4)):
        paths.append(tmp_path / f"{number}.bin")
        paths[-1].write_bytes(mutant)
    refused = [one for start in range(0, PICKLES, BATCH) for one in refusals(paths[start : start + BATCH])]
    assert not canary.exists()
    assert all(refused[1::2])
    assert 0 < refused[::2].count(None) < PICKLES // 2


def test_the_canary_would_sing(pickled: Path, tmp_path: Path) -> None:
    """Unpickled without care, some of the mutants that call something do it."""
    canary, archive = tmp_path / "canary", (pickled / SINGLE_BIN).read_bytes()
    for number, mutant in enumerate(pickle_mutants(archive, canary, 8, 4)):
        if number % 2:
            with suppress(Exception):  # most fail after the call
                torch.load(io.BytesIO(mutant), weights_only=False)
    assert canary.exists()


def test_mutants_through_the_command_line(commands: Commands, good: Path, pickled: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    folders = []
    headers = header_mutants((good / "model-1.safetensors").read_bytes(), COMMANDS // 2, 5)
    for number, (_, data) in enumerate(headers):
        folders.append(shutil.copytree(good, tmp_path / f"header{number}"))
        (folders[-1] / "model-1.safetensors").write_bytes(data)
    for number, (_, text) in enumerate(index_mutants((good / INDEX).read_text(), COMMANDS // 2, 6)):
        folders.append(shutil.copytree(good, tmp_path / f"index{number}"))
        (folders[-1] / INDEX).write_text(text)
    for number, mutant in enumerate(pickle_mutants((pickled / SINGLE_BIN).read_bytes(), canary, COMMANDS // 2, 7)):
        folders.append(shutil.copytree(pickled, tmp_path / f"pickle{number}"))
        (folders[-1] / SINGLE_BIN).write_bytes(mutant)
    for number, folder in enumerate(folders):
        ran = commands("convert", folder, tmp_path / "out", "--dry-run")
        assert ran.code == 3 or (number >= COMMANDS and ran.code == 0), (folder.name, ran.err)
        assert "Traceback" not in ran.err
        assert ran.seconds < SECONDS
        assert ran.peak_bytes < MEMORY
    assert not canary.exists()
