"""The selective scan of Mamba with what stands before and behind it, in one launch (arXiv 2312.00752, algorithm 2).

A program takes 16 channels of one row through the whole prompt, and one warp is a program: a lane holds 8 of the 16
states of its channel in registers from step to step, in float32, and never needs another warp. The prompt comes in
tiles of 8 steps; asynchronous copies bring the next tile while this one is computed. Inside of a tile the time axis
lies within a lane, so the associative scan over it is the plain recurrence, one fused multiply-add a state and step,
in the order of the steps: where a prompt is split changes no bit of a state.

Counted for FalconMamba-7B (8,192 channels, 16 states), 2,048 tokens, one row:
- bytes: raw step sizes, x and gate are read once and y is written once, 134 MB in 16 bits, 28 us on 4.8 TB/s; B and
  C, 0.3 MB, come from the second-level cache for all programs but the first;
- operations: 268 million states, each with one exponential, two products, two multiply-adds and an addition or less.
  A multiprocessor makes 16 exponentials a clock, so 132 of them need 127,000 clocks or 72 us at 1.76 GHz: these, not
  bytes and not multiply-adds, are the limit. In the compiled loop one warp issues about 760 instructions for 8 steps,
  of which 80 exponentials and reciprocals take 640 clocks; 512 warps, one a scheduler, give 130 to 160 us.

Scanning pieces of the prompt side by side would need the exponentials of each piece twice, once for what it does to a
state and once for the answers. With 512 warps on 528 schedulers that time is not idle, so the walk is sequential.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmx.core.gpu.floats import LOG2_E, compose, silu, softplus

# Channels of a program, and states times steps of a tile: 64 states a lane, the most that its registers hold.
_CHANNELS, _TILE = 16, 128
_STEP_CHANNELS = 32


@triton.jit(do_not_specialize=["length"])
def _scan(
    raw, bias, x, gate, B, C, D, A, state, new_state, lengths, y,
    length, inner, states,
    raw_batch_stride, raw_stride, x_batch_stride, x_stride, gate_batch_stride, gate_stride,
    b_batch_stride, b_stride, c_batch_stride, c_stride,
    HAS_LENGTHS: tl.constexpr, STATES: tl.constexpr, CHANNELS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    n, step = tl.arange(0, STATES), tl.arange(0, STEPS)
    is_channel, is_state = channel < inner, n < states
    is_cell = is_state[:, None] & is_channel[None, :]
    cell = channel[None, :] * states + n[:, None]
    rates = tl.load(A + cell, is_cell, 0.0) * LOG2_E
    h = tl.load(state + row * inner * states + cell, is_cell, 0.0)  # [states, channels]
    offset = tl.load(bias + channel, is_channel, 0.0).to(tl.float32)
    skip = tl.load(D + channel, is_channel, 0.0).to(tl.float32)
    real = tl.full((), length, tl.int64)
    if HAS_LENGTHS:
        real = tl.load(lengths + row)
    raw += row * raw_batch_stride
    x += row * x_batch_stride
    gate += row * gate_batch_stride
    B += row * b_batch_stride
    C += row * c_batch_stride

    for start in tl.range(0, length, STEPS, num_stages=2):
        t = (start + step).to(tl.int64)[:, None]
        is_token = (t < real) & is_channel[None, :]
        is_column = (t < real) & is_state[None, :]
        delta = softplus(
            tl.load(raw + t * raw_stride + channel[None, :], is_token, 0.0).to(tl.float32) + offset[None, :]
        )
        delta = tl.where(t < real, delta, 0.0)  # [steps, channels]
        u = tl.load(x + t * x_stride + channel[None, :], is_token, 0.0).to(tl.float32)
        opening = tl.load(gate + t * gate_stride + channel[None, :], is_token, 0.0).to(tl.float32)
        column = tl.load(B + t * b_stride + n[None, :], is_column, 0.0).to(tl.float32)
        output = tl.load(C + t * c_stride + n[None, :], is_column, 0.0).to(tl.float32)

        decay = tl.exp2(delta[:, None, :] * rates[None, :, :])  # [steps, states, channels]
        drive = (delta * u)[:, None, :] * column[:, :, None]
        drive = tl.where(step[:, None, None] == 0, decay * h[None, :, :] + drive, drive)
        _, h_t = tl.associative_scan((decay, drive), 0, compose)
        h = tl.sum(tl.where(step[:, None, None] == STEPS - 1, h_t, 0.0), 0)
        answer = tl.sum(h_t * output[:, :, None], 1) + skip[None, :] * u
        place = (row * length + t) * inner + channel[None, :]
        tl.store(y + place, answer * silu(opening), (t < length) & is_channel[None, :])
    tl.store(new_state + row * inner * states + cell, h, is_cell)


@triton.jit
def _step(
    raw, bias, x, gate, B, C, D, A, state, new_state, y,
    inner, states, raw_stride, x_stride, gate_stride, b_stride, c_stride,
    STATES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    n = tl.arange(0, STATES)
    is_channel, is_state = channel < inner, n < states
    is_cell = is_channel[:, None] & is_state[None, :]
    cell = channel[:, None] * states + n[None, :]
    rates = tl.load(A + cell, is_cell, 0.0) * LOG2_E
    h = tl.load(state + row * inner * states + cell, is_cell, 0.0)  # [channels, states]
    offset = tl.load(bias + channel, is_channel, 0.0).to(tl.float32)
    delta = softplus(tl.load(raw + row * raw_stride + channel, is_channel, 0.0).to(tl.float32) + offset)
    u = tl.load(x + row * x_stride + channel, is_channel, 0.0).to(tl.float32)
    column = tl.load(B + row * b_stride + n, is_state, 0.0).to(tl.float32)
    output = tl.load(C + row * c_stride + n, is_state, 0.0).to(tl.float32)
    h = tl.exp2(delta[:, None] * rates) * h + (delta * u)[:, None] * column[None, :]
    tl.debug_barrier()  # the state may lie where the new one goes, and threads share what is small
    tl.store(new_state + row * inner * states + cell, h, is_cell)
    answer = tl.sum(h * output[None, :], 1) + tl.load(D + channel, is_channel, 0.0).to(tl.float32) * u
    opening = tl.load(gate + row * gate_stride + channel, is_channel, 0.0).to(tl.float32)
    tl.store(y + row * inner + channel, answer * silu(opening), is_channel)


def gated_scan(
    raw: Tensor,
    bias: Tensor,
    x: Tensor,
    gate: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    state: Tensor,
    lengths: Tensor | None,
    new_state: Tensor,
) -> Tensor:
    """`(selective_scan(x, softplus(raw + bias), A, B, C, state) + D x) silu(gate)`, in x's dtype, rounded once.

    Shapes as in `lmx.core.native.scan.gated_scan`, numbers of a token without gaps; A, state and new_state contiguous
    and float32. new_state may be the state itself. y is 0 behind a row's real tokens.
    """
    batch, length, inner = x.shape
    states = A.shape[1]
    padded = triton.next_power_of_2(states)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    weights = D, A, state, new_state
    if length == 1 and lengths is None:
        strides = (tensor.stride(0) for tensor in (raw, x, gate, B, C))
        grid = triton.cdiv(inner, _STEP_CHANNELS), batch
        sizes = {"STATES": padded, "CHANNELS": _STEP_CHANNELS}
        _step[grid](raw, bias, x, gate, B, C, *weights, y, inner, states, *strides, **sizes)
        return y
    # Widened once here instead of by every program: a seventh of the loop's instructions.
    B, C = B.float(), C.float()
    strides = (stride for tensor in (raw, x, gate, B, C) for stride in tensor.stride()[:2])
    sizes = {"HAS_LENGTHS": lengths is not None, "STATES": padded, "STEPS": max(1, min(16, _TILE // padded))}
    grid = triton.cdiv(inner, _CHANNELS), batch
    arguments = (raw, bias, x, gate, B, C, *weights, lengths, y, length, inner, states, *strides)
    _scan[grid](*arguments, **sizes, CHANNELS=_CHANNELS, num_warps=1)
    return y
