import json
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, DbrxConfig, FalconMambaConfig, MixtralConfig, OlmoeConfig

from lmx.core.checkpoint import Checkpoint
from lmx.core.errors import InputError, UsageError
from lmx.core.loader import load_model
from lmx.core.native.compiled import library
from lmx.quant.apply import load_quantized
from lmx.quant.matmul import dequantize
from lmx.quant.modules import QuantExpertBank, QuantHead, QuantLinear
from lmx.quant.quantize import quantize
from lmx.quant.spec import QuantSpec
from lmx.quant.stored import DequantizedSource, StoredMatrices

CONFIGS = {
    "mixtral": MixtralConfig(
        vocab_size=70,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    ),
    "olmoe": OlmoeConfig(
        vocab_size=70,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=4,
        num_experts_per_tok=2,
    ),
    "dbrx": DbrxConfig(
        vocab_size=70,
        d_model=64,
        n_heads=4,
        n_layers=2,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        ffn_config={"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    ),
    "falcon_mamba": FalconMambaConfig(vocab_size=70, hidden_size=64, num_hidden_layers=2, state_size=8),
}
IDS = torch.randint(3, 70, (2, 11), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A checkpoint of every config, by transformers."""
    folders = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(2)
        folders[name] = tmp_path_factory.mktemp(name)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight) * 0.05)
        model.to(torch.bfloat16).save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="module")
def quantized(plain, tmp_path_factory):
    """The same, quantized by lmx."""
    parent = tmp_path_factory.mktemp("quantized")

    def make(family, spec):
        target = parent / f"{family}-{spec.scheme}-{spec.double_quant}"
        if not target.exists():
            list(quantize(Checkpoint.open(plain[family]), target, spec))
        return target

    return make


@torch.no_grad()
def logits_of(model):
    return model(IDS).logits.float()


@pytest.mark.parametrize("spec", [QuantSpec("nf4", double_quant=True), QuantSpec("int8")], ids=["nf4", "int8"])
@pytest.mark.parametrize("family", CONFIGS)
def test_three_ways_to_the_same_model(family, spec, plain, quantized):
    """Quantized while loading, loaded quantized, and loaded from the dequantized weights."""
    folder = quantized(family, spec)
    at_once = load_quantized(Checkpoint.open(plain[family]), spec=spec, dtype=torch.float32)
    stored = load_quantized(Checkpoint.open(folder), dtype=torch.float32)
    worth = load_model(DequantizedSource(Checkpoint.open(folder), torch.float32), dtype=torch.float32)
    assert torch.equal(logits_of(at_once), logits_of(stored))
    torch.testing.assert_close(logits_of(stored), logits_of(worth), rtol=0, atol=1e-5)
    assert not torch.allclose(
        logits_of(worth), logits_of(load_model(Checkpoint.open(plain[family])).float()), atol=1e-4
    )
    kinds = {type(module) for module in stored.modules()}
    assert QuantLinear in kinds
    assert (QuantExpertBank in kinds) == (family != "falcon_mamba")


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_packed_bytes_stay_in_the_mapped_file(scheme, quantized):
    """A write through a matrix of the model shows in a second view of the file's pages: they are the same memory."""
    checkpoint = Checkpoint.open(quantized("mixtral", QuantSpec(scheme)))
    model = load_quantized(checkpoint)
    bank = next(module for module in model.modules() if isinstance(module, QuantExpertBank))
    query = model.decoder.layers[0].attention.q.weight
    for name, matrix in (("experts.2.w2", bank.down[2]), ("self_attn.q_proj", query)):
        name = next(n for n in checkpoint.infos if n.startswith("model.layers.0.") and n.endswith(f"{name}.weight"))
        data = matrix.packed if scheme == "nf4" else matrix.weight
        assert data.data_ptr() == checkpoint.tensor(name).data_ptr()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("at_once", [True, False], ids=["while loading", "loaded"])
def test_scales_are_held_in_half_where_that_loses_nothing(dtype, at_once, tmp_path, plain):
    source = tmp_path / "source"
    shutil.copytree(plain["olmoe"], source)
    weights = {
        name: (1.003 * weight.float()).to(dtype) for name, weight in load_file(source / "model.safetensors").items()
    }
    save_file(weights, source / "model.safetensors")
    spec = QuantSpec("nf4")
    list(quantize(Checkpoint.open(source), tmp_path / "quantized", spec))
    folder = Checkpoint.open(tmp_path / "quantized")
    model = load_quantized(Checkpoint.open(source), spec=spec) if at_once else load_quantized(folder)
    query = model.decoder.layers[0].attention.q
    stored = folder.tensor("model.layers.0.self_attn.q_proj.weight.absmax")
    narrow = dtype == torch.bfloat16 and library() is not None
    assert query.weight.absmax.dtype == (torch.bfloat16 if narrow else torch.float32)
    assert torch.equal(query.weight.absmax.float(), stored)
    assert torch.equal(query.state_dict()["weight.absmax"], stored)


def test_a_partly_kept_bank(plain, quantized, tmp_path):
    spec = QuantSpec("nf4", skip=("*.experts.1.w2", "*.layers.1.*.w3"))
    source = Checkpoint.open(plain["mixtral"])
    list(quantize(source, tmp_path / "out", spec))
    at_once, stored = load_quantized(source, spec=spec), load_quantized(Checkpoint.open(tmp_path / "out"))
    assert torch.equal(logits_of(at_once), logits_of(stored))
    bank = stored.decoder.layers[0].mlp.experts
    assert isinstance(bank.down[1], torch.Tensor)
    assert not isinstance(bank.down[0], torch.Tensor)
    worth = load_model(DequantizedSource(Checkpoint.open(tmp_path / "out"), torch.float32))
    torch.testing.assert_close(logits_of(stored.float()), logits_of(worth), rtol=0, atol=1e-5)


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
@pytest.mark.parametrize("family", ["mixtral", "falcon_mamba"])
def test_the_head_is_quantized_and_a_tied_embedding_is_not(family, scheme, plain):
    source = Checkpoint.open(plain[family])
    model = load_quantized(source, head_scheme=scheme, dtype=torch.float32)
    reference = load_model(source, dtype=torch.float32)
    assert isinstance(model.head, QuantHead)
    assert torch.equal(model.decoder.embed.weight, reference.decoder.embed.weight)
    tied = reference.head.weight is None
    assert tied == (family == "falcon_mamba")
    weight = reference.decoder.embed.weight if tied else reference.head.weight
    worth = dequantize(model.head.output.weight, torch.float32)
    error = (worth - weight).abs().max()
    assert 0 < error < 0.2 * weight.abs().max()
    with torch.no_grad():
        reference.head.weight = nn.Parameter(worth)
    torch.testing.assert_close(logits_of(model), logits_of(reference), rtol=0, atol=1e-5)


def test_gradients_flow_to_what_is_not_quantized(plain):
    model = load_quantized(Checkpoint.open(plain["mixtral"]), spec=QuantSpec(), dtype=torch.float32)
    model(IDS, labels=IDS).loss.backward()
    assert model.decoder.embed.weight.grad.abs().sum() > 0
    assert all(weight.grad is not None for weight in model.parameters())


def test_a_missing_classification_head_begins_at_random(quantized):
    model = load_quantized(Checkpoint.open(quantized("mixtral", QuantSpec())), head="sequence", dtype=torch.float32)
    assert model(IDS[:1]).logits.shape == (1, 2)
    assert model.head.score.weight.std() > 0


def test_progress_ends_complete(plain):
    steps = []
    load_quantized(
        Checkpoint.open(plain["dbrx"]), spec=QuantSpec(), progress=lambda done, total: steps.append((done, total))
    )
    assert steps == sorted(steps)
    assert steps[-1][0] == steps[-1][1] == 2 * (64 * 128 + 64 * 64 + 3 * 4 * 64 * 96)


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_what_cannot_be_asked(scheme, plain, quantized):
    checkpoint = Checkpoint.open(quantized("mixtral", QuantSpec(scheme)))
    with pytest.raises(UsageError, match="quantized already"):
        load_quantized(checkpoint, spec=QuantSpec())
    with pytest.raises(UsageError, match="no output matrix"):
        load_quantized(Checkpoint.open(plain["mixtral"]), head="none", head_scheme="nf4")
    stored = StoredMatrices.read(checkpoint)
    assert len(stored.matrices) == 2 * (4 + 3 * 4)


NAME = "model.layers.1.self_attn.k_proj.weight"
STATE = f"{NAME}.quant_state.bitsandbytes__nf4"


def edit_state(tensors, **changes):
    state = json.loads(bytes(tensors[STATE].tolist())) | changes
    tensors[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


DAMAGE = {
    "another shape of the same size": lambda t: edit_state(t, shape=[64, 32]),
    "a shape of another size": lambda t: edit_state(t, shape=[32, 66]),
    "a huge shape": lambda t: edit_state(t, shape=[1 << 30, 1 << 30]),
    "too few scales": lambda t: t.update({f"{NAME}.absmax": t[f"{NAME}.absmax"][:-1]}),
    "no scales": lambda t: t.pop(f"{NAME}.absmax"),
    "no state": lambda t: t.pop(STATE),
    "no matrix": lambda t: t.pop(NAME),
    "two states": lambda t: t.update({STATE.replace("nf4", "fp4"): t[STATE].clone()}),
    "another table": lambda t: t.update({f"{NAME}.quant_map": t[f"{NAME}.quant_map"] * 2}),
    "a companion of nothing": lambda t: t.update({"model.norm.weight.absmax": torch.ones(1)}),
    "integers that nobody scales": lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}),
    "a norm in four bits": lambda t: t.update({NAME.replace("self_attn.k_proj", "norm"): t[NAME].clone()}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_and_hostile_checkpoints_are_refused(damage, quantized, tmp_path):
    folder = quantized("mixtral", QuantSpec())
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    DAMAGE[damage](tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(InputError):
        load_quantized(Checkpoint.open(tmp_path))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "gptq"}, "gptq"),
        (["nf4"], "no object"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "no quantized tensors"),
    ],
)
def test_configs_that_do_not_fit_the_files(config, message, plain, tmp_path):
    (tmp_path / "model.safetensors").symlink_to(plain["mixtral"] / "model.safetensors")
    raw = json.loads((plain["mixtral"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"quantization_config": config}))
    with pytest.raises(InputError, match=message):
        load_quantized(Checkpoint.open(tmp_path))


def test_unaligned_files_give_the_same(quantized, tmp_path):
    """Other writers do not align: one byte more in the header moves every tensor."""
    folder = quantized("mixtral", QuantSpec())
    raw = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    moved = struct.pack("<Q", length + 1) + raw[8 : 8 + length] + b" " + raw[8 + length :]
    (tmp_path / "model.safetensors").write_bytes(moved)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    got = logits_of(load_quantized(Checkpoint.open(tmp_path)))
    assert torch.equal(got, logits_of(load_quantized(Checkpoint.open(folder))))
