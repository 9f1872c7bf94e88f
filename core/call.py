"""What a forward call means to every layer: its plan, and the record of what its caller asked for."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lmx.core.gpu.stream import can_keep_heads, keep_heads
from lmx.core.kv_cache import AttentionCache
from lmx.core.layers.attention import Implementation, Visibility, attend, clip
from lmx.core.layers.norm import RMSNorm
from lmx.core.layers.padding import Compaction
from lmx.core.layers.rope import Rotary, rotary_addresses, rotary_row, rotary_tables, rotate
from lmx.core.native.attention import AttentionStep, can_attend, can_step
from lmx.core.state import Span
from lmx.core.visibility import causal_visibility


@dataclass
class Record:
    """Collects the inner tensors that a caller asked for; what was not asked for stays None."""

    hidden_states: list[Tensor] | None = None
    attentions: list[Tensor] | None = None
    router_logits: list[Tensor] | None = None

    def hidden(self, x: Tensor) -> None:
        """Note the input of a layer, or the last norm's output."""
        if self.hidden_states is not None:
            self.hidden_states.append(x)

    def attention(self, weights: Tensor | None) -> None:
        """Note a layer's attention weights [batch, heads, queries, keys]."""
        if self.attentions is not None and weights is not None:
            self.attentions.append(weights)

    def router(self, logits: Tensor) -> None:
        """Note a layer's router logits [tokens, experts]."""
        if self.router_logits is not None:
            self.router_logits.append(logits)


@dataclass(frozen=True)
class Call:
    """What one forward call means for every layer, worked out once.

    positions: [batch or 1, length] for rotary embeddings and resets; compaction: where padding must be moved out of a
    recurrence's way.
    """

    span: Span
    positions: Tensor
    record: Record
    compaction: Compaction | None = None

    def to(self, device: torch.device) -> "Call":
        """The same for a layer on another device."""
        compaction = None if self.compaction is None else self.compaction.to(device)
        return replace(self, span=self.span.to(device), positions=self.positions.to(device), compaction=compaction)

    def follow(self, number: int) -> bool:
        """Become in place the call of one token of this number in every row; False where that cannot be done.

        Only of a call that was such a one itself, and not of a text's first token.
        """
        return True


@dataclass(frozen=True)
class Place:
    """What says where a token lies: a layer's cache, and of the rotary tables width and theta."""

    cache: AttentionCache
    rotary: tuple[int, float]


@dataclass(frozen=True)
class AttentionCall(Call):
    """The same for a family with attention layers. step: where the CPU's kernels serve it, one token a row."""

    implementation: Implementation = field(kw_only=True)
    rotary: Rotary = field(kw_only=True)
    visibility: Visibility = field(kw_only=True)
    step: AttentionStep | None = field(kw_only=True, default=None)
    place: "Place | None" = field(kw_only=True, default=None)

    def to(self, device: torch.device) -> "Call":
        """With its tables and mask, and without the kernels, which are those of the device that it came from."""
        cos, sin = self.rotary
        step = self.step if cos.device == device else None
        rotary, visibility = (cos.to(device), sin.to(device)), self.visibility.to(device)
        return super(AttentionCall, replace(self, rotary=rotary, visibility=visibility, step=step)).to(device)

    def follow(self, number: int) -> bool:
        """The angles, slots and counts of its step."""
        if self.step is None or self.place is None:
            return False
        self.step.follow(*rotary_addresses(number, *self.place.rotary), *self.place.cache.place(number))
        return True

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cache: AttentionCache | None,
        head_dim: int,
        *,
        norms: tuple[RMSNorm, RMSNorm] | None = None,
        limit: float | None = None,
        dropout: float = 0.0,
    ) -> Tensor:
        """Rotary attention of one layer over its own keys, or over those that its cache holds as well.

        query: [batch, length, heads * head_dim]; key, value: [batch, length, kv_heads * head_dim]. norms: of the whole
        query and the whole key, before they are split into heads. limit: all three are then kept within it.
        Returns the heads' answers side by side: [batch, length, heads * head_dim].
        """
        if self.step is not None and cache is not None:
            answer = self._attend_natively(self.step, query, key, value, cache, norms, limit)
            if answer is not None:
                return answer
        if norms is not None:
            query, key = norms[0](query), norms[1](key)
        at = self.span.at
        if at is not None and cache is not None and can_keep_heads(query, key, value, cache.keys, cache.values):
            query = keep_heads(query, key, value, self.rotary, at, cache.keys, cache.values, limit)
            key, value = cache.first(self.span.start + 1)
        else:
            query, key, value = (
                clip(states, limit).unflatten(-1, (-1, head_dim)).transpose(1, 2)  # [batch, heads, length, head_dim]
                for states in (query, key, value)
            )
            query, key = rotate(query, self.rotary), rotate(key, self.rotary)
            if cache is not None:
                key, value = cache.update(key, value, self.span)
        answer, weights = attend(query, key, value, self.visibility, self.implementation, dropout)
        self.record.attention(weights)
        return answer

    def _attend_natively(
        self,
        step: AttentionStep,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cache: AttentionCache,
        norms: tuple[RMSNorm, RMSNorm] | None,
        limit: float | None,
    ) -> Tensor | None:
        """The same in one call, or None where the kernel cannot read these tensors."""
        cache.make_room(self.span)
        scales = None if norms is None else (norms[0].scale, norms[1].scale)
        if not can_attend(query, key, value, cache.keys, cache.values, scales):
            return None
        return step.attend(query, key, value, cache.keys, cache.values, scales, limit)


@dataclass
class Inputs:
    """The arguments of one call, as a decoder takes them. embeds: [batch, length, hidden]; mask: bool or None."""

    embeds: Tensor
    mask: Tensor | None
    positions: Tensor | None
    implementation: Implementation
    record: Record = field(default_factory=Record)

    def to(self, device: torch.device) -> "Inputs":
        """The same on another device."""
        mask, positions = (None if each is None else each.to(device) for each in (self.mask, self.positions))
        return replace(self, embeds=self.embeds.to(device), mask=mask, positions=positions)


def plan_attention(
    inputs: Inputs, span: Span, cache: AttentionCache | None, rotary_width: int, theta: float, window: int | None = None
) -> AttentionCall:
    """The call of a family whose attention layers are all alike: one rotary table and one mask for all of them.

    cache: any layer's, before the call; None in a stateless pass. rotary_width: channels of a head that turn.
    """
    device = inputs.embeds.device
    positions = inputs.positions if inputs.positions is not None else span.positions(device)
    if cache is not None:
        visibility = cache.visibility(span)
    else:
        visibility = causal_visibility(span, window, device, inputs.positions if inputs.mask is None else None)
    step = place = None
    on_host = span.length == 1 and span.at is None
    alike = on_host and device.type == "cpu" and span.ordinals is None and inputs.positions is None
    if alike and cache is not None and not torch.compiler.is_compiling():
        rotary = rotary_row(span.start, rotary_width, theta)
        place = Place(cache, (rotary_width, theta))
    else:
        rotary = rotary_tables(positions, rotary_width, theta)
    if cache is not None and on_host and inputs.implementation == "sdpa" and can_step(rotary[0]):
        step = AttentionStep(*rotary, *cache.step(span))
    return AttentionCall(
        span,
        positions,
        inputs.record,
        implementation=inputs.implementation,
        rotary=rotary,
        visibility=visibility,
        step=step,
        place=place,
    )
