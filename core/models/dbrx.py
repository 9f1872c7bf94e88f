"""DBRX (Databricks, 2024): grouped queries from one fused and clipped projection, and few large experts.

Source: the model's page and code on the hub, databricks/dbrx-base.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmx.core.call import AttentionCall, Inputs, plan_attention
from lmx.core.config import ConfigReader, ModelConfig, RopeConfig, count_labels
from lmx.core.decoder import Decoder
from lmx.core.kv_cache import AttentionCache, KVCache
from lmx.core.layers.activation import ACTIVATION_NAMES
from lmx.core.layers.embedding import empty_embedding
from lmx.core.layers.initialise import initialise_normal
from lmx.core.layers.linear import Linear
from lmx.core.layers.moe import ExpertBank, jitter, route
from lmx.core.names import ExpertStack, NameTable, Rename
from lmx.core.registry import Family
from lmx.core.state import Span, State


@dataclass(frozen=True)
class AttentionConfig:
    """`attn_config`."""

    kv_heads: int
    clip_qkv: float | None
    dropout: float
    rope_theta: float

    @classmethod
    def parse(cls, read: ConfigReader) -> "AttentionConfig":
        """Read the section, and pass over what old transformers wrote into every nested config."""
        config = cls(
            kv_heads=read.integer("kv_n_heads", 1),
            clip_qkv=read.optional_number("clip_qkv"),
            dropout=read.number("attn_pdrop", 0.0, most=1.0),
            rope_theta=read.number("rope_theta", 1e4, least=1e-3),
        )
        read.ignore(*_NESTED_NOISE)
        read.finish()
        return config


@dataclass(frozen=True)
class FFNConfig:
    """`ffn_config`. normalize: the p of the norm that the chosen experts' weights are divided by; None for none."""

    intermediate_size: int
    experts: int
    experts_per_token: int
    activation: str
    normalize: float | None
    jitter: float
    loss_weight: float

    @classmethod
    def parse(cls, read: ConfigReader) -> "FFNConfig":
        """Read the section, and pass over what old transformers wrote into every nested config."""
        experts = read.integer("moe_num_experts", 4, most=4096)
        activation = read.section("ffn_act_fn")
        config = cls(
            intermediate_size=read.integer("ffn_hidden_size", 3584),
            experts=experts,
            experts_per_token=read.integer("moe_top_k", 1, most=experts),
            activation=activation.choice("name", "silu", ACTIVATION_NAMES),
            # absent is 1, null is no normalisation: so in the hub's code and in transformers
            normalize=read.optional_number("moe_normalize_expert_weights", absent=1.0),
            jitter=read.number("moe_jitter_eps", 0.0, most=1.0),
            loss_weight=read.number("moe_loss_weight", 0.01),
        )
        activation.finish()
        read.must_be("uniform_expert_assignment", False)
        read.ignore("hidden_size", *_NESTED_NOISE)  # transformers, too, takes d_model for it
        read.finish()
        return config


