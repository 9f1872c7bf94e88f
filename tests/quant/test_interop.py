"""Checkpoints in the bitsandbytes serialization, there and back: written by transformers or bitsandbytes and read here,
written here and read by transformers."""

import json

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    FalconMambaConfig,
    MixtralConfig,
    RecurrentGemmaConfig,
)
from transformers.utils import logging

from lmx.core.checkpoint import Checkpoint
from lmx.core.loader import load_model
from lmx.quant.apply import load_quantized, quantize_matrix
from lmx.quant.matmul import dequantize
from lmx.quant.modules import QuantExpertBank, QuantLinear
from lmx.quant.plan import plan_source
from lmx.quant.serialize import four_bit_tensors, int8_tensors
from lmx.quant.spec import QuantSpec

logging.disable_progress_bar()

# All widths are multiples of 64, all heights of 32. Where a block goes over the end of a row, bitsandbytes 0.50
# dequantizes wrongly on a CPU, and its packing for AVX-512 asserts whole groups of 32 rows.
CONFIGS = {
    "falcon_mamba": FalconMambaConfig(
        vocab_size=96, hidden_size=64, num_hidden_layers=2, intermediate_size=128, state_size=16, time_step_rank=64
    ),
    "recurrent_gemma": RecurrentGemmaConfig(
        vocab_size=96,
        hidden_size=64,
        num_hidden_layers=3,
        intermediate_size=256,
        num_attention_heads=2,
        num_key_value_heads=1,
        lru_width=128,
        attention_window_size=16,
    ),
    "mixtral": MixtralConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    ),
}
DENSE = ("falcon_mamba", "recurrent_gemma")
SPECS = {
    "nf4": QuantSpec("nf4"),
    "nf4 double": QuantSpec("nf4", double_quant=True),
    "fp4": QuantSpec("fp4"),
    "int8": QuantSpec("int8"),
}
IDS = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request):
    return request.param


@pytest.fixture(scope="module")
def folders(tmp_path_factory, dtype):
    """A plain checkpoint of every config, by transformers, with weights that matter."""
    return {name: make_plain(tmp_path_factory.mktemp(name), config, dtype) for name, config in CONFIGS.items()}


def make_plain(folder, config, dtype):
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1 and "A_log" not in name:
                weight += 0.1 * torch.randn_like(weight)
            elif "embed" in name or "lm_head" in name:
                weight.normal_()
    model.to(dtype).save_pretrained(folder)
    return folder


def config_of(spec, dtype=torch.float32):
    return BitsAndBytesConfig(
        **{key: value for key, value in spec.to_config([], str(dtype).removeprefix("torch.")).items() if key[0] != "q"}
        | {"llm_int8_skip_modules": None}
    )


def their_model(folder, dtype, **options):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map="cpu", **options)


@torch.no_grad()
def logits_of(model, ids=IDS):
    return model(ids).logits.float()


