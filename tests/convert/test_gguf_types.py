"""Blocks, against the `gguf` package bit for bit."""

import numpy as np
import pytest
import torch

from lmx.convert.gguf_layout import BY_ID, LAYOUTS, UNREAD
from lmx.convert.gguf_types import dequantize, largest_error, quantize

gguf = pytest.importorskip("gguf")

BLOCKED = [layout for layout in LAYOUTS.values() if layout.plain is None]


def random_blocks(layout, count=300):
    """Random bytes, but half-precision scales that are finite."""
    data = np.random.default_rng(layout.type_id).integers(0, 256, (count, layout.block_bytes), dtype=np.uint8)
    starts = {"Q6_K": [208]}.get(layout.name, [0, 2] if layout.name in ("Q4_1", "Q5_1", "Q4_K", "Q5_K") else [0])
    for start in starts:
        data[:, start + 1] &= 0xBB  # no exponent of all ones
    return data


@pytest.mark.parametrize("layout", BLOCKED, ids=lambda layout: layout.name)
def test_every_bit_pattern_dequantizes_as_in_the_gguf_package(layout):
    data = random_blocks(layout)
    theirs = gguf.quants.dequantize(data, gguf.GGMLQuantizationType(layout.type_id))
    ours = dequantize(layout, torch.from_numpy(data).view(-1))
    assert torch.equal(ours, torch.from_numpy(theirs).view(-1))


def test_sizes_are_those_of_the_gguf_package():
    for layout in LAYOUTS.values():
        kind = gguf.GGMLQuantizationType(layout.type_id)
        assert (kind.name, *gguf.constants.GGML_QUANT_SIZES[kind]) == (layout.name, layout.elements, layout.block_bytes)
    for number, name in UNREAD.items():
        assert gguf.GGMLQuantizationType(number).name == name
        assert number not in BY_ID


def special_blocks():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(400, 32, generator=generator) * torch.logspace(-9, 4, 400)[:, None]
    x[0] = 0
    x[1] = 0.5
    x[2, ::2] = -3.5
    x[3] = torch.arange(32) - 16.0  # halves after scaling
    x[4] = torch.tensor([127.0, 0.5, 1.5, -0.5, -2.5, *[0.0] * 27])
    return x


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0"])
def test_blocks_are_written_as_by_the_gguf_package(name):
    x, layout = special_blocks(), LAYOUTS[name]
    theirs = gguf.quants.quantize(x.numpy(), gguf.GGMLQuantizationType(layout.type_id))
    ours = quantize(layout, x)
    assert torch.equal(ours, torch.from_numpy(theirs).view(-1))
    error = (dequantize(layout, ours).view_as(x) - x).abs()
    assert (error <= largest_error(layout, x)).all()
    assert (error > largest_error(layout, x) / 4).any()
