"""Sampling against the transformers logits processors, and the draw against the probabilities it draws from."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lmx.core.errors import InputError, UsageError
from lmx.core.sampling import Sampler, Sampling, distribution, sample_rows

VOCAB = 1000


def reference(logits: Tensor, prompt_ids: list[int], sampling: Sampling) -> Tensor:
    """The probabilities [vocab] that transformers would draw from."""
    warpers = LogitsProcessorList()
    if sampling.repeat_penalty != 1.0:
        warpers.append(RepetitionPenaltyLogitsProcessor(sampling.repeat_penalty))
    if sampling.temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    return warpers(torch.tensor([prompt_ids]), logits[None]).softmax(-1)[0]


def ours(logits: Tensor, prompt_ids: list[int], sampling: Sampling) -> Tensor:
    sampler = Sampler(sampling, prompt_ids)
    ids, probabilities = distribution(sampler._penalized(logits), sampling)
    return torch.zeros_like(logits).index_put((ids,), probabilities)


GRID = list(itertools.product((0.3, 1.0, 1.7), (0, 1, 40, 5000), (1.0, 0.95, 0.5, 0.0), (0.0, 0.02, 1.0), (1.0, 1.3)))


@pytest.mark.parametrize(("temperature", "top_k", "top_p", "min_p", "repeat_penalty"), GRID)
def test_distribution_is_that_of_transformers(
    temperature: float, top_k: int, top_p: float, min_p: float, repeat_penalty: float
) -> None:
    sampling = Sampling(temperature, top_k, top_p, min_p, repeat_penalty)
    generator = torch.Generator().manual_seed(GRID.index((temperature, top_k, top_p, min_p, repeat_penalty)))
    prompt_ids = torch.randint(VOCAB, (30,), generator=generator).tolist()
    for scale in (0.1, 2.0, 8.0):
        logits = torch.randn(VOCAB, generator=generator) * scale
        expected, probabilities = reference(logits, prompt_ids, sampling), ours(logits, prompt_ids, sampling)
        assert torch.equal(probabilities > 0, expected > 0)
        torch.testing.assert_close(probabilities, expected, rtol=2e-5, atol=1e-9)


def test_tokens_tied_with_the_kth_are_kept_as_transformers_keeps_them() -> None:
    logits = torch.tensor([3.0, 1.0, 1.0, 1.0, 0.0])
    sampling = Sampling(temperature=1.0, top_k=2)
    torch.testing.assert_close(ours(logits, [], sampling), reference(logits, [0], sampling))
    assert int((ours(logits, [], sampling) > 0).sum()) == 4


@pytest.mark.parametrize("top_p", [0.0, 0.5, 0.999])
def test_a_uniform_distribution_keeps_the_share_of_tokens_and_at_least_one(top_p: float) -> None:
    for vocab in range(3, 3000, 7):
        ids, probabilities = distribution(torch.zeros(vocab), Sampling(temperature=1.0, top_p=top_p))
        assert len(ids) == pytest.approx(max(1, top_p * vocab), abs=1.01)
        assert probabilities.sum().item() == pytest.approx(1)


@pytest.mark.parametrize(("uniform", "expected"), [(0.0, 2), (1 - 2**-53, 5)])
def test_the_ends_of_the_draw_do_not_reach_tokens_of_probability_zero(
    monkeypatch: pytest.MonkeyPatch, uniform: float, expected: int
) -> None:
    monkeypatch.setattr(torch, "rand", lambda *args, **kwargs: torch.tensor(uniform, dtype=torch.float64))
    logits = torch.tensor([-math.inf, -1e4, 0.3, -math.inf, 0.1, 0.2, -1e4, -math.inf])
    assert Sampler(Sampling(temperature=1.0), []).next(logits)[0] == expected


def test_presence_and_frequency_follow_openai_formula() -> None:
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence, c counting sampled tokens only."""
    sampling = Sampling(presence_penalty=0.5, frequency_penalty=0.25)
    sampler = Sampler(sampling, prompt_ids=[0, 0, 0])
    logits = torch.tensor([0.0, 1.0, 0.4, 0.1])
    chosen = [sampler.next(logits)[0] for _ in range(6)]
    # 1 falls to 0.25, so 2 (0.4) is next and falls to -0.35; 1 again (0.25 -> 0.0); 3 (0.1 -> -0.65);
    # 0 and 1 tie at 0.0 and the lower id wins, although the prompt is full of it; then 1.
    assert chosen == [1, 2, 1, 3, 0, 1]


def test_repeat_penalty_acts_on_greedy_choice_for_prompt_and_answer() -> None:
    sampler = Sampler(Sampling(repeat_penalty=2.0), prompt_ids=[0])
    logits = torch.tensor([4.0, 3.0, 2.5, -1.0])
    assert [sampler.next(logits)[0] for _ in range(3)] == [1, 2, 0]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.7, top_k=5, seed=1),
        Sampling(repeat_penalty=1.5),
        Sampling(temperature=2.0, top_p=0.5, frequency_penalty=1.0, seed=2),
    ],
)
def test_logprob_is_of_the_models_own_logits(sampling: Sampling) -> None:
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(0)) * 3
    expected = logits.double().log_softmax(0)
    sampler = Sampler(sampling, [1, 2, 3])
    for _ in range(10):
        token_id, logprob = sampler.next(logits)
        assert logprob == pytest.approx(expected[token_id].item(), abs=1e-5)


