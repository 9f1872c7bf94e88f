"""A router's choice of experts on the card: softmax, the largest, and what they are weighed with, in one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmx.core.gpu.floats import exponential


@triton.jit
def _route(
    logits, ids, weights, experts,
    TOP_K: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK: tl.constexpr, CHOICES: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    expert, choice = tl.arange(0, BLOCK), tl.arange(0, CHOICES)
    x = tl.load(logits + token * experts + expert, expert < experts, -float("inf")).to(tl.float32)
    raised = exponential(x - tl.max(x, 0))
    left = tl.where(expert < experts, raised / tl.sum(raised, 0), -1.0)
    chosen_ids = tl.full([CHOICES], 0, tl.int32)
    chosen = tl.zeros([CHOICES], tl.float32)
    for k in tl.static_range(TOP_K):
        largest = tl.max(left, 0)
        first = tl.min(tl.where(left == largest, expert, BLOCK), 0)  # BLOCK, which is no expert, where all is NaN
        chosen_ids = tl.where(choice == k, first, chosen_ids)
        chosen = tl.where(choice == k, largest, chosen)
        left = tl.where(expert == first, -1.0, left)
    if NORMALIZE:
        chosen = chosen / tl.sum(chosen, 0)
    place = token * TOP_K + choice
    tl.store(ids + place, chosen_ids.to(tl.int64), choice < TOP_K)
    tl.store(weights + place, chosen, choice < TOP_K)


def route(router_logits: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """`lmx.core.gpu.stream.route`: logits [tokens, experts] -> int64 and float32 [tokens, top_k]."""
    tokens, experts = router_logits.shape
    ids = torch.empty(tokens, top_k, dtype=torch.int64, device=router_logits.device)
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=router_logits.device)
    sizes = {"BLOCK": triton.next_power_of_2(experts), "CHOICES": triton.next_power_of_2(top_k)}
    _route[(tokens,)](router_logits, ids, weights, experts, TOP_K=top_k, NORMALIZE=normalize, **sizes, num_warps=1)
    return ids, weights
