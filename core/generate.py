"""Generation as an iterator of typed events: read the prompt in chunks, then choose one token at a time.

At every event the state holds a beginning of `prompt_ids + token_ids`: its first `state.length` tokens. After
`Finished` that is all of them but the last one produced, whose logits were never needed; a caller continues by
generating from `prompt_ids + token_ids + more` with the same state.

To interrupt, set the `cancel` event: it is looked at between chunks and between tokens, never inside the model, so the
state stays as said above. An exception that strikes inside the model (KeyboardInterrupt without a handler that sets
`cancel` instead, out of memory) may leave some layers ahead of others: drop that state, or a clone taken before serves.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lmx.core.answer import Event, Finished, PromptProcessed
from lmx.core.errors import InputError, UsageError
from lmx.core.generation import Options, Row, Run
from lmx.core.sampling import Sampling, sample_rows

if TYPE_CHECKING:
    from lmx.core.model import AnyState, LanguageModel
    from lmx.core.text.types import TextCodec

PROMPT_CHUNK = 512
"""Prompt tokens a forward pass: bounds the memory of a long prompt, and how long a cancel waits."""

_CARD_CHUNK = 2048


def prompt_chunk_for(device: torch.device, rows: int = 1) -> int:
    """The same for a model on a device: a card dequantizes all weights once a pass, for as many tokens as there are.

    At 7B in NF4 that takes about what the products of 500 tokens do (counted, not measured).
    """
    return max(PROMPT_CHUNK, _CARD_CHUNK // rows) if device.type == "cuda" else PROMPT_CHUNK


def check_prompt(model: "LanguageModel", prompt_ids: Sequence[int], known: int = 0) -> None:
    """Raise `InputError` for a prompt that is empty, longer than the context, or not of the model's vocabulary.

    known: tokens at its beginning that the model has taken before.
    """
    if not prompt_ids:
        raise InputError("the prompt is empty", "give at least one token: this tokenizer adds none of its own")
    if model.context_length is not None and len(prompt_ids) > model.context_length:
        raise InputError(
            f"the prompt is {len(prompt_ids):,} tokens long",
            f"shorten it: the model's context is {model.context_length:,} tokens",
        )
    vocab = model.config.vocab_size
    new_ids = prompt_ids[known:] or prompt_ids
    if min(new_ids) < 0 or max(new_ids) >= vocab:
        bad = next(index for index in new_ids if not 0 <= index < vocab)
        raise InputError(f"the prompt holds the token id {bad}", f"the model's ids are 0 to {vocab - 1}")


def generate(
    model: "LanguageModel",
    text_engine: "TextCodec",
    prompt_ids: Sequence[int],
    *,
    sampling: Sampling,
    max_new_tokens: int | None = None,
    stop_strings: Sequence[str] = (),
    stop_ids: frozenset[int] = frozenset(),
    state: "AnyState | None" = None,
    stream_context: Sequence[int] = (),
    cancel: threading.Event | None = None,
    before_last: Callable[[], None] | None = None,
    prompt_chunk: int | None = None,
) -> Iterator[Event]:
    """Continue `prompt_ids`: yields `PromptProcessed`, one `Token` for each token, then `Finished`.

    max_new_tokens: None goes on to the end of the context, or for ever where a model has none; 0 computes nothing.
    stop_ids: tokens that end the answer.
    state: one that already holds the first `state.length` tokens of the prompt, at most all but one: only the rest is
    computed. It is advanced in place, and may be cut to any of its tokens by the caller afterwards.
    stream_context: the ids that the answer's text follows on, so that its first space is decided as in one text;
    without them the text is what decoding the answer alone gives.
    cancel: ends the answer with the reason "cancelled" once it is set.
    prompt_chunk: prompt tokens a forward pass; None for what suits the device.
    before_last: called when the state holds all of the prompt but its last token, which is then fed alone: a copy of
    the state taken there answers the same prompt again, to the same bits.

    Raises, at the first event and before computing: `InputError` for a bad prompt (see `check_prompt`), `UsageError`
    for bad options; while computing: `InputError` if the model produces NaN.
    """
    state = model.make_state(1) if state is None else state
    check_prompt(model, prompt_ids, min(state.length, len(prompt_ids)))
    if state.length >= len(prompt_ids):
        raise UsageError(
            f"the state holds {state.length} tokens and the prompt only {len(prompt_ids)}",
            "continue with at least one new token, or cut the state first",
        )
    options = Options(sampling, max_new_tokens, tuple(stop_strings), stop_ids)
    row = Row(model, text_engine, prompt_ids, stream_context, options)
    run = Run(model, state, cancel)
    prompt_chunk = prompt_chunk or prompt_chunk_for(model.device)
    if row.active:
        new_ids = torch.tensor([prompt_ids[state.length :]])
        if before_last is None:
            run.read_prompt(new_ids, None, prompt_chunk)
        else:
            run.read_prompt_in_two(new_ids, before_last, prompt_chunk)
        row.computed_tokens = run.columns
    if run.prompt_is_read:
        yield PromptProcessed(len(prompt_ids), run.columns, run.prompt_seconds)
    with closing(run.choices(row)) as choices:
        while row.active:
            if run.must_stop:
                row.answer.cancel()
                break
            yield run.next_token(row, choices)
    yield row.finished(run.prompt_seconds)


@dataclass(frozen=True)
class BatchResult:
    """What became of `prompts[index]`. The seconds in `finished` are those of its whole batch, up to this row's end."""

    index: int
    prompt_ids: tuple[int, ...]
    finished: Finished


