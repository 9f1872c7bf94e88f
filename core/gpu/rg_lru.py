"""The RG-LRU of Griffin with its gates, from their products on, in one launch (arXiv 2402.19427, section 2.4).

A program takes 16 channels of one row through the whole prompt in tiles of 64 steps. The gates of a tile are
independent of each other, so all its threads compute them; an associative scan over time then gives the states of the
tile, and the last one, in float32, is the first of the next. RecurrentGemma has few channels (2,560 or 4,096: 160 or
256 programs), and one lane a channel, as in the selective scan, would leave the card idle; here a step of the prompt
costs the time of a 64th of a tile. Where a prompt is split changes the order of the products, so a state within
rounding.

Counted for RecurrentGemma-2B (2,560 channels), 2,048 tokens, one row:
- bytes: x, the two products and the gate are read once and y is written once, 52 MB in 16 bits, 11 us on 4.8 TB/s;
- operations: 5 million channels and steps with 6 exponentials, roots or reciprocals each, 8 us. In the compiled loop a
  warp issues about 850 instructions for its quarter of a tile. 160 programs fill 132 multiprocessors with one or two
  each, and those with two need 55,000 clocks, 31 us at 1.76 GHz.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmx.core.gpu.floats import compose, decay_and_gain, sigmoid

# Steps and channels of a program: of a prompt, and of one token.
_PROMPT, _STEP = (64, 16), (1, 128)
# Of the step with the products of its gates: answers of a program, and inputs read at a time.
_COLUMNS, _INPUTS = 32, 64


@triton.jit(do_not_specialize=["length"])
def _recur(
    x, input_gate, recurrent_gate, rate, reset, state, gate, new_state, lengths, y,
    length, part, x_batch_stride, x_stride, gate_batch_stride, gate_stride, reset_batch_stride,
    HAS_GATE: tl.constexpr, HAS_LENGTHS: tl.constexpr, STEPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    head, row, heads = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64), tl.num_programs(1)
    within = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = within < part
    channel = head * part + within
    width = heads * part
    product = ((head * tl.num_programs(2) + row) * length) * part + within
    h = tl.load(state + row * width + channel, is_channel, 0.0)
    exponent = tl.load(rate + channel, is_channel, 0.0)
    step = tl.arange(0, STEPS)
    real = tl.full((), length, tl.int64)
    if HAS_LENGTHS:
        real = tl.load(lengths + row)
    x += row * x_batch_stride
    reset += row * reset_batch_stride
    if HAS_GATE:
        gate += row * gate_batch_stride

    for start in tl.range(0, length, STEPS, num_stages=2):
        t = (start + step).to(tl.int64)[:, None]
        is_real = t < real
        is_token = is_real & is_channel[None, :]
        opening = tl.load(input_gate + product[None, :] + t * part, is_token, 0.0).to(tl.float32)
        rate_opening = tl.load(recurrent_gate + product[None, :] + t * part, is_token, 0.0).to(tl.float32)
        u = tl.load(x + t * x_stride + channel[None, :], is_token, 0.0).to(tl.float32)
        begins = tl.load(reset + t, is_real, 0).to(tl.int1)
        decay, gain = decay_and_gain(sigmoid(rate_opening) * exponent[None, :])
        drive = u * sigmoid(opening)
        drive = tl.where(begins, drive, drive * gain)  # 0 behind a row's real tokens, since x is
        decay = tl.where(is_real, tl.where(begins, 0.0, decay), 1.0)
        drive = tl.where(step[:, None] == 0, decay * h[None, :] + drive, drive)
        if STEPS > 1:
            _, drive = tl.associative_scan((decay, drive), 0, compose)
        h = tl.sum(tl.where(step[:, None] == STEPS - 1, drive, 0.0), 0)
        if HAS_GATE:
            drive *= tl.load(gate + t * gate_stride + channel[None, :], is_token, 0.0).to(tl.float32)
        place = (row * length + t) * width + channel[None, :]
        tl.store(y + place, tl.where(is_real, drive, 0.0), (t < length) & is_channel[None, :])
    tl.debug_barrier()  # the state may lie where the new one goes, and threads share what is small
    tl.store(new_state + row * width + channel, h, is_channel)


@triton.jit
def _step_with_gates(
    x, input_weight, input_bias, recurrent_weight, recurrent_bias, rate, reset, state, gate, new_state, y,
    part, x_stride, gate_stride, reset_stride,
    HAS_GATE: tl.constexpr, COLUMNS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    head, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    within = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    is_channel = within < part
    channel = head * part + within
    width = tl.num_programs(1) * part
    x += row * x_stride
    opening = tl.zeros((INPUTS, COLUMNS), tl.float32)
    rate_opening = tl.zeros((INPUTS, COLUMNS), tl.float32)
    for start in range(0, part, INPUTS):
        i = start + tl.arange(0, INPUTS)
        u = tl.load(x + head * part + i, i < part, 0.0).to(tl.float32)
        place, is_weight = (
            (head * part + i)[:, None] * part + within[None, :],
            (i < part)[:, None] & is_channel[None, :],
        )
        opening += u[:, None] * tl.load(input_weight + place, is_weight, 0.0).to(tl.float32)
        rate_opening += u[:, None] * tl.load(recurrent_weight + place, is_weight, 0.0).to(tl.float32)
    opened = tl.sum(opening, 0) + tl.load(input_bias + channel, is_channel, 0.0).to(tl.float32)
    rate_opened = tl.sum(rate_opening, 0) + tl.load(recurrent_bias + channel, is_channel, 0.0).to(tl.float32)

    begins = tl.load(reset + row * reset_stride).to(tl.int1)
    decay, gain = decay_and_gain(sigmoid(rate_opened) * tl.load(rate + channel, is_channel, 0.0))
    drive = tl.load(x + channel, is_channel, 0.0).to(tl.float32) * sigmoid(opened)
    h = tl.load(state + row * width + channel, is_channel, 0.0)
    h = tl.where(begins, drive, decay * h + drive * gain)
    tl.debug_barrier()  # the state may lie where the new one goes, and threads share what is small
    tl.store(new_state + row * width + channel, h, is_channel)
    if HAS_GATE:
        h *= tl.load(gate + row * gate_stride + channel, is_channel, 0.0).to(tl.float32)
    tl.store(y + row * width + channel, h, is_channel)


def recur(
    x: Tensor,
    products: tuple[Tensor, Tensor],
    rate: Tensor,
    reset: Tensor,
    state: Tensor,
    gate: Tensor | None,
    lengths: Tensor | None,
    new_state: Tensor,
) -> Tensor:
    """`lmx.core.native.recurrence.recur` with the same shapes; x and gate with the numbers of a token without gaps.

    products, state and new_state are contiguous, the states float32; new_state may be the state itself.
    """
    batch, length, _ = x.shape
    heads, _, part = products[0].shape
    steps, channels = _STEP if length == 1 else _PROMPT
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tensors = x, *products, rate, reset, state, gate, new_state, lengths, y
    strides = *x.stride()[:2], *((0, 0) if gate is None else gate.stride()[:2]), _row_stride(reset)
    flags = {"HAS_GATE": gate is not None, "HAS_LENGTHS": lengths is not None}
    grid = triton.cdiv(part, channels), heads, batch
    _recur[grid](*tensors, length, part, *strides, **flags, STEPS=steps, CHANNELS=channels)
    return y


def recur_step(
    x: Tensor,
    input_gate: tuple[Tensor, Tensor],
    recurrent_gate: tuple[Tensor, Tensor],
    rate: Tensor,
    reset: Tensor,
    state: Tensor,
    gate: Tensor | None,
    new_state: Tensor,
) -> Tensor:
    """`recur` for one token a row, products included: each gate a weight [heads, part, part] and a bias [heads, part].

    A program reads its columns of both weights for one row: beyond a few rows a batched product is better.
    """
    heads, part, _ = input_gate[0].shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tensors = x, *input_gate, *recurrent_gate, rate, reset, state, gate, new_state, y
    strides = x.stride(0), 0 if gate is None else gate.stride(0), _row_stride(reset)
    grid = triton.cdiv(part, _COLUMNS), heads, x.shape[0]
    _step_with_gates[grid](*tensors, part, *strides, HAS_GATE=gate is not None, COLUMNS=_COLUMNS, INPUTS=_INPUTS)
    return y


def _row_stride(reset: Tensor) -> int:
    """Numbers from one row of reset [batch or 1, length] to the next: none if all share one."""
    return reset.stride(0) if len(reset) > 1 else 0
