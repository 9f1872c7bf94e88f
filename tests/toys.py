"""A model and a text engine small enough to reason about, with the interfaces of the real ones.

The toy model's memory is the list of tokens it was fed, so that a test can look whether a state holds what it should.
"""

import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from lmx.core.model import Output
from lmx.core.sampling import Chosen, Sampler
from lmx.core.state import StateError
from lmx.core.stepper import one_by_one

SPECIALS = ("<|im_start|>", "<|im_end|>", "<s>")
START, END = 0, 1
CORPUS = (
    "Hello there, my name is Ada. What is your name? I am a small model and I like numbers: one two three.\n"
    "user assistant system the answer is forty-two. Nice to meet you! Goodbye, see you soon. Stop here. STOP now.\n"
)


class ToyState:
    """Remembers each row's tokens; `recurrent`: they cannot be told apart again."""

    def __init__(self, rows: list[list[int]], *, recurrent: bool) -> None:
        self.rows = rows
        self.recurrent = recurrent

    @property
    def length(self) -> int:
        return max(map(len, self.rows))

    @property
    def rewinds(self) -> bool:
        return not self.recurrent

    @property
    def nbytes(self) -> int:
        return 8 * sum(map(len, self.rows))

    def part(self, start: int, end: int) -> "ToyState":
        assert not self.recurrent
        return ToyState([row[start:end] for row in self.rows], recurrent=False)

    def extend(self, part: "ToyState") -> None:
        self.rows = [row + more for row, more in zip(self.rows, part.rows, strict=True)]

    def clone(self) -> "ToyState":
        return ToyState([list(row) for row in self.rows], recurrent=self.recurrent)

    def truncate(self, length: int) -> None:
        if length == self.length:
            return
        if self.recurrent:
            # A stack of layers may cut some before one refuses: such a state must not be used again.
            self.rows = [[-1] for _ in self.rows]
            raise StateError("a recurrence cannot be cut", "Continue from a clone.")
        self.rows = [row[:length] for row in self.rows]


