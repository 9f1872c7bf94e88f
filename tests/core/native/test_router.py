"""The router's choice in one native call, against torch's softmax and topk."""

import pytest
import torch
from native_cases import random
from support import needs_kernels

from lmx.core.layers import moe
from lmx.core.native.router import can_route, route_natively

pytestmark = needs_kernels


def by_torch(logits, top_k, normalize):
    probabilities = logits.float().softmax(-1)
    weights, ids = torch.topk(probabilities, top_k, dim=-1)
    if normalize is not None:
        weights = weights / torch.linalg.vector_norm(weights, ord=normalize, dim=-1, keepdim=True)
    return ids, weights


@pytest.mark.parametrize("normalize", [None, 1.0, 2.0])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 64, 8), (3, 8, 2), (200, 16, 4), (5, 256, 2), (2, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_choice_is_torchs(tokens, experts, top_k, normalize, dtype):
    logits = random(tokens, experts).to(dtype)
    assert can_route(logits, normalize)
    ids, weights = route_natively(logits, top_k, normalize)
    expected_ids, expected = by_torch(logits, top_k, normalize)
    assert torch.equal(ids, expected_ids)
    assert ids.dtype == torch.int64
    torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize(("experts", "top_k"), [(64, 8), (8, 2), (16, 4), (8, 8), (256, 2), (640, 10)])
def test_ties_fall_as_in_torch(experts, top_k):
    levels = torch.randint(0, 4, (300, experts), generator=torch.Generator().manual_seed(1)).float()
    levels[0] = 0  # all alike
    ids, _ = route_natively(levels, top_k, None)
    assert torch.equal(ids, by_torch(levels, top_k, None)[0])


def test_far_logits_and_what_is_no_number():
    logits = torch.tensor([[0.0, 500.0, -500.0, 90.0], [0.0, float("nan"), 1.0, 2.0], [0.0, float("-inf"), 1.0, 2.0]])
    ids, weights = route_natively(logits, 3, 1.0)
    expected_ids, expected = by_torch(logits, 3, 1.0)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected, equal_nan=True)


def test_the_layer_asks_the_kernel_only_for_what_it_knows():
    logits = random(2, 8)
    assert not can_route(logits, 3.0)
    assert not can_route(logits.half(), 1.0)
    assert not can_route(logits.clone().requires_grad_(), 1.0)
    ids, weights = moe.route(logits, 2, 3.0)
    expected_ids, expected = by_torch(logits, 2, 3.0)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected)
