"""GGUFs that lmx writes run in llama.cpp with the same tokens, and what llama.cpp quantizes loads back."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from families import write_family
from support import SHARED, needs_shared
from tokenizers import Tokenizer
from torch import Tensor
from yardstick import ask_llama_cpp, needs_llama_cpp

from lmx.convert.gguf_names import Change
from lmx.convert.gguf_source import GGUFCheckpoint
from lmx.convert.gguf_target import Options, write_gguf
from lmx.convert.gguf_tensors import apply
from lmx.core.checkpoint import Checkpoint
from lmx.core.loader import load_model
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


PUBLISHED = {
    "mixtral": ("mixtral/tokenizer.json", 32000),
    "olmoe": ("olmoe/tokenizer.json", 50304),
    "olmoe-pii": ("olmoe/tokenizer-pii-special.json", 50304),
    "dbrx": ("dbrx/tokenizer.json", 100352),
    "falcon_mamba": ("falcon_mamba/tokenizer.json", 65024),
}


@needs_shared
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_vocabularies(name: str, tmp_path: Path) -> None:
    """The texts of all vectors: the published tokenizer.json, llama.cpp with our GGUF, and what lmx makes of that."""
    path, rows = PUBLISHED[name]
    source = write_family(tmp_path / "source", name.removesuffix("-pii"), vocab_size=rows)
    shutil.copy(SHARED / "data" / path, source / "tokenizer.json")
    list(write_gguf(Checkpoint.open(source), tmp_path / "x.gguf", Options("F16", source)))
    texts = vector_texts()
    published = Tokenizer.from_file(str(source / "tokenizer.json"))
    wanted = [published.encode(text).ids for text in texts]
    assert ask_llama_cpp("encode", model=str(tmp_path / "x.gguf"), texts=texts) == wanted
    opened = GGUFCheckpoint.open(tmp_path / "x.gguf")
    again = Tokenizer.from_file(str(opened.folder / "tokenizer.json"))
    assert [again.encode(text).ids for text in texts] == wanted
    # OLMoE's tokenizer.json composes what is decomposed; llama.cpp takes it as it is
    assert again.encode("e\u0301").ids == published.encode("e\u0301").ids


MORE_TEXTS = [
    "\u00e9 <|endoftext|>\n\n   x",
    "1234567890 12,345.67 \u00bd \u0663\u0664\u0665",
    "x\u00a0y\u3000z\u200bw\ufeff",
    "def f(x):\n\treturn {'a': x[0:2]}  # it's HE'LL we\u2019re\r\n\r\n",
    "\u4eca\u65e5\u306f\u3001\u4e16\u754c\u3002",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 \u0627\u0644\u0639\u0631\u0628\u064a\u0629",
    "a" * 300 + " " * 40 + "." * 70,
]


def vector_texts() -> list[str]:
    found = (SHARED / "data/vectors/ggml-vocab-falcon.gguf.inp").read_text().split("\n__ggml_vocab_test__\n")
    assert len(found) >= 40
    return found + MORE_TEXTS


TYPES = {
    "F32": 0,
    "F16": 1,
    "BF16": 32,
    "Q8_0": 7,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q4_K": 14,
    "Q5_K": 16,
    "Q6_K": 18,
    "IQ4_NL": 25,
}
WIDE = {
    "mixtral": {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1},
    "olmoe": {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1},
    "dbrx": {
        "d_model": 256,
        "n_layers": 1,
        "ffn_config": {"ffn_hidden_size": 256, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "falcon_mamba": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_llama_cpp_quantizes_loads_back(family: str, tmp_path: Path) -> None:
    """Every type, on rows wide enough for the K-quants, against the `gguf` package's reader and arithmetic."""
    gguf = pytest.importorskip("gguf")
    source = write_family(tmp_path / "source", family, torch.float32, **WIDE[family])
    list(write_gguf(Checkpoint.open(source), tmp_path / "x.gguf", Options("F32", source)))
    pattern = str(tmp_path / "{}.gguf")
    ask_llama_cpp("quantize", model=str(tmp_path / "x.gguf"), output=pattern, types=TYPES)
    plain = GGUFCheckpoint.open(tmp_path / "x.gguf")
    for kind in TYPES:
        opened = GGUFCheckpoint.open(Path(pattern.format(kind)))
        assert opened.infos.keys() == plain.infos.keys()
        assert kind in opened.layouts
        seen = set()
        for entry in gguf.GGUFReader(pattern.format(kind)).tensors:
            theirs = torch.from_numpy(gguf.quants.dequantize(entry.data, entry.tensor_type).copy())
            seen.add(entry.tensor_type.name)
            for name, ours in as_stored(opened, entry.name, theirs.shape[0]):
                assert torch.equal(ours, theirs if name is None else theirs[name]), (kind, entry.name)
        assert kind in seen
        model = load_model(opened, dtype=torch.float32)
        assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def as_stored(opened: GGUFCheckpoint, name: str, experts: int) -> list[tuple[int | None, Tensor]]:
    """The numbers that lmx reads of a tensor of the file, in the file's own order; of experts, each."""
    match = opened.architecture.table.match(name)
    if match.change is Change.EXPERTS:
        return [(expert, opened.tensor(match.hub(expert))) for expert in range(experts)]
    hub = opened.tensor(match.hub())
    heads = {Change.QUERY_PAIRS: 4, Change.KEY_PAIRS: 2}.get(match.change, 1)
    stored = apply(hub, match.change, heads)
    if match.change is Change.DECAY:  # through a logarithm: not the last bit
        return []
    return [(None, stored)]
