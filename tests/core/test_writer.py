"""What we write, transformers reads with the same logits, and we read back bit for bit."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from families import FAMILIES, config_of
from safetensors import safe_open
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from lmx.core import loader, shards, writer
from lmx.core.checkpoint import Checkpoint
from lmx.core.errors import ConflictError, InputError, ResourceError
from lmx.core.heads import HeadKind
from lmx.core.loader import build, hub_shapes, load_model
from lmx.core.model import LanguageModel
from lmx.core.models import mixtral
from lmx.core.names import ExpertStack, NameTable, Rename
from lmx.core.registry import family_of
from lmx.core.writer import save_model

EXPERTS = 11


def small_model(head: HeadKind = "causal", *, tied: bool = False) -> tuple[LanguageModel, dict[str, object]]:
    config: dict[str, object] = MixtralConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=EXPERTS,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        architectures=["MixtralForCausalLM"],
    ).to_dict()
    torch.manual_seed(7)
    model = build(config, head)
    model.reset_parameters()
    return model.eval(), config


def same_weights(one: LanguageModel, other: LanguageModel) -> bool:
    weights = dict(other.named_parameters())
    return all(torch.equal(weights.pop(name), weight) for name, weight in one.named_parameters()) and not weights


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_reads_what_we_write(tmp_path: Path, tied: bool) -> None:
    model, config = small_model(tied=tied)
    save_model(model, tmp_path / "out", config=config)
    theirs, report = MixtralForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.randint(0, 61, (3, 17))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, theirs.eval()(ids).logits, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_reads_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype | None) -> None:
    model, config = small_model()
    save_model(model, tmp_path / "out", config=config, dtype=dtype)
    checkpoint = Checkpoint.open(tmp_path / "out")
    assert same_weights(model.to(dtype or torch.float32), load_model(checkpoint))
    assert checkpoint.config["dtype"] == str(dtype or torch.float32).removeprefix("torch.")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_reads_back(tmp_path: Path, family: str) -> None:
    config = config_of(family)
    torch.manual_seed(7)
    model = build(config)
    model.reset_parameters()
    save_model(model, tmp_path / "out", config=config)
    checkpoint = Checkpoint.open(tmp_path / "out")
    assert same_weights(model, load_model(checkpoint))
    assert {name: info.shape for name, info in checkpoint.infos.items()} == hub_shapes(model, family_of(config))


@pytest.mark.parametrize("head", ["none", "sequence", "token"])
def test_other_heads_read_back(tmp_path: Path, head: HeadKind) -> None:
    model, config = small_model(head)
    save_model(model, tmp_path / "out", config=config)
    assert same_weights(model, load_model(Checkpoint.open(tmp_path / "out"), head=head))


def test_every_tensor_is_aligned_and_an_experts_matrices_are_neighbours(tmp_path: Path) -> None:
    model, config = small_model()
    save_model(model, tmp_path / "out", config=config, dtype=torch.bfloat16)
    infos = Checkpoint.open(tmp_path / "out").infos
    assert [name for name, info in infos.items() if info.offset % 64] == []
    prefix = "model.layers.1.block_sparse_moe.experts."
    experts = [name.removeprefix(prefix) for name in infos if name.startswith(prefix)]
    assert experts == [f"{expert}.w{part}.weight" for expert in range(EXPERTS) for part in (1, 2, 3)]
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_shards_are_named_by_an_index_and_read_back(tmp_path: Path) -> None:
    model, config = small_model()
    save_model(model, tmp_path / "out", config=config, max_shard_bytes=40_000)
    names = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(names) > 2
    assert names[0] == f"model-00001-of-{len(names):05}.safetensors"
    assert same_weights(model, load_model(Checkpoint.open(tmp_path / "out")))
    theirs = MixtralForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(theirs.lm_head.weight, model.get_parameter("head.weight"))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("flat", [False, True])
def test_experts_of_one_tensor_are_gathered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flat: bool, transposed: bool
) -> None:
    """A family that stores a layer's experts in one tensor, as DBRX does: flat, its down projection transposed."""
    ours = "layers.{}.mlp.experts."
    count = EXPERTS if flat else None
    table = NameTable(
        *(rule for rule in mixtral.NAMES.rules if isinstance(rule, Rename) and ".experts." not in rule.hub),
        ExpertStack("model.layers.{}.ffn.v1", (ours + "gate.{}", ours + "up.{}"), count),
        ExpertStack("model.layers.{}.ffn.w2", (ours + "down.{}",), count, transposed),
    )

    @dataclass(frozen=True)
    class Fused:
        model_type = "mixtral"
        parse = staticmethod(mixtral.FAMILY.parse)
        decoder = staticmethod(mixtral.FAMILY.decoder)
        names = staticmethod(lambda config: table)

    for module in (writer, loader):
        monkeypatch.setattr(module, "family_of", lambda config: Fused())
    model, config = small_model()
    save_model(model, tmp_path / "out", config=config)

    def expert(part: str, number: int) -> Tensor:
        return model.get_parameter(f"decoder.layers.1.mlp.experts.{part}.{number}")

    gate_up = torch.stack([torch.cat([expert("gate", e), expert("up", e)]) for e in range(EXPERTS)])
    down = torch.stack([expert("down", e).t() if transposed else expert("down", e) for e in range(EXPERTS)])
    checkpoint = Checkpoint.open(tmp_path / "out")
    for name, expected in (("v1", gate_up), ("w2", down)):
        stored = checkpoint.tensor(f"model.layers.1.ffn.{name}")
        assert torch.equal(stored, expected.flatten(0, 1) if flat else expected)
    assert same_weights(model, load_model(checkpoint))


def test_extra_files_are_written_as_given(tmp_path: Path) -> None:
    model, config = small_model()
    save_model(model, tmp_path / "deep" / "out", config=config, extra_files={"chat_template.jinja": b"{{ x }}\n"})
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    assert (tmp_path / "deep" / "out" / "chat_template.jinja").read_bytes() == b"{{ x }}\n"
    written = json.loads((tmp_path / "deep" / "out" / "config.json").read_text())
    assert written == json.loads(json.dumps(config | {"dtype": "float32"}))


@pytest.mark.parametrize(
    "name", ["../x", "a/b", "", "config.json", "model.safetensors", "model.safetensors.index.json"]
)
def test_extra_names_that_do_not_belong_are_refused(tmp_path: Path, name: str) -> None:
    model, config = small_model()
    with pytest.raises(InputError):
        save_model(model, tmp_path / "out", config=config, extra_files={name: b""})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_exists_is_not_touched(tmp_path: Path) -> None:
    model, config = small_model()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(ConflictError):
        save_model(model, tmp_path / "out", config=config)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["out", "out/mine"]


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    model, config = small_model()
    monkeypatch.setattr(shards.ShardWriter, "_finish", full)
    with pytest.raises(ResourceError, match="no space left"):
        save_model(model, tmp_path / "out", config=config)
    assert list(tmp_path.iterdir()) == []


def test_a_config_of_another_family_is_refused(tmp_path: Path) -> None:
    model, config = small_model()
    with pytest.raises(InputError, match="llama"):
        save_model(model, tmp_path / "out", config={**config, "model_type": "llama"})
