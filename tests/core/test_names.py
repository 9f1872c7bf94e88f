"""Names and shapes of the published checkpoints, and what happens to a file that does not fit."""

import json
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from parity.families import FAMILIES, FamilyRow, build_reference
from safetensors.torch import load_file, save_file
from support import SHARED, needs_shared
from torch import Tensor

from lmx.core.checkpoint import Checkpoint
from lmx.core.errors import InputError
from lmx.core.loader import bind, build, hub_shapes, load_model
from lmx.core.model import LanguageModel
from lmx.core.names import ExpertStack, NameTable, Rename
from lmx.core.registry import family_of

# config of ../shared/data -> its entry in TENSORS.json
PUBLISHED = {
    "mixtral/config-8x7b.json": "Mixtral-8x7B",
    "mixtral/config-8x22b.json": "Mixtral-8x22B-v0.1",
    "olmoe/config-0125-instruct.json": "OLMoE-1B-7B",
    "dbrx/config.json": "dbrx",
    "falcon_mamba/config.json": "falcon-mamba-7b",
    "falcon_mamba/config-instruct.json": "falcon-mamba-7b",
    "recurrent_gemma/config-2b.json": "recurrentgemma-2b",
    "recurrent_gemma/config-9b.DERIVED.json": "recurrentgemma-9b",
}


def patterns(shapes: Mapping[str, tuple[int, ...]]) -> dict[tuple[str, tuple[int, ...]], int]:
    """How often each name, its numbers left out, occurs with each shape."""
    counts: dict[tuple[str, tuple[int, ...]], int] = {}
    for name, shape in shapes.items():
        key = ".".join("#" if part.isdecimal() else part for part in name.split(".")), shape
        counts[key] = counts.get(key, 0) + 1
    return counts


@needs_shared
@pytest.mark.parametrize("file", PUBLISHED)
def test_published_tensors(file: str) -> None:
    config = json.loads((SHARED / "data" / file).read_text())
    published = json.loads((SHARED / "data" / "TENSORS.json").read_text())[PUBLISHED[file]]
    with torch.device("meta"):
        model = build(config)
    shapes = hub_shapes(model, family_of(config))
    expected = {
        (t["name"].replace("{i}", "#").replace("{e}", "#"), tuple(t["shape"])): t["count"] for t in published["tensors"]
    }
    assert patterns(shapes) == expected
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == published["parameters"]
    assert sum(weight.numel() for weight in model.parameters()) == published["parameters"]


@needs_shared
def test_published_variants() -> None:
    sweep = json.loads((SHARED / "data" / "olmoe" / "config_sweep.json").read_text())["configs"]
    noted = {"model_id", "url", "fetched_utc"}
    for config in sweep:
        with torch.device("meta"):
            model = build({k: v for k, v in config.items() if k not in noted} | {"model_type": "olmoe"})
        assert model.config.rms_norm_eps == 1e-5
    nested_noise = json.loads((SHARED / "data" / "dbrx" / "config-mlx-dbrx-instruct-4bit.json").read_text())
    del nested_noise["quantization"]
    with torch.device("meta"):
        dbrx = build(nested_noise)
    assert dbrx.config.rope.theta == 500_000
    assert not dbrx.config.tie_word_embeddings


@pytest.fixture(scope="module", params=FAMILIES, ids=str)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    row: FamilyRow = request.param
    path = tmp_path_factory.mktemp(row.model_type)
    build_reference(row, row.random_config(Random(str(row)), 0)).save_pretrained(path)
    return path


def test_names_are_those_of_transformers(folder: Path) -> None:
    stored = {name: tuple(tensor.shape) for name, tensor in load_file(folder / "model.safetensors").items()}
    model = load_model(Checkpoint.open(folder))
    family = family_of({"model_type": model.family})
    assert hub_shapes(model, family) == stored
    table = family.names(model.config)
    named = {
        table.hub_name(name.removeprefix("decoder.")) for name, _ in model.decoder.named_parameters(prefix="decoder")
    }
    assert named | {"lm_head.weight"} >= set(stored)


class Stored:
    """The shapes of a checkpoint's tensors, some of them changed, against the model of its config.json."""

    def __init__(self, folder: Path) -> None:
        checkpoint = Checkpoint.open(folder)
        self.shapes = {name: info.shape for name, info in checkpoint.infos.items()}
        with torch.device("meta"):
            self.model = build(checkpoint.config)
        self.table = family_of(checkpoint.config).names(self.model.config)

    def refused(self, changes: Mapping[str, tuple[int, ...] | None], message: str) -> None:
        shapes: dict[str, Any] = self.shapes | dict(changes)
        with pytest.raises(InputError, match="^" + message.replace(".", r"\.")):
            bind(self.model, self.table, {name: shape for name, shape in shapes.items() if shape is not None})


