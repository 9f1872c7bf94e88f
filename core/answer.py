"""One sequence's answer while it grows: its tokens, the text that may be shown, and why it ends."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lmx.core.errors import UsageError

if TYPE_CHECKING:
    from lmx.core.text.stream import TextStream

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class PromptProcessed:
    """The prompt has been read, as far as its last token.

    computed_tokens is smaller than prompt_tokens where a kept state held the beginning. seconds: computing only.
    """

    prompt_tokens: int
    computed_tokens: int
    seconds: float


@dataclass(frozen=True)
class Token:
    """One token. `text` is what can be shown now: empty while a character or a possible stop string is incomplete.

    logprob: natural log of the token's probability by the model's own logits.
    """

    id: int
    text: str
    logprob: float


@dataclass(frozen=True)
class Finished:
    """The answer is over.

    `token_ids` ends with the stop token if there was one, and holds those of a stop string; `text` shows neither.
    `text` is the texts of all `Token` events joined, then `tail`: what was held back when a cancel came, else empty.
    The seconds are those spent computing: prompt_seconds up to the logits of the prompt's last token,
    generation_seconds from there on, without the time that the consumer of the events took.
    """

    reason: FinishReason
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    tail: str
    prompt_tokens: int
    computed_prompt_tokens: int
    prompt_seconds: float
    generation_seconds: float

    @property
    def generated_tokens(self) -> int:
        """How many tokens were produced, the stop token included."""
        return len(self.token_ids)

    @property
    def prompt_tokens_per_second(self) -> float:
        """Computed prompt tokens a second; 0 if none were computed."""
        return self.computed_prompt_tokens / self.prompt_seconds if self.prompt_seconds > 0 else 0.0

    @property
    def generated_tokens_per_second(self) -> float:
        """Generated tokens a second, without the first: its logits are the prompt's. 0 if there was no second one."""
        passes = self.generated_tokens - 1
        return passes / self.generation_seconds if passes > 0 and self.generation_seconds > 0 else 0.0


Event = PromptProcessed | Token | Finished


class StopStrings:
    """Cuts a text at the first stop string, however the text arrives in pieces.

    The stop string that is complete first wins; of several that end together, the one that began first. Text that may
    be the beginning of one is held back.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise UsageError("a stop string is empty", "give --stop a text")
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """Take the next piece of text; return what can be shown of it and of what was held back."""
        if self.found or not self._stops:
            return "" if self.found else piece
        text = self._held + piece
        ends = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        self.found = bool(ends)
        shown = min(ends)[1] if ends else len(text) - self._undecided(text)
        self._held = "" if ends else text[shown:]
        return text[:shown]

    def finish(self) -> str:
        """Return what was held back, since no more text comes."""
        held, self._held = self._held, ""
        return held

    def _undecided(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string begins."""
        longest = min(len(text), max(map(len, self._stops)) - 1)
        return next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self._stops)), 0)


class Answer:
    """Takes tokens in until one of them ends the answer; then `reason` is set."""

    def __init__(
        self, stream: "TextStream", stop_strings: Sequence[str], stop_ids: frozenset[int], limit: int | None
    ) -> None:
        """`limit`: the most tokens to take, None for no end; 0 is an answer that is over already."""
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.text = ""
        self.tail = ""
        self.reason: FinishReason | None = "length" if limit == 0 else None
        self._stream = stream
        self._stops = StopStrings(stop_strings)
        self._stop_ids = stop_ids
        self._limit = limit

    def take(self, token_id: int, logprob: float) -> Token:
        """Add a token; the last one's event carries all text that was still held back."""
        self.token_ids.append(token_id)
        self.logprobs.append(logprob)
        is_stop = token_id in self._stop_ids
        text = "" if is_stop else self._stops.push(self._stream.push(token_id))
        if is_stop or self._stops.found:
            self.reason = "stop"
        elif len(self.token_ids) == self._limit:
            self.reason = "length"
        if self.reason is not None:
            text += self._rest()
        self.text += text
        return Token(token_id, text, logprob)

    def cancel(self) -> None:
        """End the answer between two tokens. What was held back becomes the `tail`."""
        self.reason = "cancelled"
        self.tail = self._rest()
        self.text += self.tail

    def _rest(self) -> str:
        """The text that the tokens so far still owe. Half a character's replacement may complete a stop string."""
        rest = self._stops.push(self._stream.flush()) + self._stops.finish()
        if self._stops.found and self.reason == "length":
            self.reason = "stop"
        return rest
