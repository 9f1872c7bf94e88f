"""The short causal convolution before a recurrence: one filter a channel; its state is the inputs it still needs."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lmx.core.gpu import recurrent as gpu
from lmx.core.native.scan import can_convolve, convolve

# Elements that are convolved at a time, 1 MiB in float32 (32 steps of FalconMamba-7B), so that every tap but the first
# finds its inputs in the cache.
BLOCK_ELEMENTS = 1 << 18


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    lengths: Tensor | None = None,
    *,
    silu: bool = False,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor]:
    """y_t = bias + sum_j weight[:, j] x_{t - kernel + 1 + j}; inputs before the first come from `state`.

    x [batch, length, channels], weight [channels, kernel], bias [channels] or None,
    state [batch, channels, kernel - 1]: the last inputs, oldest first (zeros at the start of a text).
    Returns y [batch, length, channels] in x's dtype and the new state in the old one's. Sums are made in float32 at
    least, whatever the dtype of x. A length of 0 is a no-op.

    `lengths` [batch]: how many of each row's inputs, counted from the front, are real (see `Compaction`). The state
    then holds the last real inputs of each row, and y behind them means nothing.

    `silu`: y goes through silu. `overwrite`: the old state is not needed any more, and the new one may take its place.
    """
    if x.shape[1] == 0:
        return x, state
    if lengths is None and can_convolve(x, weight, bias, state):
        return convolve(x, weight, bias, state, silu, overwrite)
    if gpu.can_convolve(x, weight, bias, state):
        return gpu.convolve(x, weight, bias, state, lengths, silu, overwrite)
    y, recent = _in_torch(x, weight, bias, state, lengths)
    return F.silu(y) if silu else y, recent


def _in_torch(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    if x.shape[1] == 1 and lengths is None:
        return _step(x, weight, bias, state)
    recent = _last_inputs(x, state) if lengths is None else _last_real_inputs(x, state, lengths)
    return _convolve(x, weight, bias, state), recent


def _step(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """The convolution of one token, in the few calls that a step of generation has time for."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    window = torch.cat((state, x.transpose(1, 2)), 2)  # [batch, channels, kernel]
    oldest, *columns = window.to(dtype).unbind(2)
    tap, *taps = weight.to(dtype).unbind(1)
    y = oldest * tap if bias is None else torch.addcmul(bias.to(dtype), oldest, tap)
    for column, tap in zip(columns, taps, strict=True):
        y = y.addcmul_(column, tap)
    return y.to(x.dtype)[:, None], window[:, :, 1:].to(state.dtype).contiguous()


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor) -> Tensor:
    """Shifted multiply-adds with channels last, which took a tenth of the time of torch's depthwise conv1d on a CPU."""
    (batch, length, channels), reach = x.shape, state.shape[2]
    dtype = torch.promote_types(x.dtype, torch.float32)
    taps = weight.to(dtype).t().contiguous()  # [kernel, channels]
    offset = None if bias is None else bias.to(dtype)
    steps = max(1, BLOCK_ELEMENTS // max(1, batch * channels))
    if steps >= length or _differentiable(x, weight, bias, state):  # autograd wants one piece, and keeps it anyway
        return _taps(_window(x, state, -reach, length), taps, offset).to(x.dtype)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    for start in range(0, length, steps):
        stop = min(start + steps, length)
        y[:, start:stop] = _taps(_window(x, state, start - reach, stop), taps, offset)
    return y


def _differentiable(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _window(x: Tensor, state: Tensor, start: int, stop: int) -> Tensor:
    """Inputs start to stop, [batch, stop - start, channels]; those before 0 come from the state."""
    if start >= 0:
        return x[:, start:stop]
    return torch.cat((state.transpose(1, 2)[:, start:], x[:, :stop]), 1)


def _taps(window: Tensor, taps: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve window [batch, kernel - 1 + steps, channels] with taps [kernel, channels]."""
    kernel = taps.shape[0]
    steps = window.shape[1] - kernel + 1
    window = window.to(taps.dtype)
    oldest = window[:, :steps]
    y = oldest * taps[0] if bias is None else torch.addcmul(bias, oldest, taps[0])
    for j in range(1, kernel):
        y = y.addcmul_(window[:, j : j + steps], taps[j])
    return y


def _last_inputs(x: Tensor, state: Tensor) -> Tensor:
    reach = state.shape[2]
    fresh = x[:, max(0, x.shape[1] - reach) :].transpose(1, 2) if reach else x[:, :0].transpose(1, 2)
    kept = state[..., fresh.shape[2] :]
    return torch.cat((kept, fresh.to(state.dtype)), 2)


def _last_real_inputs(x: Tensor, state: Tensor, lengths: Tensor) -> Tensor:
    """Gather, for each row, the `kernel - 1` inputs that end at its length; negative positions lie in the state."""
    reach, last = state.shape[2], x.shape[1] - 1
    if reach == 0:
        return state
    at = lengths[:, None] + torch.arange(-reach, 0, device=x.device)  # [batch, kernel - 1]
    at = at[:, None].expand(-1, x.shape[2], -1)  # [batch, channels, kernel - 1]
    fresh = x.transpose(1, 2).gather(2, at.clamp(0, last)).to(state.dtype)
    kept = state.gather(2, (at + reach).clamp(0, reach - 1))
    return torch.where(at < 0, kept, fresh)