def test_tensors_that_do_not_fit_are_named(folder: Path) -> None:
    stored = Stored(folder)
    stored.refused({"model.surprise.weight": (2,)}, "model.surprise.weight: unknown tensor")
    stored.refused({"transformer.surprise": (2,)}, "transformer.surprise: unknown tensor")
    for name, shape in stored.shapes.items():
        stored.refused({name: None}, f"the checkpoint lacks {name}")
        for other in ((shape[0] * 2, *shape[1:]), (1, *shape), (0, *shape[1:]), ()):
            stored.refused({name: other}, f"{name}: shape ")
        if ".1." in name:
            extra = name.replace(".1.", ".77.", 1)
            stored.refused({extra: shape}, f"{extra}: the model of config.json has no such weight")


def test_loading_refuses_them_too(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors") | {"model.surprise": torch.zeros(2)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(InputError, match=r"model\.surprise: unknown tensor"):
        load_model(Checkpoint.open(tmp_path))


def stacked(tensors: Mapping[str, Tensor], table: NameTable, ours: LanguageModel) -> dict[str, Tensor]:
    """The experts as fused tensors by the table's own `ExpertStack` rules, made with torch alone."""
    weights, fused = dict(ours.decoder.named_parameters()), {}
    for rule in (rule for rule in table.rules if isinstance(rule, ExpertStack) and not rule.flat_experts):
        for layer in range(ours.config.layers):
            parts = [
                torch.stack([weights[part.format(layer, expert)] for expert in range(ours.config.experts)])
                for part in rule.ours
            ]
            fused[rule.hub.format(layer)] = torch.cat(parts, 1).detach()
    return {name: tensor for name, tensor in tensors.items() if ".experts." not in name} | fused


@pytest.mark.parametrize("row", [row for row in FAMILIES if row.router], ids=str)
def test_layouts_of_experts_load_alike(row: FamilyRow, tmp_path: Path) -> None:
    """Fused 3-D tensors and per-expert ones give the same bits, and may not both be there."""
    build_reference(row, row.random_config(Random(str(row)), 0)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    ours = load_model(Checkpoint.open(tmp_path))
    table = family_of({"model_type": row.model_type}).names(ours.config)
    if row.model_type == "dbrx":
        other = per_expert_dbrx(tensors, ours.config.ffn.experts)
    else:
        other = stacked(tensors, table, ours)
    for folder, content in (("other", other), ("both", tensors | other)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text((tmp_path / "config.json").read_text())
        save_file(content, tmp_path / folder / "model.safetensors")
    again = load_model(Checkpoint.open(tmp_path / "other"))
    for (name, weight), (same_name, same) in zip(ours.named_parameters(), again.named_parameters(), strict=True):
        assert name == same_name
        assert torch.equal(weight, same)
    with pytest.raises(InputError, match=r"experts.* a second time"):
        load_model(Checkpoint.open(tmp_path / "both"))


def per_expert_dbrx(tensors: Mapping[str, Tensor], experts: int) -> dict[str, Tensor]:
    """DBRX's matrices of all experts, cut: each expert's [out, in]."""
    cut = {}
    for name, tensor in tensors.items():
        if ".mlp." not in name:
            cut[name] = tensor
            continue
        prefix, kind = name.rsplit(".", 1)
        for expert, matrix in enumerate(tensor.chunk(experts)):
            cut[f"{prefix}.{expert}.{kind}.weight"] = (matrix.T if kind == "w2" else matrix).clone(
                memory_format=torch.contiguous_format
            )
    return cut


def test_stacks() -> None:
    table = NameTable(
        ExpertStack("x.{}.gate_up", ("l.{}.gate.{}", "l.{}.up.{}")),
        ExpertStack("x.{}.down", ("l.{}.down.{}",), flat_experts=3, transposed=True),
        Rename("x.{}.n", "l.{}.n"),
    )
    gate_up, down = torch.randn(3, 4, 5), torch.randn(6, 5)
    wanted = {f"l.0.{kind}.{expert}": (2, 5) for kind in ("gate", "up") for expert in range(3)}
    wanted |= {f"l.0.down.{expert}": (5, 2) for expert in range(3)} | {"l.0.n": (7,)}
    stored = {"x.0.gate_up": (3, 4, 5), "x.0.down": (6, 5), "x.0.n": (7,)}
    assert table.hub_shapes(wanted) == stored
    found = table.bind(stored, wanted)
    assert torch.equal(found["l.0.gate.1"].of(gate_up), gate_up[1, :2])
    assert torch.equal(found["l.0.up.2"].of(gate_up), gate_up[2, 2:])
    assert torch.equal(found["l.0.down.2"].of(down), down[4:].T)
    assert found["l.0.up.2"].of(gate_up).data_ptr() == gate_up[2, 2:].data_ptr()
    assert table.hub_name("l.0.up.2") == "x.0.gate_up"
    for broken in ((3, 3, 5), (0, 4, 5), (12, 5), (3,), ()):
        with pytest.raises(InputError, match=r"x\.0\.gate_up"):
            table.bind(stored | {"x.0.gate_up": broken}, wanted)
    for broken in ((7, 5), (6, 5, 1), (0, 5)):
        with pytest.raises(InputError, match=r"x\.0\.down"):
            table.bind(stored | {"x.0.down": broken}, wanted)
