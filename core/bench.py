"""Timing a model: reading a prompt, generating, or both, from a state of some depth."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import torch
from torch import Tensor

from lmx.core.ceilings import synchronize
from lmx.core.errors import UsageError
from lmx.core.generate import prompt_chunk_for
from lmx.core.graph_stepper import GraphStepper
from lmx.core.kv_cache import AttentionCache, WindowKVCache
from lmx.core.model import AnyState, LanguageModel
from lmx.core.native.pick import likeliest
from lmx.core.state import LayerState

# A card's step is first warmed up, then captured, then replayed.
_WARM_UP_TOKENS = 3

LOOK_SECONDS = 0.5
"""How long tokens are generated before somebody may look what else the machine does."""


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
    A run begins with the stepper of the one before, so that what is made once for many tokens is made in the warm-up.
    """

    def __init__(self, model: LanguageModel, look: Callable[[], None] | None = None) -> None:
        """look: called between tokens, every `LOOK_SECONDS` of a test, while the clock stands still; not for a card."""
        self._model = model
        self._look = look
        self._ids = torch.Generator().manual_seed(0)
        self._begin()

    def run(self, work: Workload, repetitions: int) -> Iterator[Sample]:
        """Warm up with the whole prompt and a few generated tokens, then time `repetitions` runs."""
        self._read_before(work.depth)
        self._time(Workload(work.prompt, min(work.generate, _WARM_UP_TOKENS), work.depth))
        for _ in range(repetitions):
            yield self._time(work)

    def _read_before(self, depth: int) -> None:
        """Bring the state that workloads begin from to a depth; from the last one's if that is less."""
        if depth < self._before.length:
            self._begin()
        self._read(self._before, depth - self._before.length)

    def _begin(self) -> None:
        """With an empty state; one that cannot be cut is run in a copy."""
        self._before = self._model.make_state()
        self._state = self._before if self._before.rewinds else self._before.clone()
        self._stepper = self._model.stepper(self._state)

    def _go_back(self, depth: int) -> AnyState:
        """The state as it was at the depth, in the tensors that it lies in: a captured step knows no others."""
        if self._state is self._before:
            self._state.truncate(depth)
            return self._state
        for layer, before in zip(self._state.layers, self._before.layers, strict=True):
            for buffer, kept in zip(layer.buffers, before.buffers, strict=True):
                buffer.copy_(kept)
        self._state.length = self._before.length
        return self._state

    def _time(self, work: Workload) -> Sample:
        state = self._go_back(work.depth)
        first = 0.0
        steps = self._steps(work.generate)
        for device in {buffer.device for layer in state.layers for buffer in layer.buffers}:
            synchronize(device)  # what is still being copied is none of this
        clock = _Clock()
        if work.prompt:
            self._read(state, work.prompt)
            first = clock.seconds
        late = isinstance(self._stepper, GraphStepper)
        waiting: deque[_Choice] = deque()
        for step in steps:
            waiting.append(_Choice(step(), late))
            if len(waiting) > late:
                waiting.popleft().wait()
                first = first or clock.seconds
            if self._look is not None and not late and clock.seconds_since_pause > LOOK_SECONDS:
                clock.pause(self._look)
        while waiting:
            waiting.popleft().wait()
        seconds = clock.seconds
        self._go_back(work.depth)
        return Sample(seconds, first or seconds)

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

    def _steps(self, count: int) -> list[Callable[[], Tensor]]:
        """So many steps with random tokens, each of which returns logits [vocab]; a card's tokens lie there already."""
        ids = self._random_ids(count)
        if ids.is_cpu:
            return [partial(self._stepper.step, token_id) for token_id in ids[0].tolist()]
        return [partial(self._feed, each) for each in ids.split(1, dim=1)] if count else []

    def _feed(self, ids: Tensor) -> Tensor:
        return self._stepper.feed(ids)[0]

    def _random_ids(self, tokens: int) -> Tensor:
        """[1, tokens]."""
        vocabulary = self._model.config.vocab_size
        return torch.randint(vocabulary, (1, tokens), generator=self._ids).to(self._model.device)


class _Clock:
    """Counts seconds from its making on, but for its pauses."""

    def __init__(self) -> None:
        self._before = 0.0
        self._start = perf_counter()

    @property
    def seconds_since_pause(self) -> float:
        """What it counted since the last pause, or in all where there was none."""
        return perf_counter() - self._start

    @property
    def seconds(self) -> float:
        """What it counted."""
        return self._before + self.seconds_since_pause

    def pause(self, work: Callable[[], None]) -> None:
        """Do something that does not count."""
        self._before = self.seconds
        work()
        self._start = perf_counter()


class _Choice:
    """The likeliest token, for which the host waits at once or later.

    Later where generation does: a card that captured the step computes the next token while the host shows the last.
    """

    def __init__(self, logits: Tensor, late: bool) -> None:
        self._done: torch.cuda.Event | None = None
        if not late or not logits.is_cuda:
            likeliest(logits)
            return
        self._on_host = logits.argmax().to("cpu", non_blocking=True)
        self._done = torch.cuda.Event()
        self._done.record(torch.cuda.current_stream(logits.device))

    def wait(self) -> None:
        """Until it is known."""
        if self._done is not None:
            self._done.synchronize()


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
