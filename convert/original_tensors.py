"""From the numbers of a maker's tensor to the hub's, and back where there is a way back."""

from torch import Tensor

from lmx.convert.original_names import Change, Part
from lmx.convert.rotary import pair_channels, unpair_channels


def read_part(stored: Tensor, part: Part) -> Tensor:
    """The hub's tensor in one of the file's; a view of it, but for rotary projections."""
    x = stored if part.rows is None else stored.reshape(-1, stored.shape[-1])[part.rows]
    match part.change:
        case Change.TRANSPOSED:
            return x.t()
        case Change.PAIRS:
            return unpair_channels(x, part.heads)
        case Change.CONVOLUTION:
            return x.t().unsqueeze(1)
        case Change.FLAT:
            return x.reshape(-1)
        case _:
            return x


def restore(x: Tensor, change: Change, heads: int) -> Tensor:
    """The file's tensor of a hub's one, for a row without several. Raises ValueError for what is never written."""
    match change:
        case Change.PAIRS:
            return pair_channels(x, heads)
        case Change.NOTHING:
            return x
        case _:
            raise ValueError(f"{change} is never written")
