"""Memory read as the ceiling of the bandwidth wants it: every word, once."""

import numpy
import pytest
import torch
from support import needs_kernels

from lmx.core.native.read import BLOCK_BYTES, read

pytestmark = needs_kernels


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("blocks", [1, 2, 63, 64, 65, 300])
def test_every_word_is_read_once(blocks, threads):
    words = numpy.random.default_rng(blocks).integers(-(2**63), 2**63 - 1, blocks * BLOCK_BYTES // 8)
    numbers, before = torch.from_numpy(words), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert read(numbers) == int(numpy.bitwise_xor.reduce(words.view(numpy.uint64)))
        words[-1] ^= 1 << 62
        assert read(numbers) == int(numpy.bitwise_xor.reduce(words.view(numpy.uint64)))
    finally:
        torch.set_num_threads(before)


def test_a_part_of_a_block_is_refused():
    with pytest.raises(ValueError, match="whole blocks"):
        read(torch.zeros(BLOCK_BYTES + 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="contiguous"):
        read(torch.zeros(2, BLOCK_BYTES).T)
