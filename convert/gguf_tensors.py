"""The numbers of a GGUF's tensors: read from its bytes, and llama.cpp's changes undone or made."""

from typing import TYPE_CHECKING

from torch import Tensor

from lmx.convert.gguf_names import Change
from lmx.convert.gguf_types import dequantize
from lmx.convert.rotary import pair_channels, unpair_channels
from lmx.core.errors import InputError
from lmx.core.mapped import FileMap, torch_dtypes

if TYPE_CHECKING:
    from lmx.convert.gguf_file import Part


def read_part(data: FileMap, part: "Part", dtype: str, what: str) -> Tensor:
    """A weight as the hub has it. dtype: of what is made of blocks; what: names it in errors.

    Raises InputError for numbers that cannot be.
    """
    layout = part.layout
    if layout.plain is not None:
        stored = data.view(layout.plain, part.shape, part.offset, part.nbytes)
    else:
        blocks = data.view("U8", (part.nbytes,), part.offset, part.nbytes)
        stored = dequantize(layout, blocks, torch_dtypes()[dtype]).view(part.shape)
    return undo(stored, part.change, part.heads, what)


def undo(x: Tensor, change: Change, heads: int, what: str) -> Tensor:
    """From a GGUF's numbers to the hub's."""
    match change:
        case Change.QUERY_PAIRS | Change.KEY_PAIRS:
            return unpair_channels(x, heads)
        case Change.DECAY:
            if not (x < 0).all():
                raise InputError(
                    f"{what} is no decay: a rate is not negative", "the file is damaged: download it again"
                )
            return x.float().neg().log().to(x.dtype)
        case Change.CONVOLUTION:
            return x.unsqueeze(1)
        case _:
            return x


def apply(x: Tensor, change: Change, heads: int) -> Tensor:
    """From the hub's numbers to a GGUF's."""
    match change:
        case Change.QUERY_PAIRS | Change.KEY_PAIRS:
            return pair_channels(x, heads)
        case Change.DECAY:
            return x.float().exp().neg()
        case Change.CONVOLUTION:
            return x.squeeze(1)
        case _:
            return x
