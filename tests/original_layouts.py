"""Checkpoints as their makers publish them, written from a hub checkpoint by the layouts in ../shared/data/TENSORS.md.

Independent of `convert`: plain loops over names, as the makers' own modules have them.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def hub_tensors(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def neighbours(weight, heads):
    """Rows of each head in the order 0, half, 1, half + 1, ...: the two that turn together side by side."""
    rows = weight.shape[0] // heads
    order = [n * rows + place + half for n in range(heads) for place in range(rows // 2) for half in (0, rows // 2)]
    return weight[order].contiguous()


def mistral_tensors(hub, config, *, stacked):
    """Mixtral in Mistral's names; stacked: as first released."""
    theirs = {
        "tok_embeddings.weight": hub["model.embed_tokens.weight"],
        "norm.weight": hub["model.norm.weight"],
        "output.weight": hub["lm_head.weight"],
    }
    experts = range(config["num_local_experts"])
    for n in range(config["num_hidden_layers"]):
        ours, layer = f"model.layers.{n}.", f"layers.{n}."
        theirs[layer + "attention_norm.weight"] = hub[ours + "input_layernorm.weight"]
        theirs[layer + "ffn_norm.weight"] = hub[ours + "post_attention_layernorm.weight"]
        for name, heads in (("q", config["num_attention_heads"]), ("k", config["num_key_value_heads"])):
            theirs[f"{layer}attention.w{name}.weight"] = neighbours(hub[f"{ours}self_attn.{name}_proj.weight"], heads)
        for name in "vo":
            theirs[f"{layer}attention.w{name}.weight"] = hub[f"{ours}self_attn.{name}_proj.weight"]
        moe = ours + "block_sparse_moe."
        if stacked:
            theirs[layer + "block_sparse_moe.gate.weight"] = hub[moe + "gate.weight"]
            for name in ("w1", "w2", "w3"):
                each = [hub[f"{moe}experts.{e}.{name}.weight"] for e in experts]
                each = [weight.T for weight in each] if name == "w2" else each
                theirs[f"{layer}block_sparse_moe.{name}"] = torch.cat(each)
        else:
            theirs[layer + "feed_forward.gate.weight"] = hub[moe + "gate.weight"]
            for e in experts:
                for name in ("w1", "w2", "w3"):
                    theirs[f"{layer}feed_forward.experts.{e}.{name}.weight"] = hub[f"{moe}experts.{e}.{name}.weight"]
    return theirs


def mistral_params(config):
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    rope = config.get("rope_parameters") or {}
    return {
        "dim": hidden,
        "n_layers": config["num_hidden_layers"],
        "head_dim": config.get("head_dim") or hidden // heads,
        "hidden_dim": config["intermediate_size"],
        "n_heads": heads,
        "n_kv_heads": config["num_key_value_heads"],
        "norm_eps": config.get("rms_norm_eps", 1e-5),
        "vocab_size": config["vocab_size"],
        "rope_theta": config.get("rope_theta") or rope.get("rope_theta", 1e6),
        "moe": {
            "num_experts": config["num_local_experts"],
            "num_experts_per_tok": config.get("num_experts_per_tok", 2),
        },
    }


def write_mistral(source: Path, folder: Path, form: str) -> Path:
    """form: "safetensors" and "pth" of the present layout, "pt" of the first, its tensors dealt out to three files."""
    config = config_of(source)
    tensors = mistral_tensors(hub_tensors(source), config, stacked=form == "pt")
    folder.mkdir(parents=True)
    (folder / "params.json").write_text(json.dumps(mistral_params(config)))
    if form == "safetensors":
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "consolidated.safetensors")
    elif form == "pth":
        torch.save(tensors, folder / "consolidated.00.pth")
    else:
        names = sorted(tensors)
        for number in range(3):
            part = {name: tensors[name] for name in names[number::3]}
            torch.save(part, folder / f"consolidated.{number:02}.pt")
    return folder


def griffin_tensors(hub):
    """RecurrentGemma in the names of google-deepmind's torch modules."""
    theirs = {
        "embedder.input_embedding": hub["model.embed_tokens.weight"],
        "final_norm.scale": hub["model.final_norm.weight"],
    }
    n = 0
    while f"model.layers.{n}.temporal_pre_norm.weight" in hub:
        layer, block = f"model.layers.{n}.", f"blocks.{n}."
        for norm in ("temporal_pre_norm", "channel_pre_norm"):
            theirs[f"{block}{norm}.scale"] = hub[f"{layer}{norm}.weight"]
        temporal, mlp = layer + "temporal_block.", layer + "mlp_block."
        if temporal + "q_proj.weight" in hub:
            for name in "qkv":
                theirs[f"{block}attention_block.proj_{name}.weight"] = hub[f"{temporal}{name}_proj.weight"]
            for kind in ("weight", "bias"):
                theirs[f"{block}attention_block.proj_final.{kind}"] = hub[f"{temporal}o_proj.{kind}"]
        else:
            theirs |= griffin_recurrence(hub, temporal, block + "recurrent_block.")
        gate, up = (hub[f"{mlp}{name}_proj.weight"].T for name in ("gate", "up"))
        theirs[block + "mlp_block.ffw_up.w"] = torch.stack([gate, up])  # [2, width, expanded]
        gate, up = (hub[f"{mlp}{name}_proj.bias"] for name in ("gate", "up"))
        theirs[block + "mlp_block.ffw_up.b"] = torch.stack([gate, up])[:, None, None]
        for kind in ("weight", "bias"):
            theirs[f"{block}mlp_block.ffw_down.{kind}"] = hub[f"{mlp}down_proj.{kind}"]
        n += 1
    return {name: tensor.contiguous() for name, tensor in theirs.items()}


