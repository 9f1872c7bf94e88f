"""Random small configs of each family, as keyword arguments of transformers' config classes.

The index runs through the cases that must occur; the rest is drawn.
"""

from random import Random
from typing import Any

Config = dict[str, Any]

VOCAB = 99
PAD = 3


def _experts(index: int) -> tuple[int, int]:
    """Experts and how many of them answer."""
    experts = (8, 2, 16, 4, 1, 5)[index % 6]
    return experts, min(experts, 1 + index % 4)


def _common(random: Random, index: int) -> Config:
    return {
        "vocab_size": VOCAB,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.15,
        "num_labels": (3, 1, 2)[index % 3],
        "rope_parameters": {"rope_type": "default", "rope_theta": random.choice([100.0, 10000.0, 5e5])},
    }


def _heads(random: Random, index: int) -> tuple[int, int]:
    """Query heads and key heads: none, some and all of them shared."""
    kv_heads = (1, 2, 4)[index % 3]
    return kv_heads * random.choice([1, 2, 3]), kv_heads


def mixtral_config(random: Random, index: int) -> Config:
    (heads, kv_heads), (experts, top_k) = _heads(random, index), _experts(index)
    head_dim = random.choice([8, 12, 16])
    return _common(random, index) | {
        "hidden_size": heads * head_dim if index % 2 else random.choice([32, 40, 56]),
        "head_dim": None if index % 2 else head_dim,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": random.choice([24, 48]),
        "num_hidden_layers": 2 + index % 2,
        "num_local_experts": experts,
        "num_experts_per_tok": top_k,
        "hidden_act": random.choice(["silu", "gelu", "gelu_pytorch_tanh"]),
        "sliding_window": None if index % 3 == 0 else random.randint(2, 9),
        "rms_norm_eps": random.choice([1e-5, 1e-6]),
        "tie_word_embeddings": index % 4 == 1,
        "attention_dropout": 0.2,
        "router_jitter_noise": 0.2,
        "router_aux_loss_coef": random.random(),
    }


def olmoe_config(random: Random, index: int) -> Config:
    (heads, kv_heads), (experts, top_k) = _heads(random, index), _experts(index)
    return _common(random, index) | {
        "hidden_size": heads * random.choice([8, 12, 16]),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": random.choice([24, 48]),
        "num_hidden_layers": 2 + index % 2,
        "num_experts": experts,
        "num_experts_per_tok": top_k,
        "norm_topk_prob": index % 2 == 0,
        "hidden_act": random.choice(["silu", "gelu", "relu"]),
        "clip_qkv": None if index % 3 == 0 else random.uniform(0.3, 1.5),
        "attention_bias": index % 4 == 2,
        "rms_norm_eps": random.choice([1e-5, 1e-6]),
        "tie_word_embeddings": index % 4 == 1,
        "attention_dropout": 0.2,
        "router_aux_loss_coef": random.random(),
    }


UNLIMITED = 1e30
"""Stands for `clip_qkv: null` in transformers' DBRX, which raises on null."""


def dbrx_config(random: Random, index: int) -> Config:
    (heads, kv_heads), (experts, top_k) = _heads(random, index), _experts(index)
    common = _common(random, index)
    return common | {
        "d_model": heads * random.choice([8, 12, 16]),
        "n_heads": heads,
        "n_layers": 2 + index % 2,
        "max_seq_len": 128,
        "resid_pdrop": 0.2,
        "attn_config": {
            "kv_n_heads": kv_heads,
            "clip_qkv": UNLIMITED if index % 3 == 0 else random.uniform(0.3, 1.5),
            "attn_pdrop": 0.2,
            "rope_theta": common["rope_parameters"]["rope_theta"],
        },
        "ffn_config": {
            "ffn_hidden_size": random.choice([24, 48]),
            "ffn_act_fn": {"name": random.choice(["silu", "gelu", "relu"])},
            "moe_num_experts": experts,
            "moe_top_k": top_k,
            "moe_jitter_eps": 0.2,
            "moe_loss_weight": random.random(),
            "moe_normalize_expert_weights": (1.0, 2.0, None)[index % 3],
        },
    }


