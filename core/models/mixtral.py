"""Mixtral (arXiv 2401.04088): attention with grouped queries, and in every layer a mixture of gated MLPs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lmx.core.call import AttentionCall, Inputs, plan_attention
from lmx.core.config import ConfigReader, ModelConfig, RopeConfig, count_labels
from lmx.core.decoder import Decoder
from lmx.core.kv_cache import AttentionCache, KVCache, WindowKVCache
from lmx.core.layers.activation import ACTIVATION_NAMES
from lmx.core.layers.embedding import empty_embedding
from lmx.core.layers.fused import affines, step_attention, step_experts
from lmx.core.layers.initialise import initialise_normal
from lmx.core.layers.linear import Linear
from lmx.core.layers.moe import ExpertBank, jitter, route
from lmx.core.layers.norm import RMSNorm
from lmx.core.layers.projection import affine
from lmx.core.layers.residual import added
from lmx.core.names import ExpertStack, NameTable, Rename
from lmx.core.native.attention import Scale
from lmx.core.native.block import AttentionWeights, ExpertWeights
from lmx.core.registry import Family
from lmx.core.state import Span, State


@dataclass(frozen=True)
class MixtralConfig(ModelConfig):
    """Widths, counts and switches of a Mixtral model, by the names of its `config.json`."""

    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    experts: int
    experts_per_token: int
    activation: str
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    sliding_window: int | None
    attention_dropout: float
    router_jitter_noise: float
    router_aux_loss: float

    @classmethod
    def parse(cls, raw: Mapping[str, object]) -> "MixtralConfig":
        """Read a `config.json` in the spelling of transformers 4 or 5. Raises InputError naming the key."""
        read = ConfigReader(raw)
        vocab, hidden, heads = (read.integer(key) for key in ("vocab_size", "hidden_size", "num_attention_heads"))
        experts = read.integer("num_experts" if read.has("num_experts") else "num_local_experts", 8, most=4096)
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
            intermediate_size=read.integer("intermediate_size"),
            experts=experts,
            experts_per_token=read.integer("num_experts_per_tok", 2, most=experts),
            activation=read.choice("hidden_act", "silu", ACTIVATION_NAMES),
            rms_norm_eps=read.number("rms_norm_eps", 1e-5),
            rope=RopeConfig.read(read, 1e6),
            max_position_embeddings=read.integer("max_position_embeddings", 131072),
            sliding_window=read.optional_integer("sliding_window"),
            attention_dropout=read.number("attention_dropout", 0.0, most=1.0),
            router_jitter_noise=read.number("router_jitter_noise", 0.0, most=1.0),
            router_aux_loss=read.number("router_aux_loss_coef", 0.001),
        )
        read.check_heads(config.heads, config.kv_heads, config.head_dim)
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
    """Grouped-query attention with rotary positions, over a cache if there is one."""

    def __init__(self, config: MixtralConfig) -> None:
        super().__init__()
        self.head_dim, self.dropout = config.head_dim, config.attention_dropout
        wide, narrow = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q = Linear(config.hidden_size, wide, bias=False)
        self.k = Linear(config.hidden_size, narrow, bias=False)
        self.v = Linear(config.hidden_size, narrow, bias=False)
        self.o = Linear(wide, config.hidden_size, bias=False)

    def weights(self, norm: Scale) -> AttentionWeights | None:
        """All of it for a kernel that takes it with its norm in one; None where kernels cannot read it."""
        projections = affines(self.q, self.k, self.v, self.o)
        if projections is None:
            return None
        q, k, v, o = projections
        return AttentionWeights(norm, q, k, v, o)

    def forward(self, x: Tensor, call: AttentionCall, cache: AttentionCache | None) -> Tensor:
        """x: [batch, length, hidden] -> the same."""
        dropout = self.dropout if self.training else 0.0
        return self.o(call.attend(self.q(x), self.k(x), self.v(x), cache, self.head_dim, dropout=dropout))


class SparseMLP(nn.Module):
    """The router and its experts."""

    def __init__(self, config: MixtralConfig) -> None:
        super().__init__()
        self.top_k, self.noise = config.experts_per_token, config.router_jitter_noise
        self.router = Linear(config.hidden_size, config.experts, bias=False)
        self.experts = ExpertBank(config.experts, config.hidden_size, config.intermediate_size, config.activation)

    def weights(self, norm: Scale) -> ExpertWeights | None:
        """All of it for a kernel that takes it with its norm in one; None where kernels cannot read it."""
        router, table = affine(self.router), self.experts.table
        if router is None or table is None:
            return None
        return ExpertWeights(norm, router, table, self.top_k, 1.0)

    def forward(self, x: Tensor, call: AttentionCall) -> Tensor:
        """x: [batch, length, hidden] -> the same."""
        tokens = jitter(x, self.noise, self.training).flatten(0, 1)  # [batch * length, hidden]
        router_logits = self.router(tokens)
        call.record.router(router_logits)
        ids, weights = route(router_logits, self.top_k, normalize=1.0)
        return self.experts(tokens, ids, weights).view_as(x)


class Block(nn.Module):
    """Attention, then experts, each on the normalised stream and added back to it."""

    def __init__(self, config: MixtralConfig) -> None:
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


class MixtralDecoder(Decoder[AttentionCache]):
    """Embedding, layers and the last norm."""

    FAMILY: ClassVar[str] = "mixtral"

    def __init__(self, config: MixtralConfig) -> None:
        super().__init__()
        self._config = config
        self.embed = empty_embedding(config.vocab_size, config.hidden_size, config.pad_id)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    @property
    def config(self) -> MixtralConfig:
        """The config that the decoder was built from."""
        return self._config

    def plan(self, inputs: Inputs, span: Span, state: State[AttentionCache] | None) -> AttentionCall:
        """Rotary tables and one mask for all layers."""
        config, cache = self._config, state.layers[0] if state is not None else None
        return plan_attention(inputs, span, cache, config.head_dim, config.rope.theta, config.sliding_window)

    def empty_layers(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> list[AttentionCache]:
        """A ring as wide as the sliding window where the config has one, else a cache that grows."""
        config = self._config
        shape = (batch_size, config.kv_heads, config.head_dim, dtype, device)
        if config.sliding_window is not None:
            return [WindowKVCache.empty(*shape, window=config.sliding_window) for _ in self.layers]
        return [KVCache.empty(*shape) for _ in self.layers]

    def reset_parameters(self) -> None:
        """Normal weights of the config's width, norms of one, the padding's embedding zero."""
        initialise_normal(self, self._config.initializer_range)


_LAYER, _OURS = "model.layers.{}.", "layers.{}."
_MOE = _LAYER + "block_sparse_moe."
_EXPERTS = _OURS + "mlp.experts."

NAMES = NameTable(
    Rename("model.embed_tokens.weight", "embed.weight"),
    *(Rename(f"{_LAYER}self_attn.{n}_proj.weight", f"{_OURS}attention.{n}.weight") for n in "qkvo"),
    Rename(_LAYER + "input_layernorm.weight", _OURS + "attention_norm.weight"),
    Rename(_LAYER + "post_attention_layernorm.weight", _OURS + "mlp_norm.weight"),
    Rename(_MOE + "gate.weight", _OURS + "mlp.router.weight"),
    Rename(_MOE + "experts.{}.w1.weight", _EXPERTS + "gate.{}"),
    Rename(_MOE + "experts.{}.w3.weight", _EXPERTS + "up.{}"),
    Rename(_MOE + "experts.{}.w2.weight", _EXPERTS + "down.{}"),
    Rename("model.norm.weight", "norm.weight"),
    # transformers 5 in memory, and files written by it without its conversion back
    Rename(_LAYER + "mlp.gate.weight", _OURS + "mlp.router.weight"),
    ExpertStack(_LAYER + "mlp.experts.gate_up_proj", (_EXPERTS + "gate.{}", _EXPERTS + "up.{}")),
    ExpertStack(_LAYER + "mlp.experts.down_proj", (_EXPERTS + "down.{}",)),
)

FAMILY = Family("mixtral", "Mixtral", MixtralConfig.parse, MixtralDecoder, lambda config: NAMES)