def generate_batch(
    model: "LanguageModel",
    text_engine: "TextCodec",
    prompts: Sequence[Sequence[int]],
    *,
    batch_size: int,
    sampling: Sampling,
    max_new_tokens: int | None = None,
    stop_strings: Sequence[str] = (),
    stop_ids: frozenset[int] = frozenset(),
    continue_text: bool = False,
    cancel: threading.Event | None = None,
    prompt_chunk: int | None = None,
) -> Iterator[BatchResult]:
    """Continue every prompt, `batch_size` of them at a time, left-padded; yields one result a prompt, in their order.

    Each row chooses, stops and seeds as `generate` would for its prompt alone; continue_text gives each its prompt as
    `stream_context`. A cancel ends the running batch, whose unfinished rows get the reason "cancelled"; later batches
    are not begun. Raises as `generate` does; a bad prompt anywhere is found before anything is computed.
    """
    if batch_size < 1:
        raise UsageError(f"the batch size is {batch_size}", "give --batch-size 1 or more")
    for prompt_ids in prompts:
        check_prompt(model, prompt_ids)
    options = Options(sampling, max_new_tokens, tuple(stop_strings), stop_ids)
    prompt_chunk = prompt_chunk or prompt_chunk_for(model.device, batch_size)
    for first in range(0, len(prompts), batch_size):
        if cancel is not None and cancel.is_set():
            return
        batch = prompts[first : first + batch_size]
        rows = [Row(model, text_engine, ids, ids if continue_text else (), options) for ids in batch]
        run = Run(model, model.make_state(len(batch)), cancel)
        finished = _finish_batch(run, rows, prompt_chunk)
        for index, (prompt_ids, result) in enumerate(zip(batch, finished, strict=True), start=first):
            yield BatchResult(index, tuple(prompt_ids), result)


def _finish_batch(run: Run, rows: list[Row], prompt_chunk: int) -> list[Finished]:
    """Run a batch until all of its rows have ended."""
    if any(row.active for row in rows):
        input_ids, mask = _left_padded([row.prompt_ids for row in rows])
        run.read_prompt(input_ids, mask, prompt_chunk)
        for row, computed in zip(rows, mask[:, : run.columns].sum(1).tolist(), strict=True):
            row.computed_tokens = computed
    while active := [number for number, row in enumerate(rows) if row.active]:
        if run.must_stop:
            for number in active:
                rows[number].answer.cancel()
            break
        with run.generating():
            if rows[active[0]].answer.token_ids:
                run.feed(*_next_column(rows))
            choices = sample_rows([rows[number].sampler for number in active], run.logits[active])
            for number, choice in zip(active, choices, strict=True):
                rows[number].answer.take(*choice)
        for number in active:
            rows[number].generation_seconds = run.generation_seconds
    return [row.finished(run.prompt_seconds) for row in rows]


def _next_column(rows: list[Row]) -> tuple[Tensor, Tensor]:
    """Each row's last token and the mask, both [rows, 1]; a row that has ended is padding from then on."""
    column = [row.answer.token_ids[-1] if row.active else 0 for row in rows]
    return torch.tensor(column)[:, None], torch.tensor([row.active for row in rows])[:, None]


def _left_padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids and mask, both [rows, longest]; the mask is False for padding."""
    longest = max(map(len, prompts))
    input_ids = torch.tensor([[0] * (longest - len(ids)) + list(ids) for ids in prompts])
    lengths = torch.tensor([len(ids) for ids in prompts])
    return input_ids, torch.arange(longest)[None] >= longest - lengths[:, None]
