"""What generation is made of: the run that feeds a model and keeps the time, and the rows whose answers it feeds."""

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lmx.core.answer import Answer, Finished, Token
from lmx.core.errors import UsageError
from lmx.core.sampling import Chosen, Sampler, Sampling

if TYPE_CHECKING:
    from lmx.core.model import AnyState, LanguageModel, Output
    from lmx.core.text.types import TextCodec


@dataclass(frozen=True)
class Options:
    """What all rows of a batch have in common."""

    sampling: Sampling
    max_new_tokens: int | None
    stop_strings: tuple[str, ...]
    stop_ids: frozenset[int]

    def limit(self, model: "LanguageModel", prompt_length: int) -> int | None:
        """The most tokens to generate after a prompt: what was asked for, as far as the context reaches."""
        if self.max_new_tokens is not None and self.max_new_tokens < 0:
            raise UsageError(f"max_new_tokens is {self.max_new_tokens}", "give 0 or more")
        room = None if model.context_length is None else model.context_length - prompt_length
        return min((bound for bound in (self.max_new_tokens, room) if bound is not None), default=None)


class Row:
    """One sequence: its prompt, its sampler and its answer."""

    def __init__(
        self,
        model: "LanguageModel",
        text_engine: "TextCodec",
        prompt_ids: Sequence[int],
        stream_context: Sequence[int],
        options: Options,
    ) -> None:
        self.prompt_ids = prompt_ids
        self.sampler = Sampler(options.sampling, prompt_ids)
        self.limit = options.limit(model, len(prompt_ids))
        self.answer = Answer(text_engine.stream(stream_context), options.stop_strings, options.stop_ids, self.limit)
        self.computed_tokens = 0
        self.generation_seconds = 0.0

    @property
    def active(self) -> bool:
        """Whether the answer goes on."""
        return self.answer.reason is None

    def finished(self, prompt_seconds: float) -> Finished:
        """The closing event of an answer that has ended."""
        return Finished(
            reason=self.answer.reason or "cancelled",
            token_ids=tuple(self.answer.token_ids),
            logprobs=tuple(self.answer.logprobs),
            text=self.answer.text,
            tail=self.answer.tail,
            prompt_tokens=len(self.prompt_ids),
            computed_prompt_tokens=self.computed_tokens,
            prompt_seconds=prompt_seconds,
            generation_seconds=self.generation_seconds,
        )


class Run:
    """Feeds a model and keeps the time."""

    def __init__(self, model: "LanguageModel", state: "AnyState", cancel: threading.Event | None) -> None:
        self.prompt_is_read = False
        self.columns = 0
        self.prompt_seconds = 0.0
        self.generation_seconds = 0.0
        self.logits = torch.empty(0)  # [rows, vocab], of the last column fed
        self._model = model
        self._state = state
        self._cancel = cancel
        self._stepper = model.stepper(state)

    @property
    def must_stop(self) -> bool:
        """Whether a cancel was asked for, or came before the prompt was read."""
        return not self.prompt_is_read or (self._cancel is not None and self._cancel.is_set())

    def read_prompt(self, input_ids: Tensor, mask: Tensor | None, chunk: int) -> None:
        """Feed [rows, length] chunk by chunk, up to a cancel; `columns` counts what was fed."""
        start = perf_counter()
        for first in range(0, input_ids.shape[1], chunk):
            if self._cancel is not None and self._cancel.is_set():
                break
            part = slice(first, first + chunk)
            self.feed(input_ids[:, part], None if mask is None else mask[:, part])
            self.columns = min(first + chunk, input_ids.shape[1])
        self.prompt_is_read = self.columns == input_ids.shape[1]
        if self.logits.device.type != "cpu":  # all that was computed went into them, on whatever devices
            torch.accelerator.synchronize(self.logits.device)
        self.prompt_seconds = perf_counter() - start

    def read_prompt_in_two(self, input_ids: Tensor, before_last: Callable[[], None], chunk: int) -> None:
        """Feed [1, length] as `read_prompt` does, the last token by itself."""
        self.read_prompt(input_ids[:, :-1], None, chunk)
        if not self.prompt_is_read:
            return
        before_last()
        columns, seconds = self.columns, self.prompt_seconds
        self.columns = 0
        self.read_prompt(input_ids[:, -1:], None, chunk)
        self.columns += columns
        self.prompt_seconds += seconds

    # no_grad rather than inference_mode: a state that grew in inference mode could not be continued outside of it.
    @torch.no_grad()
    def feed(self, input_ids: Tensor, mask: Tensor | None) -> None:
        """Run the model over [rows, length] more tokens."""
        if mask is None and input_ids.shape[1] == 1:
            self.logits = self._stepper.feed(input_ids.to(self._model.device))
            return
        output: Output = self._model(
            input_ids=input_ids.to(self._model.device),
            attention_mask=None if mask is None else mask.to(self._model.device),
            state=self._state,
            logits_to_keep=1,
            output_router_logits=False,  # what a config asks for training has no use here
        )
        self.logits = output.logits[:, -1]

    def choices(self, row: Row) -> Generator[Chosen, None, None]:
        """The tokens of a row's answer, for as long as they are asked for; to be closed before the state is used."""
        yield from self._stepper.choices(self.logits[0], row.sampler, row.limit)

    def next_token(self, row: Row, choices: Iterator[Chosen]) -> Token:
        """Let the row take one more token."""
        start = perf_counter()
        chosen = next(choices)
        token = row.answer.take(chosen.token_id, chosen.logprob)
        # A device may have computed while the consumer of the last event was at work.
        self.generation_seconds += max(perf_counter() - start, chosen.seconds)
        row.generation_seconds = self.generation_seconds
        return token

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Count the time spent inside as generation."""
        start = perf_counter()
        yield
        self.generation_seconds += perf_counter() - start
