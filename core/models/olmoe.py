"""OLMoE (arXiv 2409.02060): many small experts, and queries and keys normalised over their full projection."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lmx.core.call import AttentionCall, Inputs, plan_attention
from lmx.core.config import ConfigReader, ModelConfig, RopeConfig, count_labels
from lmx.core.decoder import Decoder
from lmx.core.kv_cache import AttentionCache, KVCache
from lmx.core.layers.activation import ACTIVATION_NAMES
from lmx.core.layers.embedding import empty_embedding
from lmx.core.layers.fused import affines, step_attention, step_experts
from lmx.core.layers.initialise import initialise_normal
from lmx.core.layers.linear import Linear
from lmx.core.layers.moe import ExpertBank, route
from lmx.core.layers.norm import RMSNorm
from lmx.core.layers.projection import affine
from lmx.core.layers.residual import added
from lmx.core.names import ExpertStack, NameTable, Rename
from lmx.core.native.attention import Scale
from lmx.core.native.block import AttentionWeights, ExpertWeights
from lmx.core.registry import Family
from lmx.core.state import Span, State


@dataclass(frozen=True)
class OlmoeConfig(ModelConfig):
    """Widths, counts and switches of an OLMoE model, by the names of its `config.json`."""

    heads: int
    kv_heads: int
    head_dim: int
    attention_bias: bool
    attention_dropout: float
    clip_qkv: float | None
    intermediate_size: int
    experts: int
    experts_per_token: int
    norm_topk_prob: bool
    activation: str
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    router_aux_loss: float

    @classmethod
    def parse(cls, raw: Mapping[str, object]) -> "OlmoeConfig":
        """Read a `config.json` in the spelling of transformers 4 or 5. Raises InputError naming the key."""
        read = ConfigReader(raw)
        vocab, hidden, heads = (read.integer(key) for key in ("vocab_size", "hidden_size", "num_attention_heads"))
        experts = read.integer("num_experts" if read.has("num_experts") else "num_local_experts", 64, most=4096)
        read.ignore("num_experts", "num_local_experts")
        config = cls(
            vocab_size=vocab,
            hidden_size=hidden,
            layers=read.integer("num_hidden_layers", most=4096),
            initializer_range=read.number("initializer_range", 0.02),
            tie_word_embeddings=read.flag("tie_word_embeddings", False),
            bos_ids=read.token_ids("bos_token_id"),
            eos_ids=read.token_ids("eos_token_id"),
            pad_id=read.pad_id(vocab),
            labels=count_labels(raw),
            problem_type=read.problem_type(),
            classifier_dropout=read.number("classifier_dropout", 0.1, most=1.0),
            output_router_logits=read.flag("output_router_logits", False),
            heads=heads,
            kv_heads=read.integer("num_key_value_heads", heads),
            head_dim=read.integer("head_dim", hidden // heads),
            attention_bias=read.flag("attention_bias", False),
            attention_dropout=read.number("attention_dropout", 0.0, most=1.0),
            clip_qkv=read.optional_number("clip_qkv"),
            intermediate_size=read.integer("intermediate_size"),
            experts=experts,
            experts_per_token=read.integer("num_experts_per_tok", 8, most=experts),
            norm_topk_prob=read.flag("norm_topk_prob", False),
            activation=read.choice("hidden_act", "silu", ACTIVATION_NAMES),
            rms_norm_eps=read.number("rms_norm_eps", 1e-5),
            rope=RopeConfig.read(read, 1e4),
            max_position_embeddings=read.integer("max_position_embeddings", 4096),
            router_aux_loss=read.number("router_aux_loss_coef", 0.01),
        )
        read.check_heads(config.heads, config.kv_heads, config.head_dim)
        read.must_be("sliding_window")
        read.finish()
        return config

    @property
    def context_length(self) -> int:
        """The longest sequence that the positions were trained for."""
        return self.max_position_embeddings

    @property
    def attention_width(self) -> int:
        """Channels of all query heads of a layer together."""
        return self.heads * self.head_dim

    @property
    def experts_to_choose(self) -> int:
        """How many experts a token is sent to."""
        return self.experts_per_token

    @property
    def router_aux_loss_coef(self) -> float:
        """The weight of the load balancing loss."""
        return self.router_aux_loss


class Attention(nn.Module):
    """Rotary attention whose queries and keys are normalised before they are split into heads, and may be clipped."""

    def __init__(self, config: OlmoeConfig) -> None:
        super().__init__()
        self.head_dim, self.dropout, self.limit = config.head_dim, config.attention_dropout, config.clip_qkv
        hidden, bias = config.hidden_size, config.attention_bias
        wide, narrow = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q = Linear(hidden, wide, bias)
        self.k = Linear(hidden, narrow, bias)
        self.v = Linear(hidden, narrow, bias)
        self.o = Linear(wide, hidden, bias)
        self.q_norm = RMSNorm(wide, config.rms_norm_eps)
        self.k_norm = RMSNorm(narrow, config.rms_norm_eps)

    def weights(self, norm: Scale) -> AttentionWeights | None:
        """All of it for a kernel that takes it with its norm in one; None where kernels cannot read it."""
        projections = affines(self.q, self.k, self.v, self.o)
        if projections is None:
            return None
        q, k, v, o = projections
        return AttentionWeights(norm, q, k, v, o, head_norms=(self.q_norm.scale, self.k_norm.scale), limit=self.limit)

    def forward(self, x: Tensor, call: AttentionCall, cache: AttentionCache | None) -> Tensor:
        """x: [batch, length, hidden] -> the same."""
        dropout = self.dropout if self.training else 0.0
        query, key, value = self.q(x), self.k(x), self.v(x)
        norms = self.q_norm, self.k_norm
        answer = call.attend(query, key, value, cache, self.head_dim, norms=norms, limit=self.limit, dropout=dropout)
        return self.o(answer)


class SparseMLP(nn.Module):
    """The router and its experts; the chosen probabilities weigh as they are, or add up to one."""

    def __init__(self, config: OlmoeConfig) -> None:
        super().__init__()
        self.top_k = config.experts_per_token
        self.normalize = 1.0 if config.norm_topk_prob else None
        self.router = Linear(config.hidden_size, config.experts, bias=False)
        self.experts = ExpertBank(config.experts, config.hidden_size, config.intermediate_size, config.activation)

    def weights(self, norm: Scale) -> ExpertWeights | None:
        """All of it for a kernel that takes it with its norm in one; None where kernels cannot read it."""
        router, table = affine(self.router), self.experts.table
        if router is None or table is None:
            return None
        return ExpertWeights(norm, router, table, self.top_k, self.normalize)

    def forward(self, x: Tensor, call: AttentionCall) -> Tensor:
        """x: [batch, length, hidden] -> the same."""
        tokens = x.flatten(0, 1)  # [batch * length, hidden]
        router_logits = self.router(tokens)
        call.record.router(router_logits)
        ids, weights = route(router_logits, self.top_k, self.normalize)
        return self.experts(tokens, ids, weights).view_as(x)


class Block(nn.Module):
    """Attention, then experts, each on the normalised stream and added back to it."""

    def __init__(self, config: OlmoeConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SparseMLP(config)

    def forward(self, x: Tensor, call: AttentionCall, cache: AttentionCache | None) -> Tensor:
        """x: [batch, length, hidden] -> the same."""
        attended = step_attention(self, x, call, cache, lambda: self.attention.weights(self.attention_norm.scale))
        x = added(x, self.attention(self.attention_norm(x), call, cache)) if attended is None else attended
        answered = step_experts(self, x, call, lambda: self.mlp.weights(self.mlp_norm.scale))
        return added(x, self.mlp(self.mlp_norm(x), call)) if answered is None else answered


class OlmoeDecoder(Decoder[AttentionCache]):
    """Embedding, layers and the last norm."""

    FAMILY: ClassVar[str] = "olmoe"

    def __init__(self, config: OlmoeConfig) -> None:
        super().__init__()
        self._config = config
        self.embed = empty_embedding(config.vocab_size, config.hidden_size, config.pad_id)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    @property
    def config(self) -> OlmoeConfig:
        """The config that the decoder was built from."""
        return self._config

    def plan(self, inputs: Inputs, span: Span, state: State[AttentionCache] | None) -> AttentionCall:
        """Rotary tables and one mask for all layers."""
        cache = state.layers[0] if state is not None else None
        return plan_attention(inputs, span, cache, self._config.head_dim, self._config.rope.theta)

    def empty_layers(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> list[AttentionCache]:
        """A cache that grows for every layer."""
        config = self._config
        return [KVCache.empty(batch_size, config.kv_heads, config.head_dim, dtype, device) for _ in self.layers]

    def reset_parameters(self) -> None:
        """Normal weights of the config's width, norms of one, biases and the padding's embedding zero."""
        initialise_normal(self, self._config.initializer_range)


_LAYER, _OURS = "model.layers.{}.", "layers.{}."
_MOE, _EXPERTS = _LAYER + "mlp.", _OURS + "mlp.experts."

NAMES = NameTable(
    Rename("model.embed_tokens.weight", "embed.weight"),
    *(Rename(f"{_LAYER}self_attn.{n}_proj.weight", f"{_OURS}attention.{n}.weight") for n in "qkvo"),
    *(Rename(f"{_LAYER}self_attn.{n}_proj.bias", f"{_OURS}attention.{n}.bias") for n in "qkvo"),
    *(Rename(f"{_LAYER}self_attn.{n}_norm.weight", f"{_OURS}attention.{n}_norm.weight") for n in "qk"),
    Rename(_LAYER + "input_layernorm.weight", _OURS + "attention_norm.weight"),
    Rename(_LAYER + "post_attention_layernorm.weight", _OURS + "mlp_norm.weight"),
    Rename(_MOE + "gate.weight", _OURS + "mlp.router.weight"),
    *(Rename(f"{_MOE}experts.{{}}.{n}_proj.weight", f"{_EXPERTS}{n}.{{}}") for n in ("gate", "up", "down")),
    Rename("model.norm.weight", "norm.weight"),
    # transformers 5 in memory, and files written by it without its conversion back
    ExpertStack(_MOE + "experts.gate_up_proj", (_EXPERTS + "gate.{}", _EXPERTS + "up.{}")),
    ExpertStack(_MOE + "experts.down_proj", (_EXPERTS + "down.{}",)),
)

FAMILY = Family("olmoe", "OLMoE", OlmoeConfig.parse, OlmoeDecoder, lambda config: NAMES)
