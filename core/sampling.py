"""Choosing the next token from a model's logits: penalties, temperature, truncation, the draw.

The order is that of the transformers logits processors (`transformers/generation/logits_process.py`): repetition
penalty, presence and frequency penalty, temperature, top-k, top-p, min-p. Kept sets and probabilities are theirs too;
only the way there is cheaper, because nothing is sorted that a threshold can rule out.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

import torch
from torch import Tensor

from lmx.core.errors import InputError, UsageError
from lmx.core.native.pick import can_pick, pick_with_sum


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens. The defaults choose the likeliest one (greedy), without penalties.

    - `temperature`: logits are divided by it; 0 is greedy, the lowest id winning a tie.
    - `top_k`: keep the k likeliest tokens (and those tied with the k-th); 0 keeps all.
    - `top_p`: keep the smallest set of likeliest tokens that holds this much probability (Holtzman et al. 2020).
    - `min_p`: keep tokens at least this fraction as likely as the likeliest (Nguyen et al. 2024).
    - `repeat_penalty`: divides positive and multiplies negative logits of every token of the prompt or the answer so
      far (Keskar et al. 2019, CTRL). Works on greedy choice too, as the two below do.
    - `presence_penalty`, `frequency_penalty`: subtracted once, and once for each occurrence, for tokens of the answer
      so far; the prompt does not count (the OpenAI API reference).
    - `seed`: None draws differently each time.

    Raises `UsageError` for a value out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.seed is not None:
            _check_integer("seed", self.seed, 0, 2**63 - 1)
        _check_integer("top_k", self.top_k, 0, 2**63 - 1)
        for name, (in_range, words) in _RANGES.items():
            value = self.__dict__[name]
            if isinstance(value, bool) or not isinstance(value, int | float) or not in_range(value):
                raise UsageError(f"{name} is {value!r}", f"give {words}")

    @classmethod
    def from_generation_config(cls, config: Mapping[str, object]) -> "Sampling":
        """Read a checkpoint's `generation_config.json`: greedy unless it says `do_sample`.

        A key that is absent or null is off (temperature: 1). Top-k and the like are read for a greedy checkpoint as
        well, for the user who turns sampling on. Raises `InputError` for a value out of its range.
        """
        given = {ours: config[theirs] for ours, theirs in _CONFIG_KEYS.items() if config.get(theirs) is not None}
        if config.get("do_sample") is not True:
            given["temperature"] = 0.0
        try:
            return replace(cls(temperature=1.0), **given)  # type: ignore[arg-type]  # __post_init__ checks the types
        except UsageError as error:
            raise InputError(f"generation_config.json: {error.message}", f"{error.hint}, or remove the key") from error

    def override(
        self,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repeat_penalty: float | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        seed: int | None = None,
    ) -> "Sampling":
        """Replace what is given; None leaves a value as it is. A temperature above 0 turns sampling on."""
        return Sampling(
            temperature=self.temperature if temperature is None else temperature,
            top_k=self.top_k if top_k is None else top_k,
            top_p=self.top_p if top_p is None else top_p,
            min_p=self.min_p if min_p is None else min_p,
            repeat_penalty=self.repeat_penalty if repeat_penalty is None else repeat_penalty,
            presence_penalty=self.presence_penalty if presence_penalty is None else presence_penalty,
            frequency_penalty=self.frequency_penalty if frequency_penalty is None else frequency_penalty,
            seed=self.seed if seed is None else seed,
        )

    @property
    def penalizes(self) -> bool:
        """Whether earlier tokens change the logits."""
        return self.repeat_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


_RANGES: Final[dict[str, tuple[Callable[[float], bool], str]]] = {
    "temperature": (lambda value: 0 <= value < math.inf, "a number from 0 (greedy) up, such as 0.7"),
    "top_p": (lambda value: 0 <= value <= 1, "a number from 0 to 1; 1 turns it off"),
    "min_p": (lambda value: 0 <= value <= 1, "a number from 0 to 1; 0 turns it off"),
    "repeat_penalty": (lambda value: 0 < value < math.inf, "a number above 0, such as 1.1; 1 turns it off"),
    "presence_penalty": (lambda value: -2 <= value <= 2, "a number from -2 to 2; 0 turns it off"),
    "frequency_penalty": (lambda value: -2 <= value <= 2, "a number from -2 to 2; 0 turns it off"),
}

_CONFIG_KEYS: Final = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repeat_penalty": "repetition_penalty",
}


def _check_integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UsageError(f"{name} is {value!r}", f"give a whole number from {low} up")


def distribution(scores: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """What may be drawn: the kept token ids and their probabilities, both [kept].

    `scores` [vocab], float32, are the penalized logits. The temperature must be above 0.
    """
    ids = None
    if 0 < sampling.top_k < len(scores):
        # The k-th value, not the k positions: transformers keeps every token tied with it.
        ids = (scores >= scores.topk(sampling.top_k).values[-1]).nonzero()[:, 0]
        scores = scores[ids]
    # From the maximum down, so that the smallest temperatures overflow to probability 0 rather than to NaN.
    temperature = max(sampling.temperature, torch.finfo(torch.float32).tiny)
    probabilities = ((scores - scores.max()) / temperature).softmax(0)
    if sampling.top_p < 1 or sampling.min_p > 0:
        kept = _nucleus(probabilities, sampling)
        probabilities = probabilities[kept] / probabilities[kept].sum()
        ids = kept if ids is None else ids[kept]
    if ids is None:
        ids = torch.arange(len(scores), device=scores.device)
    return ids, probabilities


def _nucleus(probabilities: Tensor, sampling: Sampling) -> Tensor:
    """The positions that top-p and min-p both keep.

    A token of less than (1 - top_p) / vocab is never in the nucleus: all of these together weigh less than 1 - top_p.
    This rules out nearly all of a large vocabulary before the sort. min-p keeps likeliest tokens too, relative to the
    maximum, so that it may as well go first.
    """
    largest = probabilities.max()
    floor = (sampling.min_p * largest).clamp(min=(1 - sampling.top_p) / len(probabilities))
    candidates = (probabilities >= floor.minimum(largest)).nonzero()[:, 0]
    if sampling.top_p == 1:
        return candidates
    descending = probabilities[candidates].sort(descending=True, stable=True)
    mass_before = descending.values.cumsum(0) - descending.values
    kept = mass_before < sampling.top_p
    kept[0] = True
    return candidates[descending.indices[kept]]


class Chosen(NamedTuple):
    """A token, and the natural log of its probability by the model's own logits.

    seconds: what a device took for it beside the host; 0 where the host computed or waited all the time.
    """

    token_id: int
    logprob: float
    seconds: float = 0.0


class History:
    """What the penalties know of one sequence: which tokens were in it, and how often each was chosen."""

    def __init__(self, prompt_ids: Sequence[int], vocab: int, device: torch.device) -> None:
        self.counts = torch.zeros(vocab, device=device)
        self.seen = torch.zeros(vocab, dtype=torch.bool, device=device)
        self.seen[[index for index in set(prompt_ids) if index < vocab]] = True

    def add(self, token_id: Tensor) -> None:
        """Note a chosen token, int64 [1]."""
        self.counts.index_add_(0, token_id, torch.ones_like(self.counts[:1]))
        self.seen.index_fill_(0, token_id, True)

    def penalized(self, logits: Tensor, sampling: Sampling) -> Tensor:
        """Return `logits` [vocab] with the penalties for the tokens so far."""
        penalty = sampling.repeat_penalty
        scores = torch.where(self.seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
        scores -= sampling.presence_penalty * (self.counts > 0)
        scores -= sampling.frequency_penalty * self.counts
        return scores


class Sampler:
    """Chooses one sequence's tokens, remembering which came before.

    Random numbers come from the CPU whatever the model's device, one for each token, so that a seed means the same
    everywhere.
    """

    def __init__(self, sampling: Sampling, prompt_ids: Sequence[int]) -> None:
        self.sampling = sampling
        self.prompt_ids = prompt_ids
        self._history: History | None = None
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def next(self, logits: Tensor) -> tuple[int, float]:
        """Choose a token from `logits` [vocab].

        Returns its id and the natural log of its probability by the model's own logits, before penalties, temperature
        and truncation. Raises `InputError` if the logits hold NaN or infinity.
        """
        if can_pick(logits):
            likeliest, logit, log_normalizer = pick_with_sum(logits)
            finite(log_normalizer)
            if not self.sampling.penalizes and self.sampling.temperature == 0:
                return likeliest, logit - log_normalizer
            logits = logits.float()
        else:
            logits = logits.float()
            log_normalizer = finite(logits.logsumexp(0).item())
        scores = self._penalized(logits) if self.sampling.penalizes else logits
        token_id = self._draw(scores) if self.sampling.temperature > 0 else int(scores.argmax())
        if self._history is not None:
            self._history.add(torch.tensor([token_id], device=logits.device))
        return token_id, logits[token_id].item() - log_normalizer

    def uniforms(self, count: int) -> Tensor:
        """The next so many random numbers from [0, 1), float64 [count] on the CPU: those that as many draws use."""
        return torch.rand(count, generator=self._generator, dtype=torch.float64)

    def _penalized(self, logits: Tensor) -> Tensor:
        if self._history is None:
            self._history = History(self.prompt_ids, len(logits), logits.device)
        return self._history.penalized(logits, self.sampling)

    def _draw(self, scores: Tensor) -> int:
        ids, probabilities = distribution(scores, self.sampling)
        cumulative = probabilities.cpu().double().cumsum(0)
        threshold = torch.rand((), generator=self._generator, dtype=torch.float64) * cumulative[-1]
        # The first entry above the threshold: never one of probability 0, because the draw is below 1.
        return int(ids[torch.searchsorted(cumulative, threshold, right=True)])


def sample_rows(samplers: Sequence[Sampler], logits: Tensor) -> list[tuple[int, float]]:
    """Choose one token for each row of `logits` [rows, vocab], each by its own sampler, as `Sampler.next` does.

    Rows that are all greedy and free of penalties are chosen together.
    """
    if any(sampler.sampling.penalizes or sampler.sampling.temperature > 0 for sampler in samplers):
        return [sampler.next(row) for sampler, row in zip(samplers, logits, strict=True)]
    logits = logits.float()
    values, token_ids = logits.max(-1)
    logprobs = values - logits.logsumexp(-1)
    return [(token_id, finite(value)) for token_id, value in zip(token_ids.tolist(), logprobs.tolist(), strict=True)]


def finite(log_value: float) -> float:
    """Pass on a figure that is finite exactly when no logit is NaN or +infinity and some logit is finite."""
    if math.isfinite(log_value):
        return log_value
    raise InputError(
        "the model produced NaN or infinite logits",
        "try --dtype fp32; if it persists the checkpoint's weights are damaged: download it again",
    )
