"""Checkpoints of random weights of every family, small enough to quantize in a moment.

Widths are multiples of 64: where the rows of a matrix are no whole number of blocks, bitsandbytes 0.50 on a CPU does
not dequantize what it has itself quantized.
"""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lmx.core.loader import build, hub_shapes
from lmx.core.registry import family_of

CONFIGS = {
    "mixtral": {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
    },
    "olmoe": {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "dbrx": {
        "vocab_size": 96,
        "d_model": 64,
        "n_layers": 2,
        "n_heads": 4,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 500000.0},
        "ffn_config": {"ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "falcon_mamba": {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "state_size": 8,
        "time_step_rank": 8,
        "tie_word_embeddings": False,
    },
    "recurrent_gemma": {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "lru_width": 64,
        "attention_window_size": 16,
    },
}
FAMILIES = [
    pytest.param(
        family,
        marks=pytest.mark.skipif(
            importlib.util.find_spec(f"lmx.core.models.{family}") is None, reason="this family is not here yet"
        ),
    )
    for family in CONFIGS
]


def config_of(family, **changes):
    """A small config.json of a family."""
    return {"model_type": family, **CONFIGS[family], **changes}


def write_family(folder: Path, family: str, dtype=torch.bfloat16, seed=0, **changes) -> Path:
    """A checkpoint in the hub's own names; the values are normal, with a width of 0.05."""
    config = config_of(family, **changes)
    with torch.device("meta"):
        shapes = hub_shapes(build(config), family_of(config))
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: (torch.randn(shape, generator=generator) * 0.05).to(dtype) for name, shape in shapes.items()}
    return write_tensors(folder, config, tensors)


def write_tensors(folder: Path, config, tensors) -> Path:
    """A checkpoint of given tensors, with some of the files that stand beside the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder
