"""Timing a model: reading a prompt, generating, or both, from a state of some depth."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from lmx.core.ceilings import synchronize
from lmx.core.errors import UsageError
from lmx.core.generate import prompt_chunk_for
from lmx.core.kv_cache import AttentionCache, WindowKVCache
from lmx.core.model import AnyState, LanguageModel
from lmx.core.native.pick import likeliest
from lmx.core.state import LayerState


@dataclass(frozen=True)
class Workload:
    """`prompt` tokens read and then `generate` tokens generated, by a state that holds `depth` tokens before.

    Raises UsageError for a workload of nothing.
    """

    prompt: int = 0
    generate: int = 0
    depth: int = 0

    def __post_init__(self) -> None:
        if min(self.prompt, self.generate, self.depth) < 0 or not self.prompt + self.generate:
            raise UsageError(f"a test of {self.prompt} and {self.generate} tokens", "give one of them, 1 or more")

    @property
    def name(self) -> str:
        """As llama-bench calls it: pp512, tg128, pp512+tg128."""
        parts = (("pp", self.prompt), ("tg", self.generate))
        return "+".join(f"{kind}{tokens}" for kind, tokens in parts if tokens)

    @property
    def tokens(self) -> int:
        """All tokens that are timed."""
        return self.prompt + self.generate


@dataclass(frozen=True)
class Sample:
    """One run. seconds: all of it; first_token_seconds: from its beginning until a token was chosen."""

    seconds: float
    first_token_seconds: float


class Bench:
    """Runs workloads on one model. What lies before a workload is read once and kept, untimed.

    Tokens are random, as llama-bench has them: a model that answers itself may run in circles, through the same experts
    again and again. The likeliest token is still looked for after each step, and no stop token ends a run.
    """

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self._ids = torch.Generator().manual_seed(0)
        self._before = model.make_state()

    def run(self, work: Workload, repetitions: int) -> Iterator[Sample]:
        """Warm up with the whole prompt and one generated token, then time `repetitions` runs."""
        self._read_before(work.depth)
        self._time(Workload(work.prompt, min(work.generate, 1), work.depth))
        for _ in range(repetitions):
            yield self._time(work)

    def _read_before(self, depth: int) -> None:
        """Bring the state that workloads begin from to a depth; from the last one's if that is less."""
        if depth < self._before.length:
            self._before = self._model.make_state()
        self._read(self._before, depth - self._before.length)

    def _time(self, work: Workload) -> Sample:
        state = self._before if self._before.rewinds else self._before.clone()
        first = 0.0
        steps = self._random_ids(work.generate).split(1, dim=1) if work.generate else ()
        for device in {buffer.device for layer in state.layers for buffer in layer.buffers}:
            synchronize(device)  # what is still being copied is none of this
        start = perf_counter()
        if work.prompt:
            self._read(state, work.prompt)
            first = perf_counter() - start
        stepper = self._model.stepper(state)
        for ids in steps:
            likeliest(stepper.feed(ids)[0])  # waits for the device, as whoever shows a token must
            first = first or perf_counter() - start
        sample = Sample(perf_counter() - start, first)
        if state is self._before:
            state.truncate(work.depth)
        return sample

    # As `lmx.core.generate` runs a model: not in inference mode.
    @torch.no_grad()
    def _read(self, state: AnyState, tokens: int) -> None:
        """Run the model over random tokens, as generation reads a prompt, and choose the likeliest next one."""
        chunk = prompt_chunk_for(self._model.device)
        for first in range(0, tokens, chunk):
            output = self._model(
                input_ids=self._random_ids(min(chunk, tokens - first)),
                state=state,
                logits_to_keep=1,
                output_router_logits=False,
            )
            likeliest(output.logits[0, -1])  # waits for the device

    def _random_ids(self, tokens: int) -> Tensor:
        """[1, tokens]."""
        vocabulary = self._model.config.vocab_size
        return torch.randint(vocabulary, (1, tokens), generator=self._ids).to(self._model.device)


def mean_and_deviation(numbers: Sequence[float]) -> tuple[float, float]:
    """The mean, and the deviation that these samples let one expect of others; 0 for a single one."""
    mean = sum(numbers) / len(numbers)
    spread = sum((number - mean) ** 2 for number in numbers)
    return mean, (spread / max(len(numbers) - 1, 1)) ** 0.5


def state_bytes_read(layers: Sequence[LayerState], length: int) -> int:
    """What a decode step reads of the state, where it attends to `length` tokens with its own: keys, values, memories.

    layers: those of an empty state.
    """
    return sum(_layer_bytes(layer, length) for layer in layers)


def _layer_bytes(layer: LayerState, length: int) -> int:
    if isinstance(layer, WindowKVCache):
        return layer.nbytes // layer.window * min(length, layer.window)
    return layer.nbytes_at(length)


def attention_flops(layers: Sequence[LayerState], width: int, work: Workload) -> int:
    """Operations of a workload's attention: each query times the keys that it sees, and their values' weighted sum.

    layers: those of an empty state; width: channels of all query heads of a layer together.
    """
    lengths = range(work.depth + 1, work.depth + work.tokens + 1)
    caches = [layer for layer in layers if isinstance(layer, AttentionCache)]
    windows = [cache.window if isinstance(cache, WindowKVCache) else lengths.stop for cache in caches]
    seen = sum(sum(min(length, window) for length in lengths) for window in windows)
    return 4 * width * seen
