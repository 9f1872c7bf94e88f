"""Torch's flash kernel beside the eager path, and where it refuses."""

import pytest
import torch
from card import CARD
from torch import Tensor

from lmx.core.errors import UsageError
from lmx.core.kv_cache import KVCache, WindowKVCache
from lmx.core.layers.attention import attend
from lmx.core.state import Span

pytestmark = pytest.mark.cuda
# heads, key heads, channels of a head: Mixtral's, OLMoE's, RecurrentGemma's, DBRX's
SHAPES = [(32, 8, 128), (16, 16, 128), (10, 1, 256), (48, 8, 128)]


def drawn(shape: tuple[int, int, int], queries: int, keys: int, dtype=torch.bfloat16) -> list[Tensor]:
    heads, kv_heads, width = shape
    torch.manual_seed(0)
    sizes = ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    return [torch.randn(2, count, length, width, device=CARD).to(dtype) for count, length in sizes]


def empty(shape: tuple[int, int, int], dtype=torch.bfloat16) -> KVCache:
    return KVCache.empty(2, shape[1], shape[2], dtype, CARD)


@pytest.mark.parametrize("implementation", ["flash", "sdpa"])
@pytest.mark.parametrize(("start", "length"), [(0, 1), (0, 300), (512, 1), (512, 512), (700, 13)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_answers_are_those_of_plain_attention(shape, start: int, length: int, implementation) -> None:
    """A prompt's first part, later ones, and steps, over a cache with room behind its keys."""
    cache = empty(shape)
    query, key, value = drawn(shape, length, start + length)
    before = Span(0, start)
    if start:
        cache.update(key[:, :, :start], value[:, :, :start], before)
    span = Span(start, length)
    visibility = cache.visibility(span)
    keys, values = cache.update(key[:, :, start:], value[:, :, start:], span)
    answer, _ = attend(query, keys, values, visibility, implementation)
    exact, _ = attend(query.float(), keys.float(), values.float(), visibility, "eager")
    assert (answer.float() - exact).norm() / exact.norm() < 1e-2
    assert keys.dtype == torch.bfloat16


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_key_heads_are_shared_without_copies(shape) -> None:
    """A later part of a prompt takes less memory than its keys repeated, or its scores, would."""
    query, keys, values = drawn(shape, 512, 8192)
    cache = KVCache(keys, values)
    visibility = cache.visibility(Span(8192 - 512, 512))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attend(query, keys, values, visibility, "sdpa")
    taken = torch.cuda.max_memory_allocated() - before
    assert taken < 4 * query.nbytes + (64 << 20)
    scores = 2 * shape[0] * 512 * 8192 * 2
    assert taken < scores


def test_what_flash_cannot_do_is_said() -> None:
    shape = SHAPES[0]
    cases = [
        (drawn(shape, 3, 3, torch.float32), empty(shape, torch.float32).visibility(Span(0, 3)), "float32"),
        (drawn((4, 4, 512), 3, 3), empty((4, 4, 512)).visibility(Span(0, 3)), "512 channels"),
        (drawn(shape, 3, 11), WindowKVCache.empty(2, 8, 128, torch.bfloat16, CARD, 8).visibility(Span(9, 3)), "mask"),
    ]
    for tensors, visibility, reason in cases:
        with pytest.raises(UsageError, match=reason):
            attend(*tensors, visibility, "flash")
