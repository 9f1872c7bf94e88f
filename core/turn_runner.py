"""One turn of a conversation: from a question to the tokens that are new, to the answer's events, to the turn."""

import threading
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from lmx.core.answer import Event, Finished, StopStrings, Token
from lmx.core.context_end import first_kept
from lmx.core.conversation import Message, Turn, path_of
from lmx.core.errors import InputError
from lmx.core.generate import check_prompt, generate
from lmx.core.sampling import Sampling
from lmx.core.snapshots import default_bytes
from lmx.core.state_keeper import StateKeeper
from lmx.core.turn_encoder import Prompt, TurnEncoder

if TYPE_CHECKING:
    from lmx.core.model import LanguageModel
    from lmx.core.text.types import TextCodec

OnFull = Literal["stop", "drop"]
"""Where the context is full: end there, or leave out the oldest turns and read the others again."""


@dataclass(frozen=True)
class Options:
    """How to answer; see `ChatSession`."""

    sampling: Sampling
    max_new_tokens: int | None
    stop_strings: tuple[str, ...]
    on_full: OnFull


@dataclass(frozen=True)
class Question:
    """What is asked behind `head`. number: the turn's own; alive: all turns that some branch has, by their numbers."""

    number: int
    head: Turn | None
    added: tuple[Message, ...]
    system: str | None
    alive: Mapping[int, Turn]


@dataclass(frozen=True)
class Draft:
    """A turn that is being answered. left_out: messages that the model does not read."""

    question: Question
    options: Options
    prompt: Prompt
    left_out: int


class TurnRunner:
    """Answers one question after another, on whatever branch.

    ids: the tokens of the conversation; during an answer they grow. At every event and between turns the live state
    holds a beginning of those that were answered last.
    """

    def __init__(
        self, model: "LanguageModel", codec: "TextCodec", stop_ids: frozenset[int], snapshot_bytes: int | None
    ) -> None:
        self.ids: list[int] = []
        self.system_merged = False
        """Whether the last turn's template had no system role, so that its text went into the first user message."""
        self.keeper = StateKeeper(model, default_bytes() if snapshot_bytes is None else snapshot_bytes)
        self._model = model
        self._codec = codec
        self._stop_ids = stop_ids | frozenset(codec.info.end_of_turn_ids)
        self._encoder = TurnEncoder(codec, self._stop_ids)
        self._prompt_length = 0

    @property
    def prompt_ids(self) -> list[int]:
        """The tokens that the last answer followed."""
        return self.ids[: self._prompt_length]

    def go_to(self, turn: Turn | None) -> None:
        """Let the next question follow `turn`, None for the beginning."""
        self.ids = [] if turn is None else turn.all_ids()
        self._prompt_length = 0 if turn is None else turn.prompt_length

    def begin(self, question: Question, options: Options) -> Draft:
        """Bring ids and state to where the answer begins; whatever can be wrong with the messages is raised first.

        Raises what `TextCodec.encode_chat` and `check_prompt` raise.
        """
        if not question.added or question.added[-1].role != "user":
            raise InputError("the conversation does not end with a user's message", "add a message with the role user")
        prompt, left_out = self._encode(question, options)
        check_prompt(self._model, prompt.ids, prompt.start)
        siblings = [turn for turn in question.alive.values() if turn.parent is question.head and turn.was_read]
        self.ids = list(prompt.ids)
        self._prompt_length = len(prompt.ids)
        self.keeper.bring(self.ids, prompt.start, question.head, siblings, question.alive)
        self.system_merged = prompt.system_merged
        return Draft(question, options, prompt, left_out)

    def events(
        self, draft: Draft, cancel: threading.Event | None, on_end: Callable[[Turn], None]
    ) -> Generator[Event, None, None]:
        """Generate. on_end gets the turn once its answer is over, be it by `cancel` or by closing the iterator.

        After an exception all is as it was before the turn, but that the live state is lost: the model may have been
        stopped between two layers, so that only a copy from before it ran is sure to be whole.
        """
        ended, generated = False, self._generated(draft, cancel)
        try:
            for event in generated:
                if isinstance(event, Token):
                    self.ids.append(event.id)
                if isinstance(event, Finished):
                    ended = True
                    on_end(self._turn(draft))
                yield event
        except GeneratorExit:
            generated.close()  # what a device computed ahead is taken back before the turn is made
            if not ended:
                on_end(self._turn(draft))
            raise
        except BaseException:
            if ended:
                raise
            self.go_to(draft.question.head)
            self.keeper.lose()
            self.keeper.snapshots.forget(draft.question.number)
            raise

    def _encode(self, question: Question, options: Options) -> tuple[Prompt, int]:
        """The prompt, and how many messages are left out of it: as before, or more if they no longer fit."""
        head, added = question.head, question.added
        left_out = 0 if head is None else head.left_out
        prompt = self._encoder.encode(head, self.ids, question.system, left_out, added)
        length = self._model.context_length
        if options.on_full == "stop" or length is None:
            return prompt, left_out
        most = length - (length // 4 if options.max_new_tokens is None else min(length // 4, options.max_new_tokens))
        if len(prompt.ids) <= most:
            return prompt, left_out
        for more in first_kept(path_of(head), left_out, added, len(prompt.ids), length // 2):
            prompt, left_out = self._encoder.encode(head, self.ids, question.system, more, added), more
            if len(prompt.ids) <= most:
                break
        return prompt, left_out

    def _generated(self, draft: Draft, cancel: threading.Event | None) -> Generator[Event, None, None]:
        state, number, options = self.keeper.live, draft.question.number, draft.options
        sampling = options.sampling
        if sampling.seed is not None:
            sampling = replace(sampling, seed=(sampling.seed + number) % 2**63)
        yield from generate(
            self._model,
            self._codec,
            self.prompt_ids,
            sampling=sampling,
            max_new_tokens=options.max_new_tokens,
            stop_strings=options.stop_strings,
            stop_ids=self._stop_ids,
            state=state,
            cancel=cancel,
            before_last=None if state is None or state.rewinds else self.keeper.keep_question(number),
        )

    def _turn(self, draft: Draft) -> Turn:
        """The turn with the answer as far as it came; the live state is from now on the turn's."""
        question, prompt = draft.question, draft.prompt
        reply = self.ids[self._prompt_length :]
        by_token = bool(reply) and reply[-1] in self._stop_ids
        stops = StopStrings(draft.options.stop_strings)
        content = stops.push(self._codec.decode(reply[:-1] if by_token else reply)) + stops.finish()
        turn = Turn(
            number=question.number,
            parent=question.head,
            messages=(*question.added, Message("assistant", content)),
            system=question.system,
            left_out=draft.left_out,
            start=prompt.start,
            ids=tuple(self.ids[prompt.start :]),
            prompt_length=self._prompt_length,
            held=0 if self.keeper.live is None else self.keeper.live.length,
            text_start=prompt.text_start,
            text=prompt.text,
        )
        self.keeper.settle(turn)
        return turn
