"""GGUFs that lmx writes run in llama.cpp with the same tokens, and what llama.cpp quantizes loads back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from yardstick import ask_llama_cpp, needs_llama_cpp
from support import SHARED, needs_shared

from lmx.convert.gguf_source import GGUFCheckpoint
from lmx.convert.gguf_target import Options, write_gguf
from lmx.core.checkpoint import Checkpoint
from lmx.core.text.engine import TextEngine

pytestmark = [needs_llama_cpp]

FAMILIES = ["mixtral", "olmoe", "dbrx", "falcon_mamba"]
TOKENS = 20


def folder_of(family: str) -> Path:
    return SHARED / "checkpoints" / family


def expected(family: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder_of(family) / "expected.json").read_text())
    return found


@needs_shared
@pytest.mark.parametrize("kind", ["F16", "BF16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens(family: str, kind: str, tmp_path: Path) -> None:
    target = tmp_path / "model.gguf"
    list(write_gguf(Checkpoint.open(folder_of(family)), target, Options(kind, folder_of(family))))
    turns = expected(family)["conversations"]
    prompts = [turn["prompt_ids"] for turn in turns]
    answers = ask_llama_cpp("greedy", model=str(target), prompts=prompts, count=TOKENS)
    for turn, theirs in zip(turns, answers, strict=True):
        wanted = turn["greedy_ids"][:TOKENS]
        assert theirs[: len(wanted)] == wanted


@needs_shared
@pytest.mark.parametrize("family", FAMILIES)
def test_vocabulary(family: str, tmp_path: Path) -> None:
    """llama.cpp cuts raw text as the tokenizer.json does, and so does the tokenizer.json that lmx makes of the GGUF."""
    target = tmp_path / "model.gguf"
    list(write_gguf(Checkpoint.open(folder_of(family)), target, Options("F16", folder_of(family))))
    texts = ["Hello, my name is Ada.", "don't  stop", "x\n\n  y 12345", "na\u00efve \U0001f999 caf\u00e9"]
    with TextEngine.open(folder_of(family)) as ours:
        wanted = [ours.encode(text) for text in texts]
    opened = GGUFCheckpoint.open(target)
    with TextEngine.open(opened.folder, keep=opened) as again:
        assert [again.encode(text) for text in texts] == wanted
    assert ask_llama_cpp("encode", model=str(target), texts=texts) == wanted
