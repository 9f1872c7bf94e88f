import pytest
import torch
from bitsandbytes.functional import create_dynamic_map, get_4bit_type

from lmx.quant.codebook import dynamic_map, four_bit_map, make_rank_table, packed_codes, pair_values, rank_table


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_tables_are_those_of_bitsandbytes(quant_type):
    assert torch.equal(four_bit_map(quant_type), get_4bit_type(quant_type, device="cpu"))
    assert torch.equal(dynamic_map(), create_dynamic_map())


def test_tables_do_not_depend_on_the_defaults_of_the_moment():
    four_bit_map.cache_clear()
    with torch.device("meta"):
        assert four_bit_map("nf4").device.type == "cpu"


def neighbours(values, reach=3):
    """Each value and the `reach` floats on either side of it."""
    bits = values.view(torch.int32)
    return torch.cat([(bits + step).view(torch.float32) for step in range(-reach, reach + 1)])


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_ranks_are_exact_at_every_threshold(quant_type):
    values = four_bit_map(quant_type).sort().values
    thresholds = (values[1:] + values[:-1]) / 2
    small = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-38, -1e-38, 1.0, -1.0, 1.0000001, -1.0000001])
    tried = torch.cat([neighbours(thresholds), neighbours(values[values != 0]), small, torch.randn(100_000) * 0.4])
    assert torch.equal(rank_table(quant_type)(tried), torch.bucketize(tried, thresholds).to(torch.uint8))


def test_ranks_are_exact_for_any_thresholds_and_all_floats():
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        # One threshold a cell, anywhere in it: sorted values apart from each other by more than a cell.
        upper = torch.randperm(0x7F80, generator=generator)[:7] << 16
        lower = torch.randint(0, 0x10000, (7,), generator=generator)
        sign = torch.randint(0, 2, (7,), generator=generator) << 31
        thresholds = (upper + lower + sign).to(torch.int32).view(torch.float32).sort().values
        bits = torch.randint(-(2**31), 2**31, (100_000,), generator=generator).to(torch.int32)
        tried = bits.view(torch.float32)
        tried = torch.cat([tried[~tried.isnan()], neighbours(thresholds)])
        expected = torch.bucketize(tried, thresholds).to(torch.uint8)
        assert torch.equal(make_rank_table(thresholds)(tried), expected)


def test_packed_bytes_expand_to_their_two_values():
    for quant_type in ("nf4", "fp4"):
        values, pairs = four_bit_map(quant_type), pair_values(quant_type)
        assert pairs[0x2F].tolist() == [values[2].item(), values[15].item()]
    assert torch.equal(packed_codes("nf4"), torch.arange(256, dtype=torch.uint8))
    assert packed_codes("fp4").unique().numel() == 256
