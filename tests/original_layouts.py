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
