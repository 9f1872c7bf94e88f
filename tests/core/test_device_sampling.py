"""Choosing in tensors of fixed sizes: the same sets, probabilities and tokens as on the host."""

import itertools

import pytest
import torch

from lmx.core.device_sampling import DeviceSampler, fixed_distribution
from lmx.core.sampling import Sampler, Sampling, distribution

CPU = torch.device("cpu")
CASES = [
    Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    for temperature, top_k, top_p, min_p in itertools.product(
        (0.01, 0.7, 2.0), (0, 1, 7, 200), (0.0, 0.5, 0.97, 1.0), (0.0, 0.2, 1.0)
    )
]


def scores(seed: int, ties: bool = False) -> torch.Tensor:
    made = torch.randn(150, generator=torch.Generator().manual_seed(seed)) * 3
    return made.round() if ties else made


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("sampling", CASES, ids=str)
def test_kept_sets_their_order_and_probabilities(sampling: Sampling, ties: bool) -> None:
    for seed in range(4):
        ids, weights = fixed_distribution(scores(seed, ties), sampling)
        expected_ids, expected = distribution(scores(seed, ties), sampling)
        assert weights.shape == (150,)
        kept = weights > 0
        mine = kept.nonzero()[:, 0] if ids is None else ids[kept]
        positive = expected > 0
        assert mine.tolist() == expected_ids[positive].tolist()
        torch.testing.assert_close(weights[kept] / weights.sum(), expected[positive], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=1.0, seed=5),
        Sampling(temperature=0.8, top_k=20, top_p=0.9, seed=6),
        Sampling(temperature=1.2, min_p=0.05, repeat_penalty=1.4, presence_penalty=0.3, frequency_penalty=0.2, seed=7),
        Sampling(repeat_penalty=0.7, frequency_penalty=1.0),
    ],
    ids=str,
)
def test_tokens_and_logprobs_are_the_hosts(sampling: Sampling) -> None:
    prompt = [1, 5, 5, 149, 4000]
    here, there = Sampler(sampling, prompt), DeviceSampler(Sampler(sampling, prompt), 150, CPU)
    for seed in range(1100):  # beyond the first block of random numbers
        there.prepare()
        token_id, logprob = there.choose(scores(seed % 90))
        expected_id, expected = here.next(scores(seed % 90))
        assert int(token_id) == expected_id
        assert float(logprob) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_logits(dtype: torch.dtype) -> None:
    logits = scores(3).to(dtype)
    token_id, logprob = DeviceSampler(Sampler(Sampling(), []), 150, CPU).choose(logits)
    assert (int(token_id), float(logprob)) == pytest.approx(Sampler(Sampling(), []).next(logits), abs=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, top_k=5, top_p=0.5)], ids=str)
def test_bad_logits_show_in_the_logprob(sampling: Sampling, bad: float) -> None:
    logits = scores(0)
    logits[17] = bad
    sampler = DeviceSampler(Sampler(sampling, []), 150, CPU)
    sampler.prepare()
    token_id, logprob = sampler.choose(logits)
    assert not logprob.isfinite()
    assert 0 <= int(token_id) < 150  # an index beyond would break the card's context
