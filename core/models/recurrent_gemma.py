"""RecurrentGemma (arXiv 2404.07839), of the Griffin architecture (arXiv 2402.19427): two layers of a gated linear
recurrence, the RG-LRU, to one of local attention, and a gated MLP after each.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from lmx.core.call import AttentionCall, Call, Inputs, plan_attention
from lmx.core.config import ConfigReader, ModelConfig, RopeConfig, count_labels
from lmx.core.decoder import Decoder
from lmx.core.kv_cache import WindowKVCache
from lmx.core.layers.activation import ACTIVATION_NAMES, ACTIVATIONS
from lmx.core.layers.conv import causal_conv
from lmx.core.layers.embedding import empty_embedding
from lmx.core.layers.fused import affines, step_attention
from lmx.core.layers.initialise import initialise_normal
from lmx.core.layers.linear import Linear
from lmx.core.layers.norm import OffsetRMSNorm
from lmx.core.layers.padding import Compaction
from lmx.core.layers.projection import affine, is_watched
from lmx.core.layers.residual import added
from lmx.core.layers.rg_lru import RGLRU
from lmx.core.names import NameTable, Rename
from lmx.core.native.attention import Scale
from lmx.core.native.block import AttentionWeights
from lmx.core.native.griffin import (
    GriffinWeights,
    MlpWeights,
    can_step_griffin,
    can_step_mlp,
    griffin_step,
    mlp_step,
)
from lmx.core.recurrent_state import GriffinState
from lmx.core.registry import Family
from lmx.core.state import Span, State

LayerMemory = GriffinState | WindowKVCache


@dataclass(frozen=True)
class RecurrentGemmaConfig(ModelConfig):
    """Widths, counts and switches of a RecurrentGemma model; `mlp_width` is half of the file's intermediate_size."""

    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    lru_width: int
    conv_width: int
    window: int
    block_types: tuple[str, ...]
    activation: str
    rms_norm_eps: float
    rope: RopeConfig
    soft_cap: float | None
    scale_embeddings: bool
    attention_bias: bool
    attention_dropout: float
    w_init_variance_scale: float
    final_w_init_variance_scale: float

    @classmethod
    def parse(cls, raw: Mapping[str, object]) -> "RecurrentGemmaConfig":
        """Read a `config.json` in the spelling of transformers 4 or 5. Raises InputError naming the key."""
        read = ConfigReader(raw)
        vocab = read.integer("vocab_size")
        hidden, heads = read.integer("hidden_size"), read.integer("num_attention_heads", most=65536)
        layers, conv_width = read.integer("num_hidden_layers", most=4096), read.integer("conv1d_width", 4, most=1024)
        variance = read.number("w_init_variance_scale", 0.01)
        cycle = read.names("_block_types") or read.names("block_types") or ("recurrent", "recurrent", "attention")
        if not set(cycle) <= {"recurrent", "attention"}:
            raise read.error("block_types", f"has {sorted(set(cycle))}; supported: recurrent, attention")
        read.ignore("_block_types", "block_types", "layers_block_type", "layer_types", "initializer_range")
        config = cls(
            vocab_size=vocab,
            hidden_size=hidden,
            layers=layers,
            # What transformers gives every matrix that has no rule of its own.
            initializer_range=math.sqrt(variance / conv_width),
            tie_word_embeddings=read.flag("tie_word_embeddings", True),
            bos_ids=read.token_ids("bos_token_id"),
            eos_ids=read.token_ids("eos_token_id"),
            pad_id=read.pad_id(vocab),
            labels=count_labels(raw),
            problem_type=read.problem_type(),
            classifier_dropout=read.number("classifier_dropout", 0.1, most=1.0),
            heads=heads,
            kv_heads=read.integer("num_key_value_heads", heads),
            head_dim=read.integer("head_dim", hidden // heads),
            mlp_width=read.integer("intermediate_size", 3 * hidden) // 2,
            lru_width=read.integer("lru_width", hidden),
            conv_width=conv_width,
            window=read.integer("attention_window_size", 2048),
            block_types=tuple(cycle[i % len(cycle)] for i in range(layers)),
            activation=read.choice("hidden_activation", "gelu_pytorch_tanh", ACTIVATION_NAMES),
            rms_norm_eps=read.number("rms_norm_eps", 1e-6),
            rope=RopeConfig.read(read, 10000.0, default_fraction=0.5),
            soft_cap=read.number("logits_soft_cap", 30.0, least=1e-6) if raw.get("logits_soft_cap", 1) else None,
            scale_embeddings=read.flag("embeddings_scale_by_sqrt_dim", True),
            attention_bias=read.flag("attention_bias", False),
            attention_dropout=read.number("attention_dropout", 0.0, most=1.0),
            w_init_variance_scale=variance,
            final_w_init_variance_scale=read.number("final_w_init_variance_scale", 2.0 / layers),
        )
        read.ignore("logits_soft_cap")
        if config.heads % config.kv_heads:
            raise read.error("num_key_value_heads", f"({config.kv_heads}) does not divide {heads} heads")
        if config.rotary_width + config.rotary_width % 2 > config.head_dim:
            raise read.error("head_dim", f"({config.head_dim}) must be even: rotary embedding turns channels in pairs")
        if config.lru_width % config.heads:
            raise read.error("lru_width", f"({config.lru_width}) is not divisible by {heads} heads")
        read.finish()
        return config

    @property
    def rotary_width(self) -> int:
        """How many channels of each head turn with the position."""
        return int(self.head_dim * self.rope.fraction)

    @property
    def attention_width(self) -> int:
        """Channels of all query heads of a layer together."""
        return self.heads * self.head_dim

    @property
    def logits_soft_cap(self) -> float | None:
        """Logits are squashed to (-cap, cap)."""
        return self.soft_cap


@dataclass(frozen=True)
class GriffinCall(AttentionCall):
    """begins: [batch or 1, length] bool, True where a text begins and the recurrences forget what was before."""

    begins: Tensor = field(kw_only=True)

    @classmethod
    def of(cls, call: AttentionCall, compaction: Compaction | None) -> "GriffinCall":
        """The same call with what the recurrences must know."""
        shared = {entry.name: getattr(call, entry.name) for entry in fields(call)}
        return cls(**{**shared, "compaction": compaction}, begins=call.positions == 0)

    def to(self, device: torch.device) -> Call:
        """With where texts begin."""
        moved = replace(self, begins=self.begins.to(device))
        return super(GriffinCall, moved).to(device)


class LocalAttention(nn.Module):
    """Attention with rotary positions on part of each head, over the last window of tokens."""

    def __init__(self, config: RecurrentGemmaConfig) -> None:
        super().__init__()
        self.head_dim, self.dropout = config.head_dim, config.attention_dropout
        wide, narrow = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q = Linear(config.hidden_size, wide, bias=config.attention_bias)
        self.k = Linear(config.hidden_size, narrow, bias=config.attention_bias)
        self.v = Linear(config.hidden_size, narrow, bias=config.attention_bias)
        self.o = Linear(wide, config.hidden_size)

    def weights(self, norm: Scale) -> AttentionWeights | None:
        """All of it for a kernel that takes it with its norm in one; None where kernels cannot read it."""
        projections = affines(self.q, self.k, self.v, self.o)
        if projections is None:
            return None
        q, k, v, o = projections
        return AttentionWeights(norm, q, k, v, o, offset=True)

    def forward(self, x: Tensor, call: AttentionCall, cache: WindowKVCache | None) -> Tensor:
        """x: [batch, length, hidden] -> the same."""
        dropout = self.dropout if self.training else 0.0
        return self.o(call.attend(self.q(x), self.k(x), self.v(x), cache, self.head_dim, dropout=dropout))


class RecurrentBlock(nn.Module):
    """A convolution and the RG-LRU on one branch, a gate on the other (arXiv 2402.19427, figure 2c)."""

    def __init__(self, config: RecurrentGemmaConfig) -> None:
        super().__init__()
        self.activation, self.act = config.activation, ACTIVATIONS[config.activation]
        self.linear_y = Linear(config.hidden_size, config.lru_width)
        self.linear_x = Linear(config.hidden_size, config.lru_width)
        self.conv_weight = nn.Parameter(torch.empty(config.lru_width, 1, config.conv_width))
        self.conv_bias = nn.Parameter(torch.empty(config.lru_width))
        self.rg_lru = RGLRU(config.lru_width, config.heads)
        self.linear_out = Linear(config.lru_width, config.hidden_size)

    def empty_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> GriffinState:
        """Zeros: no inputs seen, nothing remembered."""
        width, _, kernel = self.conv_weight.shape
        conv = torch.zeros(batch, width, kernel - 1, dtype=dtype, device=device)
        return GriffinState(conv, torch.zeros(batch, width, device=device))

    def weights(self, norm: Scale, mlp: MlpWeights) -> GriffinWeights | None:
        """All of it for a kernel that takes norm, block and MLP in one; None where kernels cannot read it."""
        y, x, out = affine(self.linear_y), affine(self.linear_x), affine(self.linear_out)
        if y is None or x is None or out is None:
            return None
        conv = self.conv_weight.squeeze(1), self.conv_bias
        return GriffinWeights(norm, y, x, out, *conv, *self.rg_lru.gates, self.rg_lru.rate, self.activation, mlp)

    def forward(self, x: Tensor, call: GriffinCall, state: GriffinState | None) -> Tensor:
        """x: [batch, length, hidden] -> the same; the state is advanced in place."""
        gate, branch = self.act(self.linear_y(x)), self.linear_x(x)
        before = state if state is not None else self.empty_state(x.shape[0], x.dtype, x.device)
        reset, compaction, lengths = call.begins, call.compaction, None
        if compaction is not None:
            lengths = compaction.lengths
            branch = compaction.pack(branch)
            reset = compaction.pack(reset.expand(x.shape[:2]))
        taps = self.conv_weight.squeeze(1)
        branch, conv = causal_conv(branch, taps, self.conv_bias, before.conv, lengths, overwrite=True)
        packed = None if compaction is not None else gate
        branch, lru = self.rg_lru(branch, packed, reset, compaction, before.hidden, overwrite=True)
        if state is not None:
            state.keep(conv, lru)
        return self.linear_out(branch if compaction is None else gate * compaction.unpack(branch))


class GatedMLP(nn.Module):
    """`down(act(gate(x)) * up(x))`, with biases."""

    def __init__(self, config: RecurrentGemmaConfig) -> None:
        super().__init__()
        self.activation, self.act = config.activation, ACTIVATIONS[config.activation]
        self.gate = Linear(config.hidden_size, config.mlp_width)
        self.up = Linear(config.hidden_size, config.mlp_width)
        self.down = Linear(config.mlp_width, config.hidden_size)

    def weights(self, norm: Scale) -> MlpWeights | None:
        """All of it for a kernel that takes it with its norm in one; None where kernels cannot read it."""
        gate, up, down = affine(self.gate), affine(self.up), affine(self.down)
        if gate is None or up is None or down is None:
            return None
        return MlpWeights(norm, gate, up, down, self.activation)

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, length, hidden] -> the same."""
        return self.down(self.act(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """A temporal block, then an MLP, each on the normalised stream and added back to it."""

    def __init__(self, config: RecurrentGemmaConfig, block_type: str) -> None:
        super().__init__()
        self.temporal_norm = OffsetRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.temporal: LocalAttention | RecurrentBlock = (
            LocalAttention(config) if block_type == "attention" else RecurrentBlock(config)
        )
        self.mlp_norm = OffsetRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config)

    def forward(self, x: Tensor, call: GriffinCall, state: LayerMemory | None) -> Tensor:
        """x: [batch, length, hidden] -> the same."""
        mlp = self._weights_of_step(x, call, state)
        if mlp is not None and isinstance(self.temporal, RecurrentBlock) and isinstance(state, GriffinState):
            stepped = self._step(x, call, state, self.temporal, mlp)
            if stepped is not None:
                return stepped
        attended = self._attend(x, call, state)
        x = added(x, self.temporal(self.temporal_norm(x), call, state)) if attended is None else attended
        return added(x, self.mlp(self.mlp_norm(x))) if mlp is None else mlp_step(x, mlp)

    def _attend(self, x: Tensor, call: GriffinCall, state: LayerMemory | None) -> Tensor | None:
        """An attention layer's step with its norm in one call, or None where that kernel is not for these tensors."""
        temporal = self.temporal
        if not isinstance(temporal, LocalAttention) or not isinstance(state, WindowKVCache):
            return None
        return step_attention(self, x, call, state, lambda: temporal.weights(self.temporal_norm.scale))

    def _weights_of_step(self, x: Tensor, call: GriffinCall, state: LayerMemory | None) -> MlpWeights | None:
        """Those of the MLP, where this is a step of one token a row that the kernels for whole blocks may take."""
        if state is None or x.shape[1] != 1 or call.compaction is not None:
            return None
        if torch.compiler.is_compiling() or is_watched(self):
            return None
        weights = self.mlp.weights(self.mlp_norm.scale)
        return weights if weights is not None and can_step_mlp(x, weights) else None

    def _step(
        self, x: Tensor, call: GriffinCall, state: GriffinState, temporal: RecurrentBlock, mlp: MlpWeights
    ) -> Tensor | None:
        """The whole block in one call, or None where that kernel is not for these tensors."""
        weights = temporal.weights(self.temporal_norm.scale, mlp)
        if weights is None or not can_step_griffin(x, weights, state.conv, state.hidden):
            return None
        return griffin_step(x, weights, state.conv, state.hidden, call.begins)


