"""What is quantized and what is kept: against transformers' own modules, the published configs and their sizes."""

import json
import re
from collections import Counter
from itertools import pairwise
from math import prod
from pathlib import Path

import pytest
import torch
from families import FAMILIES, config_of, write_family, write_tensors
from safetensors.torch import load_file
from support import SHARED, needs_shared

from lmx.core.checkpoint import Checkpoint
from lmx.core.errors import InputError
from lmx.core.loader import build, hub_shapes
from lmx.core.registry import family_of
from lmx.core.safetensors_file import TensorInfo
from lmx.quant.plan import make_plan, plan_source
from lmx.quant.quantize import plan_output
from lmx.quant.spec import QuantSpec

# The matrices that are to be quantized, as the hub calls them.
QUANTIZED = {
    "mixtral": r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|block_sparse_moe\.experts\.\d+\.w[123])\.weight",
    "olmoe": r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.experts\.\d+\.(gate|up|down)_proj)\.weight",
    "dbrx": r"transformer\.blocks\.\d+\.(norm_attn_norm\.attn\.(Wqkv|out_proj)"
    r"|ffn\.experts\.mlp\.\d+\.(w1|v1|w2))\.weight",
    "falcon_mamba": r"backbone\.layers\.\d+\.mixer\.(in_proj|x_proj|out_proj)\.weight",
    "recurrent_gemma": r"model\.layers\.\d+\.(temporal_block\.([qkvo]_proj|linear_(x|y|out))"
    r"|mlp_block\.(gate|up|down)_proj)\.weight",
}
REASONS = {
    "mixtral": {"embedding", "output head", "norm", "router"},
    "olmoe": {"embedding", "output head", "norm", "router"},
    "dbrx": {"embedding", "output head", "norm", "router"},
    "falcon_mamba": {"embedding", "output head", "norm", "convolution", "scan parameter"},
    "recurrent_gemma": {"embedding", "norm", "bias", "convolution", "recurrence gate"},
}


def plan_of(folder, **spec):
    return plan_source(Checkpoint.open(folder), QuantSpec(**spec))


@pytest.mark.parametrize("family", FAMILIES)
def test_linear_layers_and_experts_are_quantized_and_nothing_else(tmp_path, family):
    plan = plan_of(write_family(tmp_path, family), scheme="int8")
    for weight in plan.weights:
        assert (weight.kept is None) == bool(re.fullmatch(QUANTIZED[family], weight.name)), weight
    assert {weight.kept for weight in plan.weights} - {None} == REASONS[family]
    total = sum(prod(info.shape) for info in Checkpoint.open(tmp_path).infos.values())
    assert plan.parameters == total
    assert plan.quantized_parameters == sum(prod(w.shape) for w in plan.weights if w.kept is None)


