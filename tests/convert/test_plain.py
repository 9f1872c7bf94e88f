import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DbrxConfig, FalconMambaConfig, MixtralConfig

from lmx.convert.events import Finished, Progress
from lmx.convert.plain import Options, write_plain
from lmx.core.checkpoint import Checkpoint
from lmx.core.errors import ConflictError, InputError
from lmx.core.loader import load_model
from lmx.quant.quantize import quantize
from lmx.quant.spec import QuantSpec
from lmx.quant.stored import DequantizedSource

CONFIGS = {
    "mixtral": MixtralConfig(
        vocab_size=70,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=3,
    ),
    "dbrx": DbrxConfig(
        vocab_size=70,
        d_model=64,
        n_heads=4,
        n_layers=2,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        ffn_config={"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    ),
    "falcon_mamba": FalconMambaConfig(vocab_size=70, hidden_size=64, num_hidden_layers=2, state_size=8),
}
IDS = torch.randint(3, 70, (2, 11), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folders = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(2)
        folders[name] = tmp_path_factory.mktemp(name)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folders[name])
    return folders


def run(source, target, **options):
    *steps, last = write_plain(source, target, Options(**options))
    assert all(isinstance(step, Progress) for step in steps)
    assert isinstance(last, Finished)
    assert steps[-1].parameters == steps[-1].total == last.parameters
    return last


def tensors_of(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@torch.no_grad()
def logits_of(model):
    return model(IDS).logits.float()


@pytest.mark.parametrize("family", CONFIGS)
def test_a_plain_checkpoint_comes_out_as_it_went_in(family, plain, tmp_path):
    finished = run(Checkpoint.open(plain[family]), tmp_path / "out", max_shard_bytes=30_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert finished.output_bytes == sum(f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors"))
    before, after = tensors_of(plain[family]), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads(
        (plain[family] / "config.json").read_text()
    )


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
@pytest.mark.parametrize("family", CONFIGS)
def test_a_quantized_checkpoint_becomes_one_that_transformers_reads(family, scheme, plain, tmp_path):
    """DBRX, too: quantized expert by expert, its plain file has all experts of a layer in one tensor."""
    list(quantize(Checkpoint.open(plain[family]), tmp_path / "quantized", QuantSpec(scheme)))
    source = DequantizedSource(Checkpoint.open(tmp_path / "quantized"), torch.float32)
    run(source, tmp_path / "out", dtype=torch.float32)
    assert tensors_of(tmp_path / "out").keys() == tensors_of(plain[family]).keys()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.dtype == torch.float32
    ours = load_model(source)
    torch.testing.assert_close(logits_of(theirs), logits_of(ours), rtol=0, atol=1e-5)
    before = tensors_of(plain[family])
    for name, tensor in tensors_of(tmp_path / "out").items():
        # half a step: of 16 uneven codes, or of 254 even ones
        allowed = before[name].abs().max().item() * (0.16 if scheme == "nf4" else 0.005)
        assert (tensor - before[name].float()).abs().max() <= allowed, name


def test_a_dtype_is_kept_where_none_is_asked_for(plain, tmp_path):
    list(quantize(Checkpoint.open(plain["mixtral"]), tmp_path / "quantized", QuantSpec()))
    run(DequantizedSource(Checkpoint.open(tmp_path / "quantized")), tmp_path / "out")
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "out").values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert "quantization_config" not in config
    again = tmp_path / "again"
    list(quantize(Checkpoint.open(tmp_path / "out"), again, QuantSpec("int8")))
    assert Checkpoint.open(again).quantization_config is not None


def test_stacked_experts_are_taken_apart(plain, tmp_path):
    """transformers 5 can write a Mixtral's experts as one tensor; the hub's layout has each by itself."""
    tensors = tensors_of(plain["mixtral"])
    stacked = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer in range(2):
        expert = f"model.layers.{layer}.block_sparse_moe.experts."
        fused = f"model.layers.{layer}.mlp.experts."
        parts = [torch.cat([tensors[f"{expert}{e}.w1.weight"], tensors[f"{expert}{e}.w3.weight"]]) for e in range(3)]
        stacked[fused + "gate_up_proj"] = torch.stack(parts)
        stacked[fused + "down_proj"] = torch.stack([tensors[f"{expert}{e}.w2.weight"] for e in range(3)])
    (tmp_path / "in").mkdir()
    save_file(stacked, tmp_path / "in/model.safetensors")
    (tmp_path / "in/config.json").write_text((plain["mixtral"] / "config.json").read_text())
    run(Checkpoint.open(tmp_path / "in"), tmp_path / "out")
    after = tensors_of(tmp_path / "out")
    assert after.keys() == tensors.keys()
    assert all(torch.equal(tensors[name], after[name]) for name in tensors)


def test_what_does_not_fit_the_dtype_is_refused(plain, tmp_path):
    tensors = tensors_of(plain["falcon_mamba"])
    for value, dtype, message in [(1e6, torch.float16, "beyond"), (torch.inf, torch.float32, "NaN or infinity")]:
        folder = tmp_path / message.split()[0]
        folder.mkdir()
        tensors["backbone.norm_f.weight"][3] = value
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text((plain["falcon_mamba"] / "config.json").read_text())
        with pytest.raises(InputError, match=message):
            run(Checkpoint.open(folder), tmp_path / "out", dtype=dtype)
        assert not (tmp_path / "out").exists()


def test_an_output_that_exists_stays(plain, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ConflictError):
        run(Checkpoint.open(plain["mixtral"]), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    run(Checkpoint.open(plain["mixtral"]), tmp_path / "out", force=True)
    assert (tmp_path / "out/config.json").exists()
