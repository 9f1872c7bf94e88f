"""Rotary position embedding (arXiv 2104.09864), in the half-split layout of the hub's checkpoints."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

Rotary = tuple[Tensor, Tensor]


def _frequencies(width: int, theta: float, device: torch.device) -> Tensor:
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
    return 1.0 / theta**exponents  # [width / 2]


_kept_frequencies = lru_cache(maxsize=64)(_frequencies)


def rotary_tables(positions: Tensor, width: int, theta: float) -> Rotary:
    """Cosines and sines of the angles `position * theta^(-2i / width)`.

    positions: [batch, length] -> two tensors [batch, 1, length, width / 2] in float32 (the 1 is the heads').
    """
    frequencies = _frequencies if torch.compiler.is_compiling() else _kept_frequencies
    angles = positions[:, None, :, None].float() * frequencies(width, theta, positions.device)
    return angles.cos(), angles.sin()


_BLOCK = 256


@dataclass(frozen=True)
class _Block:
    """The tables of some positions, where they lie, and the bytes from each position to the next."""

    tables: Rotary
    places: tuple[int, int]
    row_bytes: int


@lru_cache(maxsize=64)
def _block(number: int, width: int, theta: float) -> _Block:
    positions = torch.arange(number * _BLOCK, (number + 1) * _BLOCK, device="cpu")[None]
    cos, sin = rotary_tables(positions, width, theta)
    return _Block((cos, sin), (cos.data_ptr(), sin.data_ptr()), cos.shape[-1] * cos.element_size())


def rotary_row(position: int, width: int, theta: float) -> Rotary:
    """`rotary_tables` of one position on the CPU, [1, 1, 1, width / 2]: views of tables kept for 256 at a time."""
    block, row = divmod(position, _BLOCK)
    cos, sin = _block(block, width, theta).tables
    return cos[:, :, row : row + 1], sin[:, :, row : row + 1]


def rotary_addresses(position: int, width: int, theta: float) -> tuple[int, int]:
    """Where the numbers of `rotary_row` lie, as long as the 64 blocks used last hold them."""
    number, row = divmod(position, _BLOCK)
    block = _block(number, width, theta)
    cos, sin = block.places
    return cos + row * block.row_bytes, sin + row * block.row_bytes


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Turn the first `2 * table width` channels of every head, pair (i, i + half), and leave the others.

    x: [batch, heads, length, head_dim] -> the same shape and dtype; the product is taken in float32.
    """
    cos, sin = rotary
    half = cos.shape[-1]
    left, right, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    turned = torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1).to(x.dtype)
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned
