"""The ends of a step against torch: embeddings to the bit, the likeliest token and the log of the sum."""

import math

import pytest
import torch
from native_paths import needs_kernels, path, random  # noqa: F401

from lmx.core.native.compiled import library
from lmx.core.native.pick import can_pick, embed_rows, likeliest, pick, pick_with_sum

pytestmark = [needs_kernels, pytest.mark.usefixtures("path")]

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 129, 1000, 16384, 16385, 50304, 256000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_likeliest_and_the_sum_are_torchs(count, dtype):
    for seed in range(3):
        logits = (5 * random(count, seed=seed)).to(dtype)  # in bf16 with ties at the top
        expected = int(logits.float().argmax())
        assert pick(logits) == likeliest(logits) == expected
        found, logit, log_sum = pick_with_sum(logits)
        assert (found, logit) == (expected, logits[expected].item())
        assert log_sum == pytest.approx(logits.double().logsumexp(0).item(), rel=1e-6, abs=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_go_to_the_first(dtype):
    for first, second in ((0, 1), (3, 30), (130, 131), (17000, 40000), (16383, 16384), (49990, 49999)):
        logits = torch.full((50000,), -2.0, dtype=dtype)
        logits[[first, second]] = 1.5
        assert pick(logits) == first
    assert pick(torch.zeros(5000, dtype=dtype)) == 0
    assert pick(torch.full((5000,), -math.inf, dtype=dtype)) == 0
    assert pick(torch.tensor([-0.0, 0.0], dtype=dtype)) == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("at", [0, 13, 16390, 19999])
def test_nan_is_found_first_and_infinity_is_no_number(at, dtype):
    logits = random(20000).to(dtype)
    logits[at], logits[19999] = math.nan, math.nan
    found, _, log_sum = pick_with_sum(logits)
    assert found == int(logits.argmax()) == at
    assert math.isnan(log_sum)
    logits = random(20000).to(dtype)
    logits[at] = math.inf
    assert pick_with_sum(logits) == (at, math.inf, math.inf)
    assert pick_with_sum(torch.full((9,), -math.inf, dtype=dtype)) == (0, -math.inf, -math.inf)


def test_what_is_far_below_adds_nothing():
    logits = torch.tensor([-math.inf, 3.0, -1e30, -math.inf])
    assert pick_with_sum(logits) == (1, 3.0, 3.0)


def test_threads_change_no_bit():
    logits, before = random(200000), torch.get_num_threads()
    found = set()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            library().lmx_set_threads(threads)
            found.add(pick_with_sum(logits))
    finally:
        torch.set_num_threads(before)
        library().lmx_set_threads(before)
    assert len(found) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [None, 50.5, 0.1])
def test_embeddings_are_torchs_to_the_bit(dtype, scale):
    weight, ids = random(50, 75).to(dtype), torch.tensor([[3], [49], [0]])
    expected = torch.nn.functional.embedding(ids, weight)
    got = embed_rows(weight, ids, scale)
    assert got.dtype == dtype
    assert torch.equal(got, expected if scale is None else expected * scale)


def test_other_tensors_are_left_to_torch():
    assert not can_pick(torch.zeros(4, dtype=torch.float16))
    assert not can_pick(torch.zeros(8)[::2])
    assert not can_pick(torch.zeros(0))
    assert likeliest(torch.tensor([0.0, 2.0, 1.0], dtype=torch.float16)) == 1
