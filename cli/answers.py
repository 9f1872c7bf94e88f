"""What scripts read: an answer as the contract's JSON object."""

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from lmx.core.answer import Event, Finished, PromptProcessed, Token
from lmx.core.memory import peak_memory_bytes

MERGED = "The template has no system role: the system's message went into the first of yours."


def left_out(messages: int) -> str:
    """What a person should know where the context is full."""
    return f"The context is full: the model no longer reads the first {messages} messages."


def answer_object(model: str, prompt_ids: Sequence[int], finished: Finished) -> dict[str, object]:
    """The object of `lmx generate --json` and `lmx chat --json` (docs/cli.md)."""
    return {
        "model": model,
        "text": finished.text,
        "prompt_ids": list(prompt_ids),
        "token_ids": list(finished.token_ids),
        "logprobs": list(finished.logprobs),
        "finish_reason": finished.reason,
        "prompt_tokens": finished.prompt_tokens,
        "computed_prompt_tokens": finished.computed_prompt_tokens,
        "generated_tokens": finished.generated_tokens,
        "prompt_tokens_per_second": finished.prompt_tokens_per_second,
        "generated_tokens_per_second": finished.generated_tokens_per_second,
        "peak_memory_bytes": peak_memory_bytes(),
    }


def event_object(event: Event, finished_object: dict[str, object] | None = None) -> dict[str, object]:
    """An event of `lmx chat --jsonl`; the last one of an answer carries `answer_object`."""
    if isinstance(event, PromptProcessed):
        counts = {"prompt_tokens": event.prompt_tokens, "computed_prompt_tokens": event.computed_tokens}
        return {"event": "prompt", **counts, "seconds": event.seconds}
    if isinstance(event, Token):
        return {"event": "token", "id": event.id, "text": event.text, "logprob": event.logprob}
    return {"event": "finished", "tail": event.tail, **(finished_object or {})}


@contextmanager
def cancel_on_interrupt() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets, so that generation ends between two tokens; pressed again, it raises at once."""
    cancel = threading.Event()

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        if cancel.is_set():
            raise KeyboardInterrupt
        cancel.set()

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield cancel
    finally:
        signal.signal(signal.SIGINT, before)
