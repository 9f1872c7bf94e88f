"""The published models by their hub ids: what their config.json says, and models of that size without a download.

Importing this imports no torch.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lmx.core.errors import NotFoundError, ResourceError

if TYPE_CHECKING:
    import torch

    from lmx.core.model import LanguageModel
    from lmx.device import Device
    from lmx.quant.apply import HeadScheme
    from lmx.quant.spec import QuantSpec

Config = Mapping[str, object]

# What torch, the noise that weights are made of and the activations take, in bytes.
_BESIDE_WEIGHTS = 600 << 20

_FALCON_MAMBA: Config = {
    "architectures": ["FalconMambaForCausalLM"],
    "bos_token_id": 0,
    "conv_kernel": 4,
    "eos_token_id": 11,
    "expand": 16,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.1,
    "intermediate_size": 8192,
    "layer_norm_epsilon": 1e-05,
    "model_type": "falcon_mamba",
    "num_hidden_layers": 64,
    "pad_token_id": 11,
    "rescale_prenorm_residual": False,
    "residual_in_fp32": True,
    "state_size": 16,
    "tie_word_embeddings": False,
    "time_step_floor": 0.0001,
    "time_step_init_scheme": "random",
    "time_step_max": 0.1,
    "time_step_min": 0.001,
    "time_step_rank": 256,
    "time_step_scale": 1.0,
    "torch_dtype": "bfloat16",
    "use_bias": False,
    "use_conv_bias": True,
    "vocab_size": 65024,
}

_RECURRENT_GEMMA_2B: Config = {
    "_block_types": ["recurrent", "recurrent", "attention"],
    "architectures": ["RecurrentGemmaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attention_window_size": 2048,
    "conv1d_width": 4,
    "embeddings_scale_by_sqrt_dim": True,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2560,
    "intermediate_size": 15360,
    "logits_soft_cap": 30.0,
    "lru_width": 2560,
    "model_type": "recurrent_gemma",
    "num_attention_heads": 10,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "vocab_size": 256000,
}

_RECURRENT_GEMMA_9B: Config = {
    **_RECURRENT_GEMMA_2B,
    "hidden_size": 4096,
    "intermediate_size": 24576,
    "lru_width": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 38,
}

_OLMOE: Config = {
    "architectures": ["OlmoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "clip_qkv": None,
    "eos_token_id": 50279,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 1024,
    "max_position_embeddings": 4096,
    "model_type": "olmoe",
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 16,
    "num_key_value_heads": 16,
    "output_router_logits": False,
    "pad_token_id": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "router_aux_loss_coef": 0.01,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 50304,
}

_DBRX: Config = {
    "architectures": ["DbrxForCausalLM"],
    "attn_config": {"attn_pdrop": 0, "clip_qkv": 8, "kv_n_heads": 8, "rope_theta": 500000},
    "d_model": 6144,
    "emb_pdrop": 0.0,
    "ffn_config": {
        "ffn_act_fn": {"name": "silu"},
        "ffn_hidden_size": 10752,
        "moe_jitter_eps": 0,
        "moe_loss_weight": 0.05,
        "moe_normalize_expert_weights": 1,
        "moe_num_experts": 16,
        "moe_top_k": 4,
        "uniform_expert_assignment": False,
    },
    "initializer_range": 0.02,
    "max_seq_len": 32768,
    "model_type": "dbrx",
    "n_heads": 48,
    "n_layers": 40,
    "output_router_logits": False,
    "resid_pdrop": 0.0,
    "router_aux_loss_coef": 0.05,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 100352,
}

_MIXTRAL_8X7B: Config = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}

_MIXTRAL_8X22B: Config = {
    **_MIXTRAL_8X7B,
    "hidden_size": 6144,
    "intermediate_size": 16384,
    "max_position_embeddings": 65536,
    "num_attention_heads": 48,
    "num_hidden_layers": 56,
    "router_aux_loss_coef": 0.001,
}

PRESETS: Mapping[str, Config] = {
    "tiiuae/falcon-mamba-7b": _FALCON_MAMBA,
    "tiiuae/falcon-mamba-7b-instruct": {**_FALCON_MAMBA, "bos_token_id": 8, "pad_token_id": 0},
    "google/recurrentgemma-2b": _RECURRENT_GEMMA_2B,
    "google/recurrentgemma-2b-it": _RECURRENT_GEMMA_2B,
    "google/recurrentgemma-9b": _RECURRENT_GEMMA_9B,
    "google/recurrentgemma-9b-it": _RECURRENT_GEMMA_9B,
    "allenai/OLMoE-1B-7B-0924": _OLMOE,
    "allenai/OLMoE-1B-7B-0924-Instruct": _OLMOE,
    "allenai/OLMoE-1B-7B-0125": _OLMOE,
    "allenai/OLMoE-1B-7B-0125-Instruct": _OLMOE,
    "databricks/dbrx-base": _DBRX,
    "databricks/dbrx-instruct": _DBRX,
    "mistralai/Mixtral-8x7B-v0.1": _MIXTRAL_8X7B,
    "mistralai/Mixtral-8x7B-Instruct-v0.1": _MIXTRAL_8X7B,
    "mistralai/Mixtral-8x22B-v0.1": _MIXTRAL_8X22B,
    "mistralai/Mixtral-8x22B-Instruct-v0.1": _MIXTRAL_8X22B,
}


def preset(hub_id: str) -> Config:
    """The config of a published model; letters count in either case. Raises NotFoundError naming those that there are.

    A `@revision` is taken off: the shapes of these models never changed.
    """
    wanted = hub_id.partition("@")[0].lower()
    for name, config in PRESETS.items():
        if name.lower() == wanted:
            return config
    raise NotFoundError(f"{hub_id!r:.120} is no model whose size lmx knows", f"give one of {', '.join(PRESETS)}")


def build_dummy(
    config: Config | str,
    quantize: "QuantSpec | str | None" = None,
    head_scheme: "HeadScheme | None" = None,
    dtype: "torch.dtype | str" = "bf16",
    device: "Device" = "cpu",
    gpu_memory: int | None = None,
) -> "LanguageModel":
    """A model of random weights, made where they will lie, those that are quantized straight in that form.

    config: a hub id of `PRESETS`, or a config.json. dtype: of all weights that are not quantized. The others are as for
    `lmx.load`.
    Raises NotFoundError for an unknown id, UsageError for an unknown scheme, InputError for a config that is not
    supported, and, before any memory is taken, ResourceError for a model that would not fit.
    """
    from lmx.api import choose_spec
    from lmx.core.memory import available_memory_bytes
    from lmx.device import choose_budgets, choose_device
    from lmx.dtypes import dtype_by_name
    from lmx.quant.dummy import DummyModel

    known = preset(config) if isinstance(config, str) else config
    wanted = dtype_by_name(dtype) if isinstance(dtype, str) else dtype
    model = DummyModel(known, spec=choose_spec(quantize), head_scheme=head_scheme, dtype=wanted)
    places = model.places(choose_device(device), choose_budgets(device, gpu_memory))
    needed, available = _BESIDE_WEIGHTS + places.host_bytes(model.nbytes), available_memory_bytes()
    if available is not None and needed > available:
        smaller = "take a smaller model" if quantize else "quantize it (--4bit), take a smaller model"
        raise ResourceError(
            f"a model of this size takes {needed / 1e9:.1f} GB of memory, and {available / 1e9:.1f} GB are free",
            f"{smaller}, or close other programs",
        )
    return model.build(places)