def falcon_mamba_config(random: Random, index: int) -> Config:
    common = _common(random, index)
    del common["rope_parameters"]
    # As published: the width set apart from `expand`, which then means nothing.
    width = {"expand": 2} if index % 3 == 0 else {"expand": 16, "intermediate_size": random.choice([24, 48, 56])}
    return common | {
        "hidden_size": random.choice([16, 24, 40]),
        **width,
        "state_size": random.choice([3, 8, 16]),
        "conv_kernel": 2 + index % 4,
        "time_step_rank": "auto" if index % 2 else random.choice([1, 3, 8]),
        "num_hidden_layers": 1 + index % 3,
        "use_bias": index % 4 < 2,
        "use_conv_bias": index % 5 < 3,
        "hidden_act": ("silu", "gelu", "relu")[index // 2 % 3],
        "layer_norm_epsilon": random.choice([1e-5, 1e-3]),
        "mixer_rms_eps": random.choice([1e-6, 1e-2]),
        "residual_in_fp32": index % 3 < 2,
        "rescale_prenorm_residual": index % 3 == 0,
        "time_step_init_scheme": ("random", "constant")[index % 2],
        "tie_word_embeddings": index % 2 == 0,
    }


_BLOCK_TYPES = (
    ["recurrent", "recurrent", "attention"],
    ["attention"],
    ["recurrent"],
    ["attention", "recurrent"],
    ["recurrent", "attention", "attention", "recurrent"],
)


def recurrent_gemma_config(random: Random, index: int) -> Config:
    heads, kv_heads = ((4, 1), (4, 2), (3, 3), (1, 1), (6, 2))[index % 5]
    common = _common(random, index)
    del common["initializer_range"]
    common["rope_parameters"]["partial_rotary_factor"] = (0.5, 1.0, 0.25)[index % 3]
    return common | {
        "hidden_size": heads * random.choice([4, 8]),
        "lru_width": (None, heads * 5, heads * 8)[index % 3],
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        **({"head_dim": random.choice([6, 8, 16])} if index % 2 else {}),
        "intermediate_size": 2 * random.choice([12, 20]),
        "num_hidden_layers": (4, 2, 1, 3, 5)[index % 5],
        "block_types": _BLOCK_TYPES[index % 5],
        "attention_window_size": (3, 8, 64)[index // 2 % 3],
        "conv1d_width": 2 + index % 4,
        "logits_soft_cap": random.choice([5.0, 30.0]),
        "hidden_activation": random.choice(["gelu_pytorch_tanh", "silu"]),
        "attention_bias": index % 2 == 0,
        "attention_dropout": 0.2,
        "w_init_variance_scale": 0.3,
        "rms_norm_eps": random.choice([1e-6, 1e-2]),
        "tie_word_embeddings": index % 2 == 0,
    }


def flat_rope(config: Config, index: int) -> None:
    """Every other time: transformers 4's `rope_theta`."""
    if index % 2:
        config |= {"rope_theta": config.pop("rope_parameters")["rope_theta"], "rope_scaling": None}


def older_recurrent_gemma(config: Config, index: int) -> None:
    """Every other time as transformers 4 wrote it: a flat `rope_theta`, and another name of the block types."""
    if index % 2:
        rope = config.pop("rope_parameters")
        config |= {name: rope[name] for name in ("rope_theta", "partial_rotary_factor")}
        config["_block_types"] = config.pop("block_types")


def as_saved(config: Config, index: int) -> None:
    """Only one spelling is known."""


def published_dbrx(config: Config, index: int) -> None:
    """As published: every other time the base in attn_config only; null for no limit, a whole 1 for the norm."""
    attention, ffn = config["attn_config"], config["ffn_config"]
    if index % 2:
        del config["rope_parameters"]
    else:
        attention["rope_theta"] = 123.0  # which rope_parameters overrides
    if attention["clip_qkv"] == UNLIMITED:
        attention["clip_qkv"] = None
    if ffn["moe_normalize_expert_weights"] == 1.0:
        ffn["moe_normalize_expert_weights"] = 1
    attention["tie_word_embeddings"] = ffn["tie_word_embeddings"] = True
