"""Answers and conversations whose steps run ahead of the host: the same events, texts and states as without."""

import itertools
from collections.abc import Iterator

import pytest
from device_bank import with_device_banks
from families import FAMILIES, config_of
from frozen_graph import FrozenGraph
from graph_steps import assert_same, torch_alone
from tokenizers import Tokenizer
from toys import CancelAfter, ToyText, toy_tokenizer

from lmx.core.answer import Event, Finished, Token
from lmx.core.generate import generate
from lmx.core.graph_stepper import GraphStepper
from lmx.core.model import AnyState, LanguageModel
from lmx.core.sampling import Sampling
from lmx.core.session import ChatSession
from lmx.presets import build_dummy

SAMPLING = Sampling(temperature=1.0, top_k=40, frequency_penalty=1.0, seed=3)
PROMPT = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"


class AheadModel(LanguageModel):
    """A model whose steppers are those of a card."""

    def stepper(self, state: AnyState) -> GraphStepper:
        return GraphStepper(self, state, FrozenGraph)


@pytest.fixture(autouse=True)
def _torch_alone() -> Iterator[None]:
    with torch_alone():
        yield


@pytest.fixture(scope="module")
def text() -> ToyText:
    tokenizer: Tokenizer = toy_tokenizer()
    return ToyText(tokenizer)


def both(family: str) -> tuple[LanguageModel, LanguageModel]:
    """The same model, without and with steps ahead."""
    plain = with_device_banks(build_dummy(config_of(family, vocab_size=400), None, dtype="fp32"))
    ahead = AheadModel(plain.decoder)
    ahead.head = plain.head
    return plain, ahead.eval()


def comparable(events: list[Event]) -> tuple[list[object], list[float]]:
    """All of the events but the times, and the log probabilities apart."""
    tokens = [event for event in events if isinstance(event, Token)]
    last = events[-1]
    assert isinstance(last, Finished)
    shown = [(token.id, token.text) for token in tokens]
    ends = last.reason, last.token_ids, last.text, last.tail, last.computed_prompt_tokens
    return [*shown, ends], [token.logprob for token in tokens]


def assert_alike(one: list[Event], other: list[Event]) -> None:
    (mine, my_logs), (theirs, their_logs) = comparable(one), comparable(other)
    assert mine == theirs
    assert my_logs == pytest.approx(their_logs, abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_way_an_answer_ends(family: str, text: ToyText) -> None:
    plain, ahead = both(family)
    ids = text.encode(PROMPT, add_special_tokens=False)

    def answer(model: LanguageModel, state: AnyState, **options: object) -> list[Event]:
        return list(generate(model, text, ids, sampling=SAMPLING, state=state, max_new_tokens=25, **options))

    free = answer(plain, plain.make_state())
    tokens = [event for event in free if isinstance(event, Token)]
    assert len(tokens) == 25
    stop = "".join(token.text for token in tokens[4:8])
    for options in (
        {},
        {"stop_ids": frozenset({tokens[6].id})},
        {"stop_strings": (stop,)},
        {"prompt_chunk": 5, "before_last": lambda: None},
    ):
        one, other = plain.make_state(), ahead.make_state()
        assert_alike(answer(ahead, other, **options), answer(plain, one, **options))
        assert_same(one, other)
    for looks in range(7):
        one, other = plain.make_state(), ahead.make_state()
        events = answer(ahead, other, cancel=CancelAfter(looks))
        assert_alike(events, answer(plain, one, cancel=CancelAfter(looks)))
        assert_same(one, other)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("taken", [2, 3, 5])
def test_an_answer_that_is_left_leaves_a_whole_state(family: str, taken: int, text: ToyText) -> None:
    plain, ahead = both(family)
    ids = text.encode(PROMPT, add_special_tokens=False)
    states = []
    for model in (plain, ahead):
        states.append(model.make_state())
        events = generate(model, text, ids, sampling=SAMPLING, state=states[-1])
        assert len(list(itertools.islice(events, taken))) == taken
        events.close()
    assert_same(*states)


@pytest.mark.parametrize("family", ["olmoe", "falcon_mamba", "recurrent_gemma"])
def test_a_conversation_goes_on(family: str, text: ToyText) -> None:
    plain, ahead = both(family)
    one, other = (ChatSession(model, text, SAMPLING, max_new_tokens=12) for model in (plain, ahead))

    def turn(session: ChatSession, words: str, most: int) -> list[Event]:
        events = session.ask(words)
        try:
            return list(itertools.islice(events, most))
        finally:
            events.close()

    for words, most in (("Hello", 99), ("What is your name?", 6), ("And then?", 99)):
        mine, theirs = turn(other, words, most), turn(one, words, most)
        if most == 99:
            assert_alike(mine, theirs)
        assert one.ids == other.ids
        assert other._conversation.head.held == one._conversation.head.held == other._keeper.live.length
        assert_same(one._keeper.live, other._keeper.live)
    assert_alike(list(other.regenerate()), list(one.regenerate()))
    assert_same(one._keeper.live, other._keeper.live)