_NESTED_NOISE = ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class DbrxConfig(ModelConfig):
    """Widths, counts and switches of a DBRX model, by the names of its `config.json`."""

    heads: int
    max_seq_len: int
    rope: RopeConfig
    embed_dropout: float
    residual_dropout: float
    attention: AttentionConfig
    ffn: FFNConfig

    @classmethod
    def parse(cls, raw: Mapping[str, object]) -> "DbrxConfig":
        """Read a `config.json` in the spelling of transformers 4 or 5. Raises InputError naming the key.

        The rotary base is that of a top-level `rope_parameters`, else `attn_config`'s: transformers 5 drops the latter
        and would run the published model with 10,000 in place of 500,000.
        """
        read = ConfigReader(raw)
        vocab = read.integer("vocab_size")
        attention = AttentionConfig.parse(read.section("attn_config"))
        ffn = FFNConfig.parse(read.section("ffn_config"))
        config = cls(
            vocab_size=vocab,
            hidden_size=read.integer("d_model"),
            layers=read.integer("n_layers", most=4096),
            initializer_range=read.number("initializer_range", 0.02),
            tie_word_embeddings=False,
            bos_ids=read.token_ids("bos_token_id"),
            eos_ids=read.token_ids("eos_token_id"),
            pad_id=read.pad_id(vocab),
            labels=count_labels(raw),
            problem_type=read.problem_type(),
            classifier_dropout=read.number("classifier_dropout", 0.1, most=1.0),
            output_router_logits=read.flag("output_router_logits", False),
            heads=read.integer("n_heads"),
            max_seq_len=read.integer("max_seq_len", 2048),
            rope=RopeConfig.read(read, attention.rope_theta),
            embed_dropout=read.number("emb_pdrop", 0.0, most=1.0),
            residual_dropout=read.number("resid_pdrop", 0.0, most=1.0),
            attention=attention,
            ffn=ffn,
        )
        read.check_heads(config.heads, attention.kv_heads, config.head_dim)
        read.must_be("tie_word_embeddings", False)
        read.must_be("num_key_value_heads", attention.kv_heads)
        read.ignore("router_aux_loss_coef")  # moe_loss_weight counts, as in transformers
        read.finish()
        return config

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.hidden_size // self.heads

    @property
    def context_length(self) -> int:
        """The longest sequence that the positions were trained for."""
        return self.max_seq_len

    @property
    def attention_width(self) -> int:
        """Channels of all query heads of a layer together."""
        return self.heads * self.head_dim

    @property
    def experts_to_choose(self) -> int:
        """How many experts a token is sent to."""
        return self.ffn.experts_per_token

    @property
    def router_aux_loss_coef(self) -> float:
        """The weight of the load balancing loss."""
        return self.ffn.loss_weight


class Attention(nn.Module):
    """Grouped-query rotary attention; queries, keys and values come clipped out of one matrix."""

    def __init__(self, config: DbrxConfig) -> None:
        super().__init__()
        self.head_dim, self.limit, self.dropout = config.head_dim, config.attention.clip_qkv, config.attention.dropout
        wide, narrow = config.heads * config.head_dim, config.attention.kv_heads * config.head_dim
        self.widths = (wide, narrow, narrow)
        self.qkv = Linear(config.hidden_size, sum(self.widths), bias=False)
        self.o = Linear(wide, config.hidden_size, bias=False)

    def forward(self, x: Tensor, call: AttentionCall, cache: AttentionCache | None) -> Tensor:
        """x: [batch, length, hidden] -> the same."""
        query, key, value = self.qkv(x).split(self.widths, dim=-1)
        dropout = self.dropout if self.training else 0.0
        return self.o(call.attend(query, key, value, cache, self.head_dim, limit=self.limit, dropout=dropout))


class SparseMLP(nn.Module):
    """The router and its experts; the chosen probabilities are divided by a p-norm of theirs, or left."""

    def __init__(self, config: FFNConfig, hidden_size: int) -> None:
        super().__init__()
        self.top_k, self.normalize, self.noise = config.experts_per_token, config.normalize, config.jitter
        self.router = Linear(hidden_size, config.experts, bias=False)
        self.experts = ExpertBank(config.experts, hidden_size, config.intermediate_size, config.activation)

    def forward(self, x: Tensor, call: AttentionCall) -> Tensor:
        """x: [batch, length, hidden] -> the same."""
        tokens = jitter(x, self.noise, self.training).flatten(0, 1)  # [batch * length, hidden]
        router_logits = self.router(tokens)
        call.record.router(router_logits)
        ids, weights = route(router_logits, self.top_k, self.normalize)
        return self.experts(tokens, ids, weights).view_as(x)


