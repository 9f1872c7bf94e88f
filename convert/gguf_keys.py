"""A model's config as the metadata of a GGUF, for the four families that llama.cpp runs.

A config that asks for something that llama.cpp does in another way cannot be written, and says so.
"""

from collections.abc import Mapping

from lmx.convert.gguf_config import LAYER_NORM_EPS, Architecture
from lmx.convert.gguf_header import Value
from lmx.core.config import ModelConfig
from lmx.core.errors import InputError
from lmx.core.models.dbrx import DbrxConfig
from lmx.core.models.falcon_mamba import FalconMambaConfig
from lmx.core.models.mixtral import MixtralConfig
from lmx.core.models.olmoe import OlmoeConfig

_NO_LIMIT = 1 << 20  # the context of a model that has none; so says llama.cpp's own converter


def metadata_of(config: ModelConfig, architecture: Architecture) -> dict[str, Value]:
    """The keys of a model. Raises InputError for what llama.cpp would compute in another way."""
    match config:
        case MixtralConfig():
            keys = _mixtral(config)
        case OlmoeConfig():
            keys = _olmoe(config)
        case DbrxConfig():
            keys = _dbrx(config)
        case FalconMambaConfig():
            keys = _falcon_mamba(config)
        case _:
            raise TypeError(f"{type(config).__name__} has no keys in a GGUF")
    names: dict[str, Value] = {"general.architecture": architecture.name}
    return names | {f"{architecture.name}.{key}": value for key, value in keys.items()}


def _refuse(wrong: Mapping[str, bool]) -> None:
    """Raise InputError for the first thing that is so and that llama.cpp would do otherwise."""
    for what, is_so in wrong.items():
        if is_so:
            raise InputError(f"config.json: {what}, which llama.cpp does not do", "convert it with --to hf")


def _attention_keys(heads: int, kv_heads: int, head_dim: int, theta: float) -> dict[str, Value]:
    return {
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
        "rope.freq_base": theta,
    }


def _sizes(config: ModelConfig, context: int, feed_forward: int) -> dict[str, Value]:
    return {
        "vocab_size": config.vocab_size,
        "context_length": context,
        "embedding_length": config.hidden_size,
        "block_count": config.layers,
        "feed_forward_length": feed_forward,
    }


def _mixtral(c: MixtralConfig) -> dict[str, Value]:
    _refuse({"it has a sliding_window": c.sliding_window is not None, "hidden_act is not silu": c.activation != "silu"})
    return {
        **_sizes(c, c.max_position_embeddings, c.intermediate_size),
        **_attention_keys(c.heads, c.kv_heads, c.head_dim, c.rope.theta),
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        "expert_count": c.experts,
        "expert_used_count": c.experts_per_token,
    }


def _olmoe(c: OlmoeConfig) -> dict[str, Value]:
    _refuse(
        {
            "attention_bias is set": c.attention_bias,
            "norm_topk_prob is set": c.norm_topk_prob,
            "hidden_act is not silu": c.activation != "silu",
            "the embedding is tied": c.tie_word_embeddings,
        }
    )
    # llama.cpp does not clip OLMoE; the published configs do not either, and a small limit only guards outliers
    clip: dict[str, Value] = {} if c.clip_qkv is None else {"attention.clamp_kqv": c.clip_qkv}
    return {
        **_sizes(c, c.max_position_embeddings, c.intermediate_size),
        **_attention_keys(c.heads, c.kv_heads, c.head_dim, c.rope.theta),
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        "expert_count": c.experts,
        "expert_used_count": c.experts_per_token,
        **clip,
    }


def _dbrx(c: DbrxConfig) -> dict[str, Value]:
    _refuse(
        {
            "moe_normalize_expert_weights is not 1": c.ffn.normalize != 1.0,
            "ffn_act_fn is not silu": c.ffn.activation != "silu",
        }
    )
    return {
        **_sizes(c, c.max_seq_len, c.ffn.intermediate_size),
        **_attention_keys(c.heads, c.attention.kv_heads, c.head_dim, c.rope.theta),
        "attention.layer_norm_epsilon": LAYER_NORM_EPS,
        "attention.clamp_kqv": c.attention.clip_qkv or 0.0,  # llama.cpp wants the key, and zero means no limit
        "expert_count": c.ffn.experts,
        "expert_used_count": c.ffn.experts_per_token,
    }


def _falcon_mamba(c: FalconMambaConfig) -> dict[str, Value]:
    _refuse(
        {
            "intermediate_size is not twice hidden_size": c.intermediate_size != 2 * c.hidden_size,
            "use_bias is set": c.use_bias,
            "use_conv_bias is not set": not c.use_conv_bias,
            "hidden_act is not silu": c.activation != "silu",
        }
    )
    return {
        **_sizes(c, _NO_LIMIT, 0),
        "attention.head_count": 0,
        "attention.layer_norm_rms_epsilon": c.layer_norm_epsilon,
        "ssm.conv_kernel": c.conv_kernel,
        "ssm.inner_size": c.intermediate_size,
        "ssm.state_size": c.state_size,
        "ssm.time_step_rank": c.time_step_rank,
        "ssm.dt_b_c_rms": True,
        "ssm.dt_b_c_rms_epsilon": c.mixer_rms_eps,  # ours: llama.cpp has no key for it
    }