class RecurrentGemmaDecoder(Decoder[LayerMemory]):
    """Embedding, layers and the last norm."""

    FAMILY: ClassVar[str] = "recurrent_gemma"

    def __init__(self, config: RecurrentGemmaConfig) -> None:
        super().__init__()
        self._config = config
        self.embed = empty_embedding(config.vocab_size, config.hidden_size, config.pad_id)
        self.blocks = [Block(config, block_type) for block_type in config.block_types]
        self.layers = nn.ModuleList(self.blocks)
        self.norm = OffsetRMSNorm(config.hidden_size, config.rms_norm_eps)
        # Rounded to bfloat16 in models of any dtype, as it was in training.
        scale = torch.tensor(math.sqrt(config.hidden_size), dtype=torch.bfloat16, device="cpu")
        self.embed_scale = float(scale) if config.scale_embeddings else None

    @property
    def config(self) -> RecurrentGemmaConfig:
        """The config that the decoder was built from."""
        return self._config

    def plan(self, inputs: Inputs, span: Span, state: State[LayerMemory] | None) -> GriffinCall:
        """Rotary tables and one mask for the attention layers, and padding out of the recurrences' way."""
        config, layers = self._config, [] if state is None else state.layers
        cache = next((layer for layer in layers if isinstance(layer, WindowKVCache)), None)
        call = plan_attention(inputs, span, cache, config.rotary_width, config.rope.theta, config.window)
        return GriffinCall.of(call, None if inputs.mask is None else Compaction.of(inputs.mask))

    def empty_layers(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> list[LayerMemory]:
        """A ring for each attention layer, zeros for each recurrence: none of them grows."""
        config = self._config
        shape = (batch_size, config.kv_heads, config.head_dim, dtype, device)
        return [
            layer.temporal.empty_state(batch_size, dtype, device)
            if isinstance(layer.temporal, RecurrentBlock)
            else WindowKVCache.empty(*shape, window=config.window)
            for layer in self.blocks
        ]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As the Griffin paper begins: small gates, decays between 0.9 and 0.999 (section 2.4)."""
        config = self._config
        initialise_normal(self, config.initializer_range)
        into = math.sqrt(1.0 / config.hidden_size)
        final = config.final_w_init_variance_scale
        for layer in self.blocks:
            temporal = layer.temporal
            if isinstance(temporal, LocalAttention):
                for projection in (temporal.q, temporal.k, temporal.v):
                    projection.weight.normal_(0.0, into)
                temporal.o.weight.normal_(0.0, math.sqrt(final / config.hidden_size))
                continue
            temporal.linear_x.weight.normal_(0.0, into)
            temporal.linear_y.weight.normal_(0.0, into)
            temporal.linear_out.weight.normal_(0.0, math.sqrt(final / config.lru_width))
            temporal.conv_weight.normal_(0.0, config.initializer_range)
            temporal.conv_bias.zero_()
            temporal.rg_lru.reset_parameters(config.w_init_variance_scale)


_LAYER, _OURS = "model.layers.{}.", "layers.{}."
_TEMPORAL = _LAYER + "temporal_block."

NAMES = NameTable(
    Rename("model.embed_tokens.weight", "embed.weight"),
    Rename(_LAYER + "temporal_pre_norm.weight", _OURS + "temporal_norm.weight"),
    *(
        Rename(f"{_TEMPORAL}{name}_proj.{kind}", f"{_OURS}temporal.{name}.{kind}")
        for name in "qkvo"
        for kind in ("weight", "bias")
    ),
    *(
        Rename(f"{_TEMPORAL}{name}.{kind}", f"{_OURS}temporal.{name}.{kind}")
        for name in ("linear_x", "linear_y", "linear_out")
        for kind in ("weight", "bias")
    ),
    *(Rename(f"{_TEMPORAL}conv_1d.{kind}", f"{_OURS}temporal.conv_{kind}") for kind in ("weight", "bias")),
    *(
        Rename(f"{_TEMPORAL}rg_lru.{name}", f"{_OURS}temporal.rg_lru.{name}")
        for name in (
            *("recurrent_param", "input_gate_weight", "input_gate_bias"),
            *("recurrent_gate_weight", "recurrent_gate_bias"),
        )
    ),
    Rename(_LAYER + "channel_pre_norm.weight", _OURS + "mlp_norm.weight"),
    *(
        Rename(f"{_LAYER}mlp_block.{name}_proj.{kind}", f"{_OURS}mlp.{name}.{kind}")
        for name in ("gate", "up", "down")
        for kind in ("weight", "bias")
    ),
    Rename("model.final_norm.weight", "norm.weight"),
)

FAMILY = Family(
    "recurrent_gemma", "RecurrentGemma", RecurrentGemmaConfig.parse, RecurrentGemmaDecoder, lambda config: NAMES
)