def write_quantized(source, spec, folder, compute_dtype):
    """What `lmx quantize` writes, in one go."""
    tensors, checkpoint, plan = {}, Checkpoint.open(source), plan_source(Checkpoint.open(source), spec)
    for weight in plan.weights:
        value = weight.piece.of(checkpoint.tensor(weight.piece.hub))
        if weight.kept is not None:
            tensors[weight.name] = value.clone()
            continue
        matrix = quantize_matrix(value, spec, weight.name)
        tensors |= (int8_tensors if spec.four_bit_type is None else four_bit_tensors)(weight.name, matrix)
    folder.mkdir(exist_ok=True)
    save_file(
        {name: value.clone(memory_format=torch.contiguous_format) for name, value in tensors.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    config = checkpoint.config | {"quantization_config": spec.to_config(plan.kept_modules, compute_dtype)}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("scheme", SPECS)
@pytest.mark.parametrize("family", DENSE)
def test_transformers_reads_what_we_quantize(family, scheme, folders, dtype, tmp_path):
    """In float32, transformers' training mode dequantizes exactly; evaluation computes in bfloat16."""
    name = str(dtype).removeprefix("torch.")
    folder = write_quantized(folders[family], SPECS[scheme], tmp_path / "quantized", name)
    ours = load_quantized(Checkpoint.open(folder), dtype=dtype)
    assert sum(isinstance(module, QuantLinear) for module in ours.modules()) > 5
    theirs = their_model(folder, dtype)
    expected = logits_of(theirs.train() if dtype == torch.float32 else theirs)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2 * expected.abs().max().item()
    torch.testing.assert_close(logits_of(ours), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("scheme", SPECS)
@pytest.mark.parametrize("family", DENSE)
def test_what_transformers_quantized_runs_here(family, scheme, folders, dtype, tmp_path):
    theirs = their_model(folders[family], dtype, quantization_config=config_of(SPECS[scheme], dtype))
    theirs.save_pretrained(tmp_path)
    expected = logits_of(theirs.train() if dtype == torch.float32 else theirs)
    ours = load_quantized(Checkpoint.open(tmp_path), dtype=dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2 * expected.abs().max().item()
    torch.testing.assert_close(logits_of(ours), expected, rtol=0, atol=tolerance)
    if dtype == torch.float32:  # in bfloat16 the error of quantization is as small as the dtype's own
        plain = load_model(Checkpoint.open(folders[family]), dtype=dtype)
        assert (logits_of(plain) - expected).abs().max() > 10 * tolerance


def their_tensors(name, weight, scheme):
    """One matrix by bitsandbytes' own functions."""
    if scheme == "int8":
        layer = bnb.nn.Linear8bitLt(*reversed(weight.shape), bias=False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(weight.float(), requires_grad=False, has_fp16_weights=False).to("cpu")
    else:
        kind, _, double = scheme.partition(" ")
        layer = bnb.nn.Linear4bit(
            *reversed(weight.shape), bias=False, quant_type=kind, compress_statistics=double == "double"
        )
        layer.weight = bnb.nn.Params4bit(weight, False, quant_type=kind, compress_statistics=double == "double").to(
            "cpu"
        )
    stem = name.removesuffix("weight")
    state = nn.Module.state_dict(layer)
    return {stem + key: value.clone() for key, value in state.items()}


@pytest.mark.parametrize("with_router", [False, True], ids=["router kept", "router quantized"])
@pytest.mark.parametrize("scheme", SPECS)
def test_per_expert_mixtral_runs_here(scheme, with_router, folders, dtype, tmp_path):
    """The layout of the 4-bit Mixtral checkpoints that transformers 4 wrote; some quantized the router as well."""
    plain = Checkpoint.open(folders["mixtral"])
    tensors, values = {}, {}
    for weight in plan_source(plain, QuantSpec()).weights:
        value = weight.piece.of(plain.tensor(weight.piece.hub)).clone()
        if weight.kept is None or (with_router and weight.kept == "router"):
            tensors |= their_tensors(weight.name, value, scheme)
            # what the quantized matrix is worth: no code of theirs reads such a file any more
            values[weight.name] = dequantize(quantize_matrix(value, SPECS[scheme]), dtype)
        else:
            tensors[weight.name] = values[weight.name] = value
    assert "model.layers.1.block_sparse_moe.experts.3.w2.weight" in values
    for folder, content in (("quantized", tensors), ("worth", values)):
        (tmp_path / folder).mkdir()
        save_file(content, tmp_path / folder / "model.safetensors")
        (tmp_path / folder / "config.json").write_text(json.dumps(plain.config))
    config = plain.config | {"quantization_config": SPECS[scheme].to_config([], "float32")}
    (tmp_path / "quantized" / "config.json").write_text(json.dumps(config))
    ours = load_quantized(Checkpoint.open(tmp_path / "quantized"), dtype=dtype)
    assert sum(isinstance(module, QuantExpertBank) for module in ours.modules()) == 2
    expected = logits_of(their_model(tmp_path / "worth", dtype))
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2 * expected.abs().max().item()
    torch.testing.assert_close(logits_of(ours), expected, rtol=0, atol=tolerance)


def test_transformers_mixtral_with_experts_in_16_bits_runs_here(folders, tmp_path):
    """transformers 5 quantizes only the attention of a Mixtral; such a file is as good as any."""
    theirs = their_model(folders["mixtral"], torch.float32, quantization_config=config_of(SPECS["nf4"]))
    theirs.save_pretrained(tmp_path)
    ours = load_quantized(Checkpoint.open(tmp_path), dtype=torch.float32)
    assert not any(isinstance(module, QuantExpertBank) for module in ours.modules())
    torch.testing.assert_close(logits_of(ours), logits_of(theirs.train()), rtol=0, atol=1e-4)
