"""A loaded model with its tokenizer and its defaults: what `lmx.load` returns."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Self

import torch

from lmx.core import model as core
from lmx.core.answer import Event
from lmx.core.errors import UsageError
from lmx.core.generate import BatchResult, generate, generate_batch
from lmx.core.sampling import Sampling
from lmx.core.session import ChatSession, OnFull
from lmx.core.text.types import TextCodec


class LanguageModel(core.LanguageModel):
    """A model of one of the five families: call it for logits, or let it generate.

    `tokenizer`: text in and out; `stop_ids`: the tokens that end an answer. Close it, or use it in a `with`, to end
    the process that its tokenizer runs in; it ends with the program in any case.
    """

    def __init__(
        self,
        model: core.LanguageModel,
        tokenizer: TextCodec,
        *,
        stop_ids: frozenset[int],
        defaults: Mapping[str, object],
    ) -> None:
        """Take over `model`'s weights. defaults: the checkpoint's generation_config.json."""
        with torch.device("meta"):
            super().__init__(model.decoder, model.kind, tied=True)
        self.head = model.head
        self.attention, self.shares = model.attention, model.shares
        self.tokenizer = tokenizer
        self.stop_ids = stop_ids
        self._defaults = defaults
        self.train(model.training)

    @cached_property
    def sampling(self) -> Sampling:
        """The checkpoint's own way of choosing tokens. Raises InputError."""
        return Sampling.from_generation_config(self._defaults)

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        sampling: Sampling | None = None,
        max_new_tokens: int | None = 256,
        stop: Sequence[str] = (),
        state: core.AnyState | None = None,
        cancel: threading.Event | None = None,
    ) -> Iterator[Event]:
        """Continue a text, or token ids: yields `PromptProcessed`, a `Token` for each token, then `Finished`.

        sampling: None is the checkpoint's own, e.g. `model.sampling.override(temperature=0)`. max_new_tokens: None goes
        on to the end of the context. state, cancel and errors: see `lmx.core.generate.generate`.
        """
        self._check_causal()
        prompt_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        return generate(
            self,
            self.tokenizer,
            prompt_ids,
            sampling=sampling or self.sampling,
            max_new_tokens=max_new_tokens,
            stop_strings=stop,
            stop_ids=self.stop_ids,
            state=state,
            stream_context=prompt_ids,
            cancel=cancel,
        )

    def generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        batch_size: int = 8,
        sampling: Sampling | None = None,
        max_new_tokens: int | None = 256,
        stop: Sequence[str] = (),
        cancel: threading.Event | None = None,
    ) -> Iterator[BatchResult]:
        """Continue many prompts of token ids, `batch_size` at a time; one result for each, in their order."""
        self._check_causal()
        return generate_batch(
            self,
            self.tokenizer,
            prompts,
            batch_size=batch_size,
            sampling=sampling or self.sampling,
            max_new_tokens=max_new_tokens,
            stop_strings=stop,
            stop_ids=self.stop_ids,
            continue_text=True,
            cancel=cancel,
        )

    def chat(
        self,
        *,
        sampling: Sampling | None = None,
        system: str | None = None,
        max_new_tokens: int | None = None,
        stop: Sequence[str] = (),
        on_full: OnFull = "stop",
        snapshot_bytes: int | None = None,
    ) -> ChatSession:
        """Begin a conversation. max_new_tokens: None goes on to the end of the context.

        on_full: what to do there, "stop" or "drop" the oldest turns. snapshot_bytes: the most memory for copies of the
        state to go back to (see `ChatSession`).
        """
        self._check_causal()
        return ChatSession(
            self,
            self.tokenizer,
            sampling or self.sampling,
            stop_ids=self.stop_ids,
            system=system,
            max_new_tokens=max_new_tokens,
            stop_strings=stop,
            on_full=on_full,
            snapshot_bytes=snapshot_bytes,
        )

    def close(self) -> None:
        """End the tokenizer's process; safe to call twice."""
        self.tokenizer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _check_causal(self) -> None:
        if self.kind != "causal":
            raise UsageError(f"a model with head={self.kind!r} generates no text", "load it with head='causal'")
