"""The two orders of the channels that rotary embedding turns together: neighbours, or half a head apart (the hub's)."""

from torch import Tensor


def unpair_channels(x: Tensor, heads: int) -> Tensor:
    """Rows [heads * width, in] of neighbours that turn together to rows half a head apart."""
    pairs = x.view(heads, -1, 2, x.shape[1])  # [heads, pairs, 2, in]
    return pairs.transpose(1, 2).reshape(x.shape)


def pair_channels(x: Tensor, heads: int) -> Tensor:
    """`unpair_channels` the other way round."""
    halves = x.view(heads, 2, -1, x.shape[1])  # [heads, 2, pairs, in]
    return halves.transpose(1, 2).reshape(x.shape)
