"""Choosing tokens where the logits are: `lmx.core.sampling` in tensors of fixed sizes, without a look from the host.

A step of generation on a GPU chooses the next token itself, so that the following step can begin before the host knows
what was chosen. Kept sets, order and random numbers are those of `Sampler`: with one seed both choose the same tokens.
"""

import torch
from torch import Tensor

from lmx.core.sampling import History, Sampler, Sampling

_BLOCK = 1024
"""Random numbers that are sent to the device at a time."""


class DeviceSampler:
    """Chooses one sequence's tokens as `sampler` would, on a device."""

    def __init__(self, sampler: Sampler, vocab: int, device: torch.device) -> None:
        self._sampler = sampler
        self._sampling = sampler.sampling
        self._history = History(sampler.prompt_ids, vocab, device) if self._sampling.penalizes else None
        self._uniforms = torch.zeros(_BLOCK, dtype=torch.float64, device=device)
        self._drawn = torch.zeros(1, dtype=torch.int64, device=device)
        self._left = 0

    def prepare(self) -> None:
        """See that the next `choose` finds a random number: to be called before each, by the host."""
        if self._sampling.temperature == 0:
            return
        if self._left == 0:
            self._uniforms.copy_(self._sampler.uniforms(_BLOCK))
            self._drawn.zero_()
            self._left = _BLOCK
        self._left -= 1

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Choose from `logits` [vocab], and remember it.

        Returns the token, int64 [1], and the log of its probability by the logits themselves, float32 [1]: finite
        exactly where they hold neither NaN nor infinity.
        """
        logits = logits.float()
        scores = logits if self._history is None else self._history.penalized(logits, self._sampling)
        token_id = scores.argmax(0, keepdim=True) if self._sampling.temperature == 0 else self._draw(scores)
        if self._history is not None:
            self._history.add(token_id)
        return token_id, logits.index_select(0, token_id) - logits.logsumexp(0)

    def _draw(self, scores: Tensor) -> Tensor:
        ids, weights = fixed_distribution(scores, self._sampling)
        # Double: sums of float32 weights are exact but for the very least, in whatever order a GPU adds them.
        cumulative = weights.double().cumsum(0)
        threshold = self._uniforms.index_select(0, self._drawn) * cumulative[-1:]
        self._drawn.add_(1)
        place = torch.searchsorted(cumulative, threshold, right=True).clamp(max=len(cumulative) - 1)
        return place if ids is None else ids.index_select(0, place)


def fixed_distribution(scores: Tensor, sampling: Sampling) -> tuple[Tensor | None, Tensor]:
    """What `lmx.core.sampling.distribution` says, with a place for every token: no size depends on the scores.

    scores: [vocab], float32, penalized. Returns the ids in the order in which they are drawn [vocab], or None where
    that is 0, 1, 2 ..., and their weights [vocab], which need not add up to one: 0 for what may not be drawn.
    """
    if 0 < sampling.top_k < len(scores):
        scores = scores.masked_fill(scores < scores.topk(sampling.top_k).values[-1], float("-inf"))
    temperature = max(sampling.temperature, torch.finfo(torch.float32).tiny)
    probabilities = ((scores - scores.max()) / temperature).softmax(0)
    floor = sampling.min_p * probabilities.max()
    if sampling.top_p == 1:
        return None, probabilities.masked_fill(probabilities < floor, 0.0)
    descending = probabilities.sort(descending=True, stable=True)
    mass_before = descending.values.double().cumsum(0) - descending.values
    outside = mass_before >= sampling.top_p
    outside[:1].fill_(False)
    return descending.indices, descending.values.masked_fill(outside | (descending.values < floor), 0.0)
