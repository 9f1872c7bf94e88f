"""Folders of pickled weights on the command line: every command takes them as it takes safetensors."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lmx.core.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def pickled(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pickled") / "tiny"
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    source = Checkpoint.open(checkpoint)
    torch.save({name: source.tensor(name).clone() for name in source.infos}, folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize("options", [(), ("--4bit",)])
def test_it_generates_the_same(lmx: Any, checkpoint: Path, pickled: Path, options: tuple[str, ...]) -> None:
    command = ("generate", "--prompt-ids", "1,5,9", "-n", "8", "--json", *options)
    ours, reference = (json.loads(lmx(*command[:1], folder, *command[1:]).out) for folder in (pickled, checkpoint))
    assert ours["token_ids"] == reference["token_ids"]
    # The files align tensors differently, and with it torch's products round differently
    assert ours["logprobs"] == pytest.approx(reference["logprobs"], abs=1e-5)


def test_show_has_the_same_facts(lmx: Any, checkpoint: Path, pickled: Path) -> None:
    ours, reference = (json.loads(lmx("show", folder, "--json").out) for folder in (pickled, checkpoint))
    for facts in (ours, reference):
        del facts["model"], facts["size_on_disk"]
    assert ours == reference


def test_convert_makes_safetensors_of_it(lmx: Any, checkpoint: Path, pickled: Path, tmp_path: Path) -> None:
    predicted = lmx("convert", pickled, tmp_path / "ours", "--dry-run", "--json")
    assert (predicted.code, (tmp_path / "ours").exists()) == (0, False)
    assert "predicted" in predicted.err
    assert lmx("convert", pickled, tmp_path / "ours", "--json").out == predicted.out
    written = sum(path.stat().st_size for path in (tmp_path / "ours").glob("*.safetensors"))
    assert written == json.loads(predicted.out)["output_bytes"]
    assert lmx("convert", checkpoint, tmp_path / "theirs").code == 0
    for path in (tmp_path / "theirs").iterdir():
        assert path.read_bytes() == (tmp_path / "ours" / path.name).read_bytes(), path.name
    assert lmx("convert", pickled, tmp_path / "ours", "--dry-run").code == 7


def test_quantize_predicts_what_it_writes(lmx: Any, pickled: Path, tmp_path: Path) -> None:
    predicted = json.loads(lmx("quantize", pickled, tmp_path / "out", "--dry-run", "--json").out)
    written = json.loads(lmx("quantize", pickled, tmp_path / "out", "--json").out)
    assert predicted["output_bytes"] == written["output_bytes"]
    assert predicted["kept"] == written["kept"]


def test_a_hostile_one_is_refused_with_3(lmx: Any, pickled: Path, tmp_path: Path) -> None:
    shutil.copy(pickled / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes((pickled / "pytorch_model.bin").read_bytes()[:-40])
    ran = lmx("generate", tmp_path, "--prompt-ids", "1")
    assert (ran.code, ran.out) == (3, "")
    assert "pytorch_model.bin" in ran.err
