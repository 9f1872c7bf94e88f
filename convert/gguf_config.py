"""A GGUF's metadata as a config.json, for the four families that llama.cpp runs. Imports no torch.

What llama.cpp has no key for is what it always does (the chosen experts' weights of a Mixtral add up to one, say).
Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lmx.convert.gguf_header import Value
from lmx.convert.gguf_names import DBRX, FALCON_MAMBA, MIXTRAL, OLMOE, TensorTable
from lmx.core.config import ConfigReader
from lmx.core.errors import InputError
from lmx.core.files import quoted
from lmx.core.jsonfile import JSON

Metadata = Mapping[str, Value]

LAYER_NORM_EPS = 1e-5  # torch's default, which DBRX uses
_MIXER_EPS = 1e-6  # what FalconMamba's B, C and dt are normalised with; llama.cpp takes the layers' own instead


@dataclass(frozen=True)
class Architecture:
    """A family in a GGUF: llama.cpp's name for it, its tensors, and its config."""

    name: str
    model_type: str
    class_name: str
    table: TensorTable
    to_config: "Callable[[_Keys], dict[str, JSON]]"


class _Keys:
    """The metadata of one architecture, read like a config: typed, bounded, and with errors that name the key."""

    def __init__(self, metadata: Metadata, architecture: str, where: str) -> None:
        self._read, self._prefix = ConfigReader(metadata, where), architecture

    def _key(self, key: str) -> str:
        return f"{self._prefix}.{key}"

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number from 1 on."""
        return self._read.integer(self._key(key), default)

    def number(self, key: str, default: float | None = None) -> float:
        """A number that was stored as float32, as the shortest decimal that gives the same one."""
        return shortest(self._read.number(self._key(key), default))

    def optional(self, key: str) -> float | None:
        """A positive number, or None where it is absent or zero."""
        return (self.number(key) if self._read.has(self._key(key)) else 0.0) or None

    def flag(self, key: str, default: bool) -> bool:
        """A boolean."""
        return self._read.flag(self._key(key), default)

    def error(self, key: str, what: str) -> InputError:
        """The error for a value that cannot be honoured."""
        return self._read.error(self._key(key), what)

    def attention(self) -> tuple[int, int, int]:
        """Heads, key heads, channels of a head. Raises InputError for heads of several sizes, or half turned."""
        hidden, heads = self.integer("embedding_length"), self.integer("attention.head_count")
        width = self.integer("attention.key_length", hidden // heads or 1)
        for key in ("attention.value_length", "rope.dimension_count"):
            if self.integer(key, width) != width:
                raise self.error(key, f"is not {width}, the width of a head")
        self._read.choice(self._key("rope.scaling.type"), "none", ("none",))
        return heads, self.integer("attention.head_count_kv", heads), width


def architecture_of(metadata: Metadata, where: str) -> Architecture:
    """The architecture that a GGUF names. Raises InputError for one that lmx does not run."""
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise InputError(
            f"{where}: its architecture {quoted(str(name))} is not supported",
            "lmx reads GGUFs of Mixtral (llama), OLMoE, DBRX and FalconMamba (mamba)",
        )
    return ARCHITECTURES[name]


def config_of(metadata: Metadata, *, vocab_size: int, tied: bool, dtype: str, where: str) -> dict[str, JSON]:
    """The config.json of a GGUF. vocab_size: rows of its embedding; tied: it has no output matrix of its own.

    Raises InputError naming the key that is missing, impossible or of another architecture.
    """
    architecture = architecture_of(metadata, where)
    config: dict[str, JSON] = {"architectures": [architecture.class_name], "model_type": architecture.model_type}
    config |= architecture.to_config(_Keys(metadata, architecture.name, where))
    config |= {"vocab_size": vocab_size, "tie_word_embeddings": tied, "dtype": dtype}
    return config | _token_ids(metadata, where)


def architecture_for(model_type: str) -> Architecture:
    """The architecture of a family. Raises InputError for one that llama.cpp does not run."""
    for architecture in ARCHITECTURES.values():
        if architecture.model_type == model_type:
            return architecture
    raise InputError(f"llama.cpp has no {model_type}, so there is no GGUF of it", "convert it with --to hf")


def shortest(value: float) -> float:
    """The shortest decimal that rounds to the same float32: 1e-05 for 9.999999747378752e-06."""
    exact = struct.pack("<f", value)
    shorter = (float(f"{value:.{digits}g}") for digits in range(1, 9))
    return next((short for short in shorter if struct.pack("<f", short) == exact), value)


def _token_ids(metadata: Metadata, where: str) -> dict[str, JSON]:
    read = ConfigReader(metadata, where)
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    ids = {ours: read.optional_integer(f"tokenizer.ggml.{name}_token_id", least=0) for ours, name in names.items()}
    return {key: value for key, value in ids.items() if value is not None}


def _mixtral(keys: _Keys) -> dict[str, JSON]:
    heads, kv_heads, head_dim = keys.attention()
    if keys.optional("expert_count") is None:
        raise keys.error("expert_count", "is missing: a dense Llama or Mistral is not supported, Mixtral is")
    return {
        "hidden_size": keys.integer("embedding_length"),
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": keys.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": keys.integer("context_length"),
        "num_local_experts": keys.integer("expert_count"),
        "num_experts_per_tok": keys.integer("expert_used_count"),
        "hidden_act": "silu",
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        **_rope(keys.number("rope.freq_base", 10000.0)),
    }


def _olmoe(keys: _Keys) -> dict[str, JSON]:
    heads, kv_heads, _ = keys.attention()
    return {
        "hidden_size": keys.integer("embedding_length"),
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": keys.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": keys.integer("context_length"),
        "num_experts": keys.integer("expert_count"),
        "num_experts_per_tok": keys.integer("expert_used_count"),
        "norm_topk_prob": keys.flag("expert_weights_norm", False),
        "clip_qkv": keys.optional("attention.clamp_kqv"),
        "hidden_act": "silu",
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        **_rope(keys.number("rope.freq_base", 10000.0)),
    }


def _rope(theta: float) -> dict[str, JSON]:
    """Both spellings, for readers of either."""
    return {"rope_theta": theta, "rope_parameters": {"rope_type": "default", "rope_theta": theta}}


def _dbrx(keys: _Keys) -> dict[str, JSON]:
    heads, kv_heads, _ = keys.attention()
    if abs(keys.number("attention.layer_norm_epsilon", LAYER_NORM_EPS) - LAYER_NORM_EPS) > 1e-9:
        raise keys.error("attention.layer_norm_epsilon", f"is not {LAYER_NORM_EPS}")
    theta, hidden = keys.number("rope.freq_base", 10000.0), keys.integer("embedding_length")
    return {
        "d_model": hidden,
        "n_heads": heads,
        "n_layers": keys.integer("block_count"),
        "max_seq_len": keys.integer("context_length"),
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "attn_config": {"kv_n_heads": kv_heads, "clip_qkv": keys.optional("attention.clamp_kqv"), "rope_theta": theta},
        "ffn_config": {
            "ffn_act_fn": {"name": "silu"},
            "ffn_hidden_size": keys.integer("feed_forward_length"),
            "hidden_size": hidden,
            "moe_num_experts": keys.integer("expert_count"),
            "moe_top_k": keys.integer("expert_used_count"),
            "moe_normalize_expert_weights": 1.0,
        },
    }


def _falcon_mamba(keys: _Keys) -> dict[str, JSON]:
    if not keys.flag("ssm.dt_b_c_rms", False):
        raise keys.error("ssm.dt_b_c_rms", "is not set: a plain Mamba is not supported, FalconMamba is")
    hidden, inner = keys.integer("embedding_length"), keys.integer("ssm.inner_size")
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "expand": max(1, inner // hidden),
        "num_hidden_layers": keys.integer("block_count"),
        "state_size": keys.integer("ssm.state_size"),
        "conv_kernel": keys.integer("ssm.conv_kernel"),
        "time_step_rank": keys.integer("ssm.time_step_rank"),
        "layer_norm_epsilon": keys.number("attention.layer_norm_rms_epsilon"),
        "mixer_rms_eps": keys.number("ssm.dt_b_c_rms_epsilon", _MIXER_EPS),
        "hidden_act": "silu",
        "use_bias": False,
        "use_conv_bias": True,
        "residual_in_fp32": True,
    }


ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture("llama", "mixtral", "MixtralForCausalLM", MIXTRAL, _mixtral),
        Architecture("olmoe", "olmoe", "OlmoeForCausalLM", OLMOE, _olmoe),
        Architecture("dbrx", "dbrx", "DbrxForCausalLM", DBRX, _dbrx),
        Architecture("mamba", "falcon_mamba", "FalconMambaForCausalLM", FALCON_MAMBA, _falcon_mamba),
    )
}
