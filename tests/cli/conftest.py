import contextlib
import io
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch
from text_folders import INST, byte_fallback_folder

CONTEXT = 2048


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


Lmx = Callable[..., Ran]


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def write_checkpoint(folder: Path, *, template: str | None = INST, **config: int) -> Path:
    """A Mixtral of random weights with a tokenizer and a template that takes no system role."""
    from transformers import MixtralConfig, MixtralForCausalLM

    byte_fallback_folder(folder, template)
    config_file = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config_file))
    sizes = {
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "max_position_embeddings": CONTEXT,
    }
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**(sizes | config), initializer_range=0.3))
    model.save_pretrained(folder, max_shard_size="60KB")
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny-mixtral")


@pytest.fixture(scope="session")
def lmx() -> Lmx:
    """Run `lmx ARGS` in this process, which has torch already, and return the code and both streams."""
    from lmx.cli.main import app
    from lmx.cli.run import run

    def call(*args: object, stdin: str = "", terminal: bool = False) -> Ran:
        out, err = Screen() if terminal else io.StringIO(), io.StringIO()
        given = io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding="utf-8")
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), mock.patch.object(sys, "stdin", given):
            code = run(app, [str(arg) for arg in args])
        return Ran(code, out.getvalue(), err.getvalue())

    return call
