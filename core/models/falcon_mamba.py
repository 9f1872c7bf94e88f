"""FalconMamba (arXiv 2410.05355): Mamba layers alone, with B, C and dt normalised before the scan."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmx.core.call import Call, Inputs
from lmx.core.config import ConfigReader, ModelConfig, count_labels
from lmx.core.decoder import Decoder
from lmx.core.gpu import recurrent as gpu
from lmx.core.layers.activation import ACTIVATION_NAMES, ACTIVATIONS, SILU_NAMES
from lmx.core.layers.conv import causal_conv
from lmx.core.layers.derived import Derived
from lmx.core.layers.embedding import empty_embedding
from lmx.core.layers.initialise import initialise_normal
from lmx.core.layers.linear import Linear, linear
from lmx.core.layers.norm import RMSNorm, rms_normalise_parts
from lmx.core.layers.padding import Compaction
from lmx.core.layers.projection import affine, is_watched
from lmx.core.layers.residual import added
from lmx.core.layers.scan import selective_scan
from lmx.core.names import NameTable, Rename
from lmx.core.native.attention import Scale
from lmx.core.native.mixer import MambaWeights, can_step_mamba, mamba_step
from lmx.core.native.scan import can_scan, gated_scan
from lmx.core.recurrent_state import MambaState
from lmx.core.registry import Family
from lmx.core.state import Span, State


@dataclass(frozen=True)
class TimeStepInit:
    """How the step sizes of a fresh model are drawn (arXiv 2312.00752, section 3.6)."""

    scale: float
    smallest: float
    largest: float
    floor: float
    scheme: str


@dataclass(frozen=True)
class FalconMambaConfig(ModelConfig):
    """Widths, counts and switches of a FalconMamba model, by the names of its `config.json`."""

    intermediate_size: int
    state_size: int
    conv_kernel: int
    time_step_rank: int
    activation: str
    layer_norm_epsilon: float
    mixer_rms_eps: float
    use_bias: bool
    use_conv_bias: bool
    residual_in_fp32: bool
    rescale_prenorm_residual: bool
    time_step: TimeStepInit

    @classmethod
    def parse(cls, raw: Mapping[str, object]) -> "FalconMambaConfig":
        """Read a `config.json` in the spelling of transformers 4 or 5. Raises InputError naming the key."""
        read = ConfigReader(raw)
        vocab, hidden = read.integer("vocab_size"), read.integer("hidden_size")
        # The published file says expand 16 beside the true width; the width wins.
        expanded = read.integer("expand", 2) * hidden
        rank = math.ceil(hidden / 16)
        if raw.get("time_step_rank") != "auto":
            rank = read.integer("time_step_rank", rank)
        read.ignore("time_step_rank", "use_mambapy", "use_falcon_mambapy", "use_associative_scan", "layer_types")
        config = cls(
            vocab_size=vocab,
            hidden_size=hidden,
            layers=read.integer("num_hidden_layers", most=4096),
            initializer_range=read.number("initializer_range", 0.1),
            tie_word_embeddings=read.flag("tie_word_embeddings", True),
            bos_ids=read.token_ids("bos_token_id"),
            eos_ids=read.token_ids("eos_token_id"),
            pad_id=read.pad_id(vocab),
            labels=count_labels(raw),
            problem_type=read.problem_type(),
            classifier_dropout=read.number("classifier_dropout", 0.1, most=1.0),
            intermediate_size=read.integer("intermediate_size", expanded),
            state_size=read.integer("state_size", 16),
            conv_kernel=read.integer("conv_kernel", 4, most=1024),
            time_step_rank=rank,
            activation=read.choice("hidden_act", "silu", ACTIVATION_NAMES),
            layer_norm_epsilon=read.number("layer_norm_epsilon", 1e-5),
            mixer_rms_eps=read.number("mixer_rms_eps", 1e-6),
            use_bias=read.flag("use_bias", False),
            use_conv_bias=read.flag("use_conv_bias", True),
            residual_in_fp32=read.flag("residual_in_fp32", True),
            rescale_prenorm_residual=read.flag("rescale_prenorm_residual", False),
            time_step=TimeStepInit(
                scale=read.number("time_step_scale", 1.0),
                smallest=read.number("time_step_min", 0.001, least=1e-12),
                largest=read.number("time_step_max", 0.1, least=1e-12),
                floor=read.number("time_step_floor", 1e-4),
                scheme=read.choice("time_step_init_scheme", "random", ("random", "constant")),
            ),
        )
        read.finish()
        return config


def _rates(A_log: Tensor) -> Tensor:
    """A [inner, state] in float32: computing it is a fifth of a decode step beside the products, so it is kept."""
    return -torch.exp(A_log.float())


class Mixer(nn.Module):
    """The Mamba layer: a convolution, a selective scan, a gate (arXiv 2312.00752, figure 3)."""

    def __init__(self, config: FalconMambaConfig) -> None:
        super().__init__()
        inner, states, rank = config.intermediate_size, config.state_size, config.time_step_rank
        self.sizes = [rank, states, states]
        self.eps = config.mixer_rms_eps
        self.act = ACTIVATIONS[config.activation]
        self.in_proj = Linear(config.hidden_size, 2 * inner, bias=config.use_bias)
        self.conv_weight = nn.Parameter(torch.empty(inner, 1, config.conv_kernel))
        self.conv_bias = nn.Parameter(torch.empty(inner)) if config.use_conv_bias else None
        self.x_proj = Linear(inner, sum(self.sizes), bias=False)
        self.dt_proj = Linear(rank, inner)
        self.A_log = nn.Parameter(torch.empty(inner, states))
        self.D = nn.Parameter(torch.empty(inner))
        self.out_proj = Linear(inner, config.hidden_size, bias=config.use_bias)
        self._A = Derived(_rates)
        self._conv_has_silu = config.activation in SILU_NAMES

    def empty_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> MambaState:
        """Zeros: no inputs seen, nothing remembered."""
        inner, states = self.A_log.shape
        conv = torch.zeros(batch, inner, self.conv_weight.shape[2] - 1, dtype=dtype, device=device)
        return MambaState(conv, torch.zeros(batch, inner, states, device=device))

    def forward(self, x: Tensor, compaction: Compaction | None, state: MambaState | None) -> Tensor:
        """x: [batch, length, hidden] -> the same; the state is advanced in place."""
        x = self.in_proj(x)
        if compaction is not None:
            x = compaction.pack(x)
        x, gate = x.chunk(2, dim=-1)  # [batch, length, inner] each
        before = state if state is not None else self.empty_state(x.shape[0], x.dtype, x.device)
        lengths = None if compaction is None else compaction.lengths
        taps, silu = self.conv_weight.squeeze(1), self._conv_has_silu
        x, conv = causal_conv(x, taps, self.conv_bias, before.conv, lengths, silu=silu, overwrite=True)
        y, ssm = self._scan(x if silu else self.act(x), gate, compaction, before.hidden)
        if state is not None:
            state.keep(conv, ssm)
        return self.out_proj(y if compaction is None else compaction.unpack(y))

    def weights(self, norm: Scale) -> MambaWeights | None:
        """All of it for a kernel that takes the block with its norm in one; None where kernels cannot read it."""
        into, x, dt, out = (affine(layer) for layer in (self.in_proj, self.x_proj, self.dt_proj, self.out_proj))
        if into is None or x is None or dt is None or out is None or not self._conv_has_silu:
            return None
        taps = self.conv_weight.squeeze(1)
        return MambaWeights(norm, into, x, dt, out, taps, self.conv_bias, self._A.of(self.A_log), self.D, self.eps)

    def _scan(self, x: Tensor, gate: Tensor, compaction: Compaction | None, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The gated answer of the scan [batch, length, inner] and its new state.

        The gate is silu whatever `hidden_act` says, as in Mamba's kernels and transformers 5.
        """
        dt, B, C = rms_normalise_parts(self.x_proj(x), self.sizes, self.eps)
        raw, bias = linear(dt, self.dt_proj.weight), self.dt_proj.bias
        A = self._A.of(self.A_log)
        if can_scan(x, raw, bias, self.D, A, hidden):
            lengths = None if compaction is None else compaction.lengths
            hidden = hidden.contiguous()  # written to in place: it is the state's own
            return gated_scan(raw, bias, x, gate, A, B, C, self.D, hidden, lengths, hidden)
        if gpu.can_scan(x, raw, bias, self.D, A, hidden):
            lengths, oracle = None if compaction is None else compaction.lengths, partial(_in_torch, compaction)
            return gpu.gated_scan(raw, bias, x, gate, A, B, C, self.D, hidden, lengths, oracle)
        return _in_torch(compaction, raw, bias, x, gate, A, B, C, self.D, hidden)