def griffin_recurrence(hub, temporal, block):
    theirs = {
        f"{block}{name}.{kind}": hub[f"{temporal}{name}.{kind}"]
        for name in ("linear_y", "linear_x", "linear_out")
        for kind in ("weight", "bias")
    }
    theirs[block + "conv_1d.w"] = hub[temporal + "conv_1d.weight"][:, 0].T  # [time, width]
    theirs[block + "conv_1d.b"] = hub[temporal + "conv_1d.bias"]
    theirs[block + "rg_lru.a_param"] = hub[temporal + "rg_lru.recurrent_param"]
    for ours, name in (("input", "input_gate"), ("recurrent", "a_gate")):
        theirs[f"{block}rg_lru.{name}.w"] = hub[f"{temporal}rg_lru.{ours}_gate_weight"]
        theirs[f"{block}rg_lru.{name}.b"] = hub[f"{temporal}rg_lru.{ours}_gate_bias"]
    return theirs


def write_griffin(source: Path, folder: Path, name="2b.pt") -> Path:
    folder.mkdir(parents=True)
    torch.save(griffin_tensors(hub_tensors(source)), folder / name)
    return folder


def mamba_config(config):
    """mamba-ssm's config.json, as its save_pretrained writes it."""
    hidden = config["hidden_size"]
    return {
        "d_model": hidden,
        "d_intermediate": 0,
        "n_layer": config["num_hidden_layers"],
        "vocab_size": config["vocab_size"],
        "ssm_cfg": {
            "layer": "Mamba1",
            "d_state": config["state_size"],
            "expand": config["intermediate_size"] // hidden,
            "dt_rank": config["time_step_rank"],
        },
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 8,
        "tie_embeddings": config["tie_word_embeddings"],
    }


def write_mamba(source: Path, folder: Path, **changes) -> Path:
    config, hub = config_of(source), hub_tensors(source)
    theirs = {name.replace("backbone.embeddings.", "backbone.embedding."): tensor for name, tensor in hub.items()}
    if config["tie_word_embeddings"]:
        theirs["lm_head.weight"] = theirs["backbone.embedding.weight"]
    folder.mkdir(parents=True)
    torch.save(theirs, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(mamba_config(config) | changes))
    return folder


def olmo_tensors(hub, config):
    """OLMoE in the names of OLMo with megablocks."""
    theirs = {
        "transformer.wte.weight": hub["model.embed_tokens.weight"],
        "transformer.ln_f.weight": hub["model.norm.weight"],
        "transformer.ff_out.weight": hub["lm_head.weight"],
    }
    for n in range(config["num_hidden_layers"]):
        layer, block = f"model.layers.{n}.", f"transformer.blocks.{n}."
        qkv = [hub[f"{layer}self_attn.{name}_proj.weight"] for name in "qkv"]
        theirs[block + "att_proj.weight"] = torch.cat(qkv)
        theirs[block + "attn_out.weight"] = hub[layer + "self_attn.o_proj.weight"]
        for name in ("q_norm", "k_norm"):
            theirs[f"{block}{name}.weight"] = hub[f"{layer}self_attn.{name}.weight"]
        theirs[block + "attn_norm.weight"] = hub[layer + "input_layernorm.weight"]
        theirs[block + "ff_norm.weight"] = hub[layer + "post_attention_layernorm.weight"]
        theirs[block + "ffn.router.layer.weight"] = hub[layer + "mlp.gate.weight"]
        for name, ours in (("w1", "gate_proj"), ("v1", "up_proj"), ("w2", "down_proj")):
            each = [hub[f"{layer}mlp.experts.{e}.{ours}.weight"] for e in range(config["num_experts"])]
            each = [weight.T for weight in each] if name == "w2" else each
            theirs[f"{block}ffn.experts.mlp.{name}"] = torch.cat(each)
    return theirs


# As published for OLMoE-1B-7B-0924, less what says where its data lies
OLMO_YAML = """\
run_name: OLMoE-1B-7B-0924
seed: 6198
model:
  d_model: {hidden_size}
  n_heads: {num_attention_heads}
  n_kv_heads: {num_key_value_heads}
  n_layers: {num_hidden_layers}
  mlp_ratio: 1
  weight_tying: false
  alibi: false
  rope: true
  flash_attention: true
  attention_dropout: 0.0
  attention_layer_norm: true
  include_bias: false
  block_type: moe
  layer_norm_type: rms
  layer_norm_with_affine: true
  bias_for_layer_norm: false
  attention_layer_norm_with_affine: true
  activation_type: swiglu
  residual_dropout: 0.0
  embedding_dropout: 0.0
  max_sequence_length: 4096
  vocab_size: {vocab_size}
  embedding_size: {vocab_size}
  eos_token_id: 0
  pad_token_id: 1
  init_device: meta
  init_fn: normal
  init_std: 0.02
  init_cutoff_factor: 3
  moe_top_k: {num_experts_per_tok}
  moe_num_experts: {num_experts}
  moe_dropless: true
  moe_mlp_impl: sparse
  moe_zloss_weight: 0.001
  moe_loss_weight: 0.01
compile: null
optimizer:
  name: adamw
  learning_rate: 4.0e-4
  eps: 1.0e-8
  betas:
  - 0.9
  - 0.95
tokenizer:
  identifier: tokenizers/allenai_gpt-neox-olmo-dolma-v1_5.json
  truncate_direction: right
max_duration: 2ep
"""


def write_olmo(source: Path, folder: Path) -> Path:
    config = config_of(source)
    config = {"num_key_value_heads": config["num_attention_heads"], **config}
    folder.mkdir(parents=True)
    torch.save(olmo_tensors(hub_tensors(source), config), folder / "model.pt")
    (folder / "config.yaml").write_text(OLMO_YAML.format_map(config))
    return folder
