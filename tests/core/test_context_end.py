"""Where the context ends: attention models stop or leave the oldest turns out, the others go on."""

import pytest
from toys import ToyModel, ToyText, replying, toy_tokenizer

from lmx.core.answer import Finished
from lmx.core.errors import InputError
from lmx.core.generate import generate
from lmx.core.sampling import Sampling
from lmx.core.session import ChatSession

ANSWERS = ["Nice to meet you!"] * 40
CONTEXT = 300


@pytest.fixture(scope="module")
def text() -> ToyText:
    return ToyText(toy_tokenizer())


def chat(text: ToyText, **options: object) -> ChatSession:
    model = ToyModel(400, context_length=CONTEXT)
    spoken = text.encode("Nice to meet you!")
    marker = text.encode("<|im_start|>assistant\n", add_special_tokens=False)

    def answer(history: list[int]) -> int:
        starts = [n + len(marker) for n in range(len(history)) if history[n : n + len(marker)] == marker]
        said = len(history) - starts[-1]
        return spoken[said] if said < len(spoken) else 1

    model.answer = answer
    return ChatSession(model, text, Sampling(), system="I am a model", **options)  # type: ignore[arg-type]


def test_stop_says_so_before_and_at_the_end(text: ToyText) -> None:
    session = chat(text)
    turns = 0
    while not session.is_nearly_full:
        finished = list(session.ask(f"Hello {turns}"))[-1]
        assert isinstance(finished, Finished)
        turns += 1
    assert CONTEXT * 7 / 8 < session.context_used < CONTEXT
    with pytest.raises(InputError, match="tokens long"):
        list(session.ask("one two three " * 20))
    assert (len(session.turns), session.left_out) == (turns, 0)


def test_drop_leaves_the_oldest_turns_out_and_keeps_the_system(text: ToyText) -> None:
    session = chat(text, on_full="drop")
    left_out, computed = [], []
    for number in range(40):
        finished = list(session.ask(f"Hello {number}"))[-1]
        assert isinstance(finished, Finished)
        assert (finished.reason, finished.text) == ("stop", "Nice to meet you!")
        messages = session.messages
        kept = [messages[0], *messages[1 + session.left_out : -1]]
        assert kept[1].role == "user"
        expected = text.encode_chat([{"role": m.role, "content": m.content} for m in kept]).ids
        assert session.prompt_ids == expected, "what is read is the conversation without what was left out"
        assert len(expected) <= CONTEXT * 3 // 4
        left_out.append(session.left_out)
        computed.append(finished.computed_prompt_tokens)
        fresh = list(generate(session._model, text, expected, sampling=Sampling(), stop_ids=frozenset({1})))[-1]
        assert fresh.token_ids == finished.token_ids  # type: ignore[union-attr]
    assert left_out == sorted(left_out)
    drops = [n for n in range(1, 40) if left_out[n] != left_out[n - 1]]
    assert 3 <= len(drops) <= 15, "some turns go at once, so that the others are not read again each time"
    for n in range(2, 40):
        if n not in drops:
            assert computed[n] < 20
    assert len(session.messages) == 81, "the person still sees all of it"
    session.undo(39)
    finished = list(session.ask("Hello?"))[-1]
    assert isinstance(finished, Finished)
    assert session.left_out == 0
    assert finished.computed_prompt_tokens < 20, "the part of the first turn was kept when it was left out"


def test_a_message_that_is_longer_than_the_context_is_refused(text: ToyText) -> None:
    session = chat(text, on_full="drop")
    list(session.ask("Hello"))
    with pytest.raises(InputError, match="tokens long"):
        list(session.ask("one two three " * 600))
    assert len(session.turns) == 1
    assert list(session.ask("Hello again"))[-1].text == "Nice to meet you!"  # type: ignore[union-attr]


def test_a_model_without_an_end_goes_on(text: ToyText) -> None:
    model = ToyModel(400, recurrent=True, context_length=None, answer=replying(text, *ANSWERS))
    session = ChatSession(model, text, Sampling(), on_full="drop")  # type: ignore[arg-type]
    for number in range(40):
        list(session.ask(f"Hello {number}"))
        assert not session.is_nearly_full
    assert session.left_out == 0