def _in_torch(
    compaction: Compaction | None,
    raw: Tensor,
    bias: Tensor,
    x: Tensor,
    gate: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    hidden: Tensor,
) -> tuple[Tensor, Tensor]:
    delta = F.softplus(raw.float() + bias)
    if compaction is not None:
        delta = compaction.fill_tail(delta, 0.0)
    y, hidden = selective_scan(x, delta, A, B, C, hidden)
    return (y.addcmul_(x, D) * F.silu(gate)).to(x.dtype), hidden


class Block(nn.Module):
    """The mixer on the normalised stream, added back to it; the stream may be float32 in a 16-bit model."""

    def __init__(self, config: FalconMambaConfig) -> None:
        super().__init__()
        self.residual_in_fp32 = config.residual_in_fp32
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = Mixer(config)

    def forward(self, x: Tensor, call: Call, state: MambaState | None) -> Tensor:
        """x: [batch, length, hidden] -> the same."""
        if state is not None and call.compaction is None:
            stepped = self._step(x, state)
            if stepped is not None:
                return stepped
        answer = self.mixer(self.norm.of_rounded(x), call.compaction, state)
        return added(x, answer, torch.float32 if self.residual_in_fp32 else x.dtype)

    def _step(self, x: Tensor, state: MambaState) -> Tensor | None:
        """The same for one token a row in one call, or None where that kernel is not for these tensors."""
        if x.shape[1] != 1 or torch.compiler.is_compiling() or is_watched(self):
            return None
        weights = self.mixer.weights(self.norm.scale)
        if weights is None or not can_step_mamba(x, weights, state.conv, state.hidden):
            return None
        return mamba_step(x, weights, state.conv, state.hidden, torch.float32 if self.residual_in_fp32 else x.dtype)


