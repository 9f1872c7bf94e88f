"""A small Mixtral checkpoint of random weights, made by transformers."""

import json
from pathlib import Path

import torch
from text_folders import INST, byte_fallback_folder

CONTEXT = 2048


def write_checkpoint(folder: Path, *, template: str | None = INST, **config: int) -> Path:
    """A Mixtral of random weights with a tokenizer and a template that takes no system role."""
    from transformers import MixtralConfig, MixtralForCausalLM

    byte_fallback_folder(folder, template)
    config_file = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config_file))
    sizes = {
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "max_position_embeddings": CONTEXT,
    }
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**(sizes | config), initializer_range=0.3))
    model.save_pretrained(folder, max_shard_size="60KB")
    return folder