class ToyModel(nn.Module):
    """The next token is a function of all tokens before it.

    `answer`: history -> next token, or None for one that hashing the history chooses. `calls`: (columns of the call).
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        recurrent: bool = False,
        context_length: int | None = 4096,
        answer: Callable[[list[int]], int | None] = lambda history: None,
    ) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=vocab_size)
        self.device = torch.device("cpu")
        self.recurrent = recurrent
        self.context_length = context_length
        self.answer = answer
        self.calls: list[int] = []
        self.grad_was_enabled = False
        self.fails_at_call: int | None = None
        self.error: BaseException = RuntimeError("out of memory")
        self.nan_at_call: int | None = None

    def make_state(self, batch_size: int = 1) -> ToyState:
        return ToyState([[] for _ in range(batch_size)], recurrent=self.recurrent)

    def stepper(self, state: ToyState) -> SimpleNamespace:
        def feed(ids: Tensor) -> Tensor:
            output = self(ids, attention_mask=None, state=state, logits_to_keep=1, output_router_logits=False)
            return output.logits[:, -1]

        @torch.no_grad()
        def step(token_id: int) -> Tensor:
            return feed(torch.tensor([[token_id]]))[0]

        def choices(logits: Tensor, sampler: Sampler, limit: int | None) -> Generator[Chosen, None, None]:
            return one_by_one(step, logits, sampler)

        return SimpleNamespace(feed=feed, choices=choices)

    def forward(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None,
        state: ToyState,
        logits_to_keep: int,
        output_router_logits: bool,
    ) -> Output:
        assert logits_to_keep == 1
        assert not output_router_logits
        self.calls.append(input_ids.shape[1])
        self.grad_was_enabled |= torch.is_grad_enabled()
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        for row, ids, real in zip(state.rows, input_ids.tolist(), mask.tolist(), strict=True):
            row.extend(token for token, kept in zip(ids, real, strict=True) if kept)
            if self.fails_at_call == len(self.calls):
                row.insert(0, -1)  # as if only some layers had been written
                raise self.error
        logits = torch.stack([self.logits(row) for row in state.rows])
        if self.nan_at_call == len(self.calls):
            logits[:, 3] = torch.nan
        return Output(logits[:, None])

    def logits(self, history: list[int]) -> Tensor:
        seed = 7
        for token in history:
            seed = (seed * 1_000_003 + token) % (2**61 - 1)
        logits = torch.randn(self.config.vocab_size, generator=torch.Generator().manual_seed(seed))
        chosen = self.answer(history)
        if chosen is not None:
            logits[chosen] = 12.0
        else:
            logits[: len(SPECIALS)] = -9.0
        return logits


class ToyStream:
    """Decodes everything anew with each token: slow, and plainly right."""

    def __init__(self, decode: Callable[[Sequence[int]], str], context_ids: Sequence[int]) -> None:
        self.decode = decode
        self.ids = list(context_ids)
        self.shown = decode(self.ids)

    def push(self, token_id: int) -> str:
        self.ids.append(token_id)
        text = self.decode(self.ids).rstrip("\ufffd")
        return self._show(text)

    def flush(self) -> str:
        return self._show(self.decode(self.ids))

    def _show(self, text: str) -> str:
        piece = text[len(self.shown) :]
        self.shown = self.shown + piece
        return piece


@dataclass
class ToyText:
    """A byte-level BPE trained on the spot, with ChatML. `with_reply_end`: whether it can say where a reply ends."""

    tokenizer: Tokenizer
    with_reply_end: bool = True
    header: str = ""
    info: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(end_of_turn_ids=(END,)))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def stream(self, context_ids: Sequence[int] = ()) -> ToyStream:
        return ToyStream(self.decode, context_ids)

    def encode_chat(self, messages: Sequence[dict[str, str]], add_generation_prompt: bool = True) -> SimpleNamespace:
        text, end = self.header, None
        for message in messages:
            text += f"<|im_start|>{message['role']}\n{message['content']}"
            end = len(text) if message["role"] == "assistant" else end
            text += "<|im_end|>\n"
        text += "<|im_start|>assistant\n" if add_generation_prompt else ""
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        reply_end = None
        if end is not None and self.with_reply_end:
            reply_end = next(n for n, (start, _) in enumerate(encoding.offsets) if start >= end)
        end_char = None if reply_end is None else end
        return SimpleNamespace(
            text=text, ids=encoding.ids, reply_end=reply_end, reply_end_char=end_char, system_merged=False
        )


def toy_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([CORPUS] * 3, trainer)
    return tokenizer


def replying(text: ToyText, *replies: str | list[int]) -> Callable[[list[int]], int | None]:
    """An `answer` for `ToyModel`: the n-th assistant turn says the n-th reply, then ends its turn.

    A reply of ids is produced token for token. A text is spelled in single bytes, as no tokenizer would encode it.
    """
    marker = text.encode("<|im_start|>assistant\n", add_special_tokens=False)
    spelled = [reply if isinstance(reply, list) else spell(text, reply) for reply in replies]

    def answer(history: list[int]) -> int | None:
        starts = [n + len(marker) for n in range(len(history)) if history[n : n + len(marker)] == marker]
        if not starts or len(starts) > len(spelled):
            return None
        expected, said = spelled[len(starts) - 1], history[starts[-1] :]
        if said != expected[: len(said)]:
            return None
        return expected[len(said)] if len(said) < len(expected) else END

    return answer


def spell(text: ToyText, words: str) -> list[int]:
    """The ids of single bytes."""
    alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    letters = alphabet.pre_tokenize_str(words)[0][0] if words else ""
    return [text.tokenizer.token_to_id(letter) for letter in letters]


class CancelAfter(threading.Event):
    """A cancel that sets itself when it is looked at for the n-th time."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.looks = looks

    def is_set(self) -> bool:
        self.looks -= 1
        return self.looks < 0