def test_greedy_takes_the_lowest_of_tied_ids() -> None:
    logits = torch.zeros(VOCAB)
    logits[[700, 30, 999]] = 2.0
    assert Sampler(Sampling(), []).next(logits)[0] == 30
    assert sample_rows([Sampler(Sampling(), [])] * 2, torch.stack((logits, -logits)))[0][0] == 30


def test_draws_have_the_frequencies_of_the_distribution() -> None:
    sampling = Sampling(temperature=0.8, top_k=6, seed=11)
    logits = torch.randn(50, generator=torch.Generator().manual_seed(4))
    expected = reference(logits, [0], sampling)
    sampler = Sampler(sampling, [])
    draws = torch.tensor([sampler.next(logits)[0] for _ in range(4000)])
    counts = torch.bincount(draws, minlength=50)
    assert not counts[expected == 0].any()
    kept = expected > 0
    chi_squared = ((counts[kept] - 4000 * expected[kept]) ** 2 / (4000 * expected[kept])).sum()
    assert chi_squared < 20.5  # 5 degrees of freedom: the 99.9th percentile


def test_a_seed_repeats_the_draws_and_no_seed_does_not() -> None:
    logits = torch.zeros(VOCAB)

    def draws(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0, seed=seed), [])
        return [sampler.next(logits)[0] for _ in range(8)]

    assert draws(5) == draws(5)
    assert draws(5) != draws(6)
    assert draws(None) != draws(None)


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 1e-6])
def test_the_smallest_temperatures_are_greedy_and_not_nan(temperature: float) -> None:
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(1)) * 10
    assert Sampler(Sampling(temperature=temperature), []).next(logits)[0] == int(logits.argmax())


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=1.0, top_p=0.9, seed=3), Sampling(repeat_penalty=1.3)]
)
def test_rows_choose_as_each_would_alone(sampling: Sampling) -> None:
    steps = torch.randn(5, 3, VOCAB, generator=torch.Generator().manual_seed(2)) * 2
    prompts = [[1, 2], [3], [4, 5, 6]]
    together = [Sampler(sampling, prompt) for prompt in prompts]
    alone = [Sampler(sampling, prompt) for prompt in prompts]
    for logits in steps:
        rows = sample_rows(together, logits)
        for (token_id, logprob), sampler, row in zip(rows, alone, logits, strict=True):
            assert (token_id, pytest.approx(logprob, abs=1e-6)) == sampler.next(row)


def test_rows_of_bfloat16_are_measured_in_float32() -> None:
    logits = (torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(2)) * 2).bfloat16()
    rows = sample_rows([Sampler(Sampling(), [])] * 2, logits)
    expected = logits.double().log_softmax(-1).max(-1)
    assert [token_id for token_id, _ in rows] == expected.indices.tolist()
    assert [logprob for _, logprob in rows] == pytest.approx(expected.values.tolist(), abs=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, top_k=3), Sampling(repeat_penalty=1.1)])
def test_nan_and_infinity_are_refused(value: float, sampling: Sampling) -> None:
    logits = torch.zeros(VOCAB)
    logits[17] = value
    with pytest.raises(InputError, match="NaN"):
        Sampler(sampling, []).next(logits)
    with pytest.raises(InputError, match="NaN"):
        sample_rows([Sampler(sampling, [])] * 2, torch.stack((torch.zeros(VOCAB), logits)))


def test_minus_infinity_is_a_token_that_cannot_be_chosen() -> None:
    logits = torch.full((VOCAB,), -math.inf)
    logits[7] = -3.0
    assert Sampler(Sampling(temperature=1.0), []).next(logits) == (7, 0.0)
    with pytest.raises(InputError, match="NaN"):
        Sampler(Sampling(), []).next(torch.full((VOCAB,), -math.inf))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": "hot"},
        {"temperature": True},
        {"top_k": -1},
        {"top_k": 2.5},
        {"top_p": 1.01},
        {"top_p": math.nan},
        {"min_p": -0.5},
        {"repeat_penalty": 0.0},
        {"presence_penalty": 2.5},
        {"frequency_penalty": -2.5},
        {"seed": -1},
        {"seed": 1.5},
    ],
)
def test_values_out_of_range_are_usage_errors_that_name_the_option(options: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        Sampling(**options)
    with pytest.raises(UsageError, match=next(iter(options))):
        Sampling().override(**options)


def test_without_do_sample_a_checkpoint_is_greedy() -> None:
    config = {"temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.2, "eos_token_id": 2}
    greedy = Sampling.from_generation_config(config)
    assert greedy == Sampling(temperature=0.0, top_p=0.9, repeat_penalty=1.2)
    assert greedy.override(temperature=0.7) == Sampling(temperature=0.7, top_p=0.9, repeat_penalty=1.2)
    assert greedy.override(seed=3, top_p=0.5).temperature == 0.0
    assert Sampling.from_generation_config({"do_sample": False}) == Sampling.from_generation_config({}) == Sampling()


def test_with_do_sample_a_checkpoint_samples_until_told_otherwise() -> None:
    config = {"do_sample": True, "top_k": 20, "min_p": None}
    sampling = Sampling.from_generation_config(config)
    assert sampling == Sampling(temperature=1.0, top_k=20)
    assert Sampling.from_generation_config({**config, "temperature": 0.6}).temperature == 0.6
    assert sampling.override(temperature=0.0).temperature == 0.0


@pytest.mark.parametrize("config", [{"top_p": 7}, {"do_sample": True, "temperature": "warm"}, {"top_k": [1]}])
def test_a_bad_generation_config_is_an_input_error_that_names_the_file(config: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"generation_config\.json"):
        Sampling.from_generation_config(config)
