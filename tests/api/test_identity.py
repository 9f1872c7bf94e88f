"""What ties a saved conversation to its model: anything that changes an answer changes it, and no name does."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_checkpoint import write_checkpoint

from lmx.core.checkpoint import Checkpoint
from lmx.core.session_record import Identity
from lmx.identity import identity_of, scheme_of


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "a")


def identity(folder: Path) -> Identity:
    return identity_of(folder.name, Checkpoint.open(folder), "bf16")


def test_a_copy_elsewhere_is_the_same_model(model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "b")
    assert identity(copy) == replace(identity(model), model="b")
    assert identity(model).differences(identity(copy)) == []


def test_weights_config_tokenizer_and_template_count(model: Path, tmp_path: Path) -> None:
    same = identity(model)

    def changed(name: str, change: object) -> list[str]:
        folder = shutil.copytree(model, tmp_path / str(len(list(tmp_path.iterdir()))) / "a")
        file = next(folder.glob(name))
        file.write_bytes(change(file.read_bytes()))  # type: ignore[operator]
        return same.differences(identity(folder))

    weights = changed("*-00002-*.safetensors", lambda data: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    assert weights == ["another revision of its weights"]
    config = changed("config.json", lambda data: json.dumps(json.loads(data) | {"rms_norm_eps": 1e-4}).encode())
    assert config == ["another revision of its weights"]
    for name in ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json"):
        assert changed(name, lambda data: data + b"\n") == ["another chat template or tokenizer"]


def test_the_scheme_says_how_weights_are_held(model: Path) -> None:
    checkpoint = Checkpoint.open(model)
    assert scheme_of(checkpoint, torch.bfloat16) == "bf16"
    assert scheme_of(checkpoint, torch.float32, "nf4", "int8") == "nf4/fp32/head-int8"