class FalconMambaDecoder(Decoder[MambaState]):
    """Embedding, layers and the last norm."""

    FAMILY: ClassVar[str] = "falcon_mamba"

    def __init__(self, config: FalconMambaConfig) -> None:
        super().__init__()
        self._config = config
        self.embed = empty_embedding(config.vocab_size, config.hidden_size)
        self.blocks = [Block(config) for _ in range(config.layers)]
        self.layers = nn.ModuleList(self.blocks)
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)

    @property
    def config(self) -> FalconMambaConfig:
        """The config that the decoder was built from."""
        return self._config

    def plan(self, inputs: Inputs, span: Span, state: State[MambaState] | None) -> Call:
        """No positions, no mask: only padding has to be moved out of the way."""
        compaction = None if inputs.mask is None else Compaction.of(inputs.mask)
        return Call(span, span.positions(inputs.embeds.device), inputs.record, compaction=compaction)

    def empty_layers(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> list[MambaState]:
        """Zeros of a size that no length changes."""
        return [layer.mixer.empty_state(batch_size, dtype, device) for layer in self.blocks]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Normal projections; A = -(1 .. state), D = 1 and log-uniform step sizes, as Mamba begins."""
        initialise_normal(self, self._config.initializer_range)
        for layer in self.blocks:
            _initialise_mixer(layer.mixer, self._config)


def initialise_scan(mixer: Mixer, config: FalconMambaConfig) -> None:
    """What no normal distribution will do for: A = -(1 .. state), D = 1 and log-uniform step sizes."""
    rates = torch.arange(1, config.state_size + 1, dtype=torch.float32)
    mixer.A_log.copy_(rates.log().expand_as(mixer.A_log))
    mixer.D.fill_(1.0)
    step = config.time_step
    spread = config.time_step_rank**-0.5 * step.scale
    if step.scheme == "constant":
        mixer.dt_proj.weight.fill_(spread)
    else:
        mixer.dt_proj.weight.uniform_(-spread, spread)
    low, high = math.log(step.smallest), math.log(step.largest)
    dt = torch.exp(torch.rand(config.intermediate_size) * (high - low) + low).clamp(min=step.floor)
    mixer.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus


def _initialise_mixer(mixer: Mixer, config: FalconMambaConfig) -> None:
    initialise_scan(mixer, config)
    nn.init.kaiming_uniform_(mixer.conv_weight, a=math.sqrt(5))
    if mixer.conv_bias is not None:
        mixer.conv_bias.zero_()
    nn.init.kaiming_uniform_(mixer.out_proj.weight, a=math.sqrt(5))
    if config.rescale_prenorm_residual:
        mixer.out_proj.weight.div_(math.sqrt(config.layers))


_MIXER, _OURS = "backbone.layers.{}.mixer.", "layers.{}.mixer."

NAMES = NameTable(
    Rename("backbone.embeddings.weight", "embed.weight"),
    Rename("backbone.embedding.weight", "embed.weight"),  # mamba-ssm's
    Rename("backbone.layers.{}.norm.weight", "layers.{}.norm.weight"),
    *(
        Rename(f"{_MIXER}{name}", f"{_OURS}{name}")
        for name in (
            *("in_proj.weight", "in_proj.bias", "x_proj.weight", "dt_proj.weight", "dt_proj.bias"),
            *("A_log", "D", "out_proj.weight", "out_proj.bias"),
        )
    ),
    Rename(_MIXER + "conv1d.weight", _OURS + "conv_weight"),
    Rename(_MIXER + "conv1d.bias", _OURS + "conv_bias"),
    Rename("backbone.norm_f.weight", "norm.weight"),
    base_prefix="backbone.",
)

FAMILY = Family("falcon_mamba", "FalconMamba", FalconMambaConfig.parse, FalconMambaDecoder, lambda config: NAMES)