class Block(nn.Module):
    """Attention, then experts, each on the normalised stream and added back to it."""

    def __init__(self, config: DbrxConfig) -> None:
        super().__init__()
        self.dropout = config.residual_dropout
        self.attention_norm = nn.LayerNorm(config.hidden_size, bias=False)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, bias=False)
        self.mlp = SparseMLP(config.ffn, config.hidden_size)

    def forward(self, x: Tensor, call: AttentionCall, cache: AttentionCache | None) -> Tensor:
        """x: [batch, length, hidden] -> the same."""
        x = x + F.dropout(self.attention(self.attention_norm(x), call, cache), self.dropout, self.training)
        return x + F.dropout(self.mlp(self.mlp_norm(x), call), self.dropout, self.training)


class DbrxDecoder(Decoder[AttentionCache]):
    """Embedding, layers and the last norm."""

    FAMILY: ClassVar[str] = "dbrx"

    def __init__(self, config: DbrxConfig) -> None:
        super().__init__()
        self._config = config
        self.embed_dropout = config.embed_dropout
        self.embed = empty_embedding(config.vocab_size, config.hidden_size, config.pad_id)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.hidden_size, bias=False)

    @property
    def config(self) -> DbrxConfig:
        """The config that the decoder was built from."""
        return self._config

    def plan(self, inputs: Inputs, span: Span, state: State[AttentionCache] | None) -> AttentionCall:
        """Rotary tables and one mask for all layers."""
        cache = state.layers[0] if state is not None else None
        return plan_attention(inputs, span, cache, self._config.head_dim, self._config.rope.theta)

    def empty_layers(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> list[AttentionCache]:
        """A cache that grows for every layer."""
        kv_heads, head_dim = self._config.attention.kv_heads, self._config.head_dim
        return [KVCache.empty(batch_size, kv_heads, head_dim, dtype, device) for _ in self.layers]

    def reset_parameters(self) -> None:
        """Normal weights of the config's width, norms of one, the padding's embedding zero."""
        initialise_normal(self, self._config.initializer_range)


_LAYER, _OURS = "transformer.blocks.{}.", "layers.{}."
_ATTENTION, _MLP, _EXPERTS = _LAYER + "norm_attn_norm.", _LAYER + "ffn.experts.mlp.", _OURS + "mlp.experts."


def names(config: DbrxConfig) -> NameTable:
    """The hub's names. All experts of a layer lie in one matrix, [experts * width, hidden]; the down projection too."""
    experts = config.ffn.experts
    return NameTable(
        Rename("transformer.wte.weight", "embed.weight"),
        Rename(_ATTENTION + "norm_1.weight", _OURS + "attention_norm.weight"),
        Rename(_ATTENTION + "attn.Wqkv.weight", _OURS + "attention.qkv.weight"),
        Rename(_ATTENTION + "attn.out_proj.weight", _OURS + "attention.o.weight"),
        Rename(_ATTENTION + "norm_2.weight", _OURS + "mlp_norm.weight"),
        Rename(_LAYER + "ffn.router.layer.weight", _OURS + "mlp.router.weight"),
        ExpertStack(_MLP + "w1", (_EXPERTS + "gate.{}",), flat_experts=experts),
        ExpertStack(_MLP + "v1", (_EXPERTS + "up.{}",), flat_experts=experts),
        ExpertStack(_MLP + "w2", (_EXPERTS + "down.{}",), flat_experts=experts, transposed=True),
        Rename("transformer.norm_f.weight", "norm.weight"),
        # an expert a tensor, each [out, in]: how quantized files hold them
        Rename(_MLP + "{}.w1.weight", _EXPERTS + "gate.{}"),
        Rename(_MLP + "{}.v1.weight", _EXPERTS + "up.{}"),
        Rename(_MLP + "{}.w2.weight", _EXPERTS + "down.{}"),
        base_prefix="transformer.",
    )


FAMILY = Family("dbrx", "DBRX", DbrxConfig.parse, DbrxDecoder, names)