@pytest.mark.parametrize("family", ["falcon_mamba", "recurrent_gemma"])
def test_what_transformers_would_quantize_is_quantized_or_named(family):
    """transformers replaces every nn.Linear that `llm_int8_skip_modules` does not name."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = config_of(family)
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
        shapes = hub_shapes(build(config), family_of(config))
    plan = make_plan(config, infos_of(shapes), QuantSpec("int8"))
    linears = {name for name, module in theirs.named_modules() if isinstance(module, torch.nn.Linear)}
    quantized = {weight.module for weight in plan.weights if weight.kept is None}
    assert linears - set(plan.kept_modules) == quantized


def test_fused_experts_get_the_same_names_and_values(tmp_path):
    plain = write_family(tmp_path / "plain", "mixtral")
    tensors = load_file(plain / "model.safetensors")
    fused = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer in range(2):
        old, new = f"model.layers.{layer}.block_sparse_moe.experts", f"model.layers.{layer}.mlp.experts"
        pairs = [torch.cat([tensors[f"{old}.{e}.w1.weight"], tensors[f"{old}.{e}.w3.weight"]]) for e in range(4)]
        fused[f"{new}.gate_up_proj"] = torch.stack(pairs)
        fused[f"{new}.down_proj"] = torch.stack([tensors[f"{old}.{e}.w2.weight"] for e in range(4)])
    folder = write_tensors(tmp_path / "fused", config_of("mixtral"), fused)
    source, plan = Checkpoint.open(folder), plan_of(folder)
    assert [w.name for w in plan.weights] == [w.name for w in plan_of(plain).weights]
    for weight in plan.weights:
        assert torch.equal(weight.piece.of(source.tensor(weight.piece.hub)), tensors[weight.name])


def test_experts_are_written_one_by_one_gate_up_down(tmp_path):
    plan = plan_of(write_family(tmp_path, "mixtral"))
    names = [w.name.split("experts.")[1] for w in plan.weights if w.bank and ".layers.1." in w.name]
    assert names == [f"{expert}.{part}.weight" for expert in range(4) for part in ("w1", "w3", "w2")]


def test_skip_names_modules(tmp_path):
    plan = plan_of(write_family(tmp_path, "mixtral"), skip=("*.experts.1", "q_proj"))
    skipped = {weight.module for weight in plan.weights if weight.kept == "named by --skip"}
    layers = [f"model.layers.{layer}." for layer in range(2)]
    experts = {f"{layer}block_sparse_moe.experts.1.{part}" for layer in layers for part in ("w1", "w2", "w3")}
    assert skipped == experts | {f"{layer}self_attn.q_proj" for layer in layers}
    assert skipped <= set(plan.kept_modules)


def test_a_matrix_that_would_not_shrink_is_kept(tmp_path):
    plan = plan_of(write_family(tmp_path, "falcon_mamba", hidden_size=16, intermediate_size=8, vocab_size=8))
    kept = {w.name: w.kept for w in plan.weights}
    # 8 x 24 numbers of 2 bytes: 384; in four bits 96 for the codes, 12 for absmax, 64 and 256 for the tables: 428
    assert kept["backbone.layers.0.mixer.x_proj.weight"] == "would not get smaller"


def test_a_quantized_checkpoint_is_refused(tmp_path):
    folder = write_family(tmp_path, "mixtral", quantization_config={"quant_method": "gptq"})
    with pytest.raises(InputError, match="quantized already"):
        plan_of(folder)


def test_a_matrix_in_eight_bit_floats_is_refused_by_name(tmp_path):
    tensors = load_file(write_family(tmp_path, "mixtral") / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.weight"
    write_tensors(tmp_path, config_of("mixtral"), tensors | {name: tensors[name].to(torch.float8_e4m3fn)})
    with pytest.raises(InputError, match=rf"{name}.*F8_E4M3"):
        plan_of(tmp_path)


def test_a_checkpoint_without_head_keeps_its_names(tmp_path):
    tensors = load_file(write_family(tmp_path, "mixtral") / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    write_tensors(tmp_path, config_of("mixtral"), bare)
    assert {weight.name for weight in plan_of(tmp_path).weights} == set(bare)


def test_classification_heads_are_kept(tmp_path):
    tensors = load_file(write_family(tmp_path, "mixtral") / "model.safetensors")
    del tensors["lm_head.weight"]
    tensors["score.weight"] = torch.zeros(2, 64)
    write_tensors(tmp_path, config_of("mixtral"), tensors)
    heads = [weight for weight in plan_of(tmp_path).weights if weight.kept == "output head"]
    assert [head.name for head in heads] == ["score.weight"]


def infos_of(shapes):
    """Headers of a bfloat16 file with these tensors."""
    return {n: TensorInfo(n, "BF16", s, Path("model.safetensors"), 0, 2 * prod(s)) for n, s in shapes.items()}


PUBLISHED = {
    "mixtral/config-8x7b.json": ("Mixtral-8x7B", 26.0e9, 27.5e9),
    "mixtral/config-8x22b.json": ("Mixtral-8x22B-Instruct-v0.1", 79e9, 81e9),
    "olmoe/config-0125-instruct.json": ("OLMoE-1B-7B", 3.9e9, 4.3e9),
    "dbrx/config.json": ("dbrx", 74e9, 77e9),
    "falcon_mamba/config.json": ("falcon-mamba-7b", 4.0e9, 5.2e9),
    "falcon_mamba/config-instruct.json": ("falcon-mamba-7b", 4.0e9, 5.2e9),
    "recurrent_gemma/config-2b.json": ("recurrentgemma-2b", 2.2e9, 2.9e9),
    "recurrent_gemma/config-9b.DERIVED.json": ("recurrentgemma-9b", 6.0e9, 7.2e9),
}


@needs_shared
@pytest.mark.parametrize("file", PUBLISHED)
def test_published_models_come_out_as_arithmetic_says(file):
    config = json.loads((SHARED / "data" / file).read_text())
    if family_module_missing(config["model_type"]):
        pytest.skip("this family is not here yet")
    name, least, most = PUBLISHED[file]
    with torch.device("meta"):
        shapes = hub_shapes(build(config), family_of(config))
    plan = make_plan(config, infos_of(shapes), QuantSpec())
    table = json.loads((SHARED / "data" / "TENSORS.json").read_text())
    if name != "Mixtral-8x22B-Instruct-v0.1" or config["vocab_size"] == 32768:
        assert plan.parameters == table[name]["parameters"]
    kept = plan.parameters - plan.quantized_parameters
    arithmetic = plan.quantized_parameters * (0.5 + 4 / 64) + 2 * kept
    shards = plan_output(plan, 5_000_000_000)
    output = sum(shard.size for shard in shards)
    assert abs(output / arithmetic - 1) < 0.01
    assert least < output < most, output
    assert all(shard.size <= 5_000_000_000 + len(shard.header) for shard in shards)
    assert all(shard.offsets[slot.name] % 64 == 0 for shard in shards for slot in shard.slots)
    _check_banks(plan, shards)


def _check_banks(plan, shards):
    """A layer's experts lie in one file, at a constant stride."""
    where = {unit[0].name: shard for shard in shards for unit in shard.units}
    banks = {}
    for weight in plan.weights:
        if weight.bank:
            shard = where[weight.name]
            banks.setdefault((weight.bank, weight.name.split(".")[-2]), []).append(
                (shard.name, shard.offsets[weight.name])
            )
    for places in banks.values():
        assert len({file for file, _ in places}) == 1
        starts = [start for _, start in places]
        assert len(Counter(b - a for a, b in pairwise(starts))) == 1


def family_module_missing(family):
    return bool(next(p for p in FAMILIES if p.values[0] == family).marks[0].args[0])


@needs_shared
def test_double_quantization_of_mixtral_is_24_to_25_5_gb():
    config = json.loads((SHARED / "data" / "mixtral/config-8x7b.json").read_text())
    with torch.device("meta"):
        shapes = hub_shapes(build(config), family_of(config))
    plan = make_plan(config, infos_of(shapes), QuantSpec(double_quant=True))
    assert 24e9 < sum(shard.size for shard in plan_output(plan, 5_000_000_000)) < 25.5e9
