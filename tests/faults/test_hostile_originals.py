"""Broken or hostile files of the makers' own layouts: read, or refused by name; soon, and in bounded memory."""

import base64
import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from families import write_family
from original_layouts import write_griffin, write_mamba, write_mistral, write_olmo
from sentencepiece_files import trained

from lmx.api import open_folder
from lmx.convert.pickle_source import PickleCheckpoint
from lmx.core.errors import InputError, NotFoundError
from lmx.core.loader import load_model
from lmx.quant.memory import peak_memory_bytes

MUTANTS, SECONDS, BYTES = 300, 5.0, 1 << 30
TIKTOKEN = b"".join(b"%s %d\n" % (base64.b64encode(bytes([n])), n) for n in range(256)) + b"YWI= 256\n"
WORDS = [b"9" * 30, b"-1", b"0", b"null", b"[]", b"{}", b'"x"', b"1e999", b"2147483647", b"true", b"\xff", b"&a", b"*a"]


def mutants(data: bytes, count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Bytes changed, cut off, said twice, or a value put in place of another."""
    chance = random.Random(seed)
    for number in range(count):
        at, kind = chance.randrange(len(data)), number % 5
        if kind == 0:
            yield f"cut off at {at}", data[:at]
        elif kind == 1:
            length = chance.randrange(1, 64)
            yield f"{length} bytes at {at} twice", data[: at + length] + data[at:]
        elif kind == 2:
            places = [chance.randrange(len(data)) for _ in range(4)]
            mutant = bytearray(data)
            for place in places:
                mutant[place] = chance.randrange(256)
            yield f"bytes {places}", bytes(mutant)
        else:
            word = chance.choice(WORDS)
            end = at + chance.randrange(1, 8)
            yield f"{word!r} at {at}", data[:at] + word + data[end:]


def attempt(folder) -> bool:
    """Whether a folder loads; anything but an InputError is the test's failure."""
    started, message = time.monotonic(), ""
    try:
        opened = open_folder(folder)
        load_model(opened)
    except InputError as error:
        message = error.message
    assert message.isprintable()
    assert time.monotonic() - started < SECONDS
    return not message


def attempt_all(folder, name, seed) -> list[bool]:
    good = (folder / name).read_bytes()
    assert attempt(folder)
    before, results = peak_memory_bytes(), []
    for what, mutant in mutants(good, MUTANTS, seed):
        (folder / name).write_bytes(mutant)
        try:
            results.append(attempt(folder))
        except Exception as error:
            raise AssertionError(what) from error
    assert peak_memory_bytes() - before < BYTES
    (folder / name).write_bytes(good)
    return results


@pytest.fixture
def mistral(tmp_path):
    source = write_family(tmp_path / "source", "mixtral", vocab_size=512)
    folder = write_mistral(source, tmp_path / "theirs", "safetensors")
    (folder / "tokenizer.model").write_bytes(trained())
    return folder


@pytest.mark.parametrize("name", ["params.json", "tokenizer.model"])
def test_mutants_of_mistrals_files(mistral, name):
    results = attempt_all(mistral, name, 1)
    assert results.count(False) > MUTANTS // 3


def test_mutants_of_a_vocabulary_of_tiktoken(tmp_path):
    folder = write_family(tmp_path / "source", "dbrx", vocab_size=512)
    (folder / "x.tiktoken").write_bytes(TIKTOKEN)
    assert attempt_all(folder, "x.tiktoken", 2).count(False) > MUTANTS // 3


def test_mutants_of_mambas_config(tmp_path):
    folder = write_mamba(write_family(tmp_path / "source", "falcon_mamba"), tmp_path / "theirs")
    opened = PickleCheckpoint.of_files(folder, [folder / "pytorch_model.bin"])
    with pytest.MonkeyPatch.context() as patch:  # its pickle is read once
        patch.setattr(PickleCheckpoint, "of_files", lambda *_: opened)
        assert attempt_all(folder, "config.json", 3).count(False) > MUTANTS // 3


def test_mutants_of_olmos_config(tmp_path):
    folder = write_olmo(write_family(tmp_path / "source", "olmoe"), tmp_path / "theirs")
    opened = PickleCheckpoint.of_files(folder, [folder / "model.pt"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PickleCheckpoint, "of_files", lambda *_: opened)
        # most of the file says what no model is made of
        assert attempt_all(folder, "config.yaml", 4).count(False) > MUTANTS // 6


def test_mutants_through_the_command_line(commands, mistral, tmp_path):
    for name, seed in (("params.json", 5), ("tokenizer.model", 6)):
        good = (mistral / name).read_bytes()
        for number, (what, mutant) in enumerate(mutants(good, 3, seed)):
            (mistral / name).write_bytes(mutant)
            ran = commands("convert", mistral, tmp_path / f"{name}-{number}", "--quiet")
            assert ran.code in (0, 3), (what, ran.err)
            assert "Traceback" not in ran.err
            assert (tmp_path / f"{name}-{number}").exists() == (ran.code == 0)
        (mistral / name).write_bytes(good)


HOSTILE = {
    "2**31 layers": {"n_layers": 2**31 - 1},
    "4096 layers": {"n_layers": 4096},
    "4096 experts": {"moe": {"num_experts": 4096, "num_experts_per_tok": 2}},
    "more chosen than there are": {"moe": {"num_experts": 4, "num_experts_per_tok": 5}},
    "no heads": {"n_heads": 0},
    "heads that do not fit": {"n_heads": 48},
    "2**31 heads": {"n_heads": 2**31 - 1},
    "a vocabulary of 2**31": {"vocab_size": 2**31 - 1},
    "a negative base": {"rope_theta": -1.0},
    "a width that is a text": {"dim": "64"},
    "a terminal's codes": {"model_type": "\x1b]0;x\x07"},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_params_that_cannot_be(mistral, name):
    path = mistral / "params.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | HOSTILE[name]))
    before = peak_memory_bytes()
    assert not attempt(mistral)
    assert peak_memory_bytes() - before < BYTES


@pytest.mark.parametrize("make", ["link", "folder", "pipe"])
def test_a_vocabulary_that_is_no_file(mistral, make, tmp_path):
    path = mistral / "tokenizer.model"
    path.unlink()
    if make == "link":
        path.symlink_to(tmp_path / "nowhere")
        with pytest.raises(NotFoundError, match="does not exist"):
            open_folder(mistral)
    elif make == "folder":
        path.mkdir()
        assert not attempt(mistral)
    else:
        os.mkfifo(path)
        assert not attempt(mistral)


def test_a_pickle_that_runs_code_does_not(tmp_path):
    canary = tmp_path / "canary"

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (canary,))

    folder = write_griffin(write_family(tmp_path / "source", "recurrent_gemma"), tmp_path / "theirs")
    torch.save({"embedder.input_embedding": Bomb()}, folder / "2b.pt")
    assert not attempt(folder)
    assert not canary.exists()
