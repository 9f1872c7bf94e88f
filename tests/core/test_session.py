"""Conversations over one kept state: what is computed in a turn, and that the state never lies about what it holds."""

import json
import threading

import pytest
import torch
from support import SHARED, needs_shared
from tokenizers import Tokenizer
from toys import END, CancelAfter, ToyModel, ToyText, replying, spell, toy_tokenizer

from lmx.core.answer import Event, Finished, PromptProcessed, Token
from lmx.core.checkpoint import Checkpoint
from lmx.core.errors import InputError, UsageError
from lmx.core.generate import generate
from lmx.core.loader import load_model
from lmx.core.sampling import Sampling
from lmx.core.session import ChatSession, Message
from lmx.core.text.engine import TextEngine

GREEDY = Sampling()
VOCAB = 400
BOTH = pytest.mark.parametrize("recurrent", [False, True], ids=["cache", "recurrence"])


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return toy_tokenizer()


@pytest.fixture
def text(tokenizer: Tokenizer) -> ToyText:
    return ToyText(tokenizer)


def check(session: ChatSession) -> None:
    """The invariant: the state holds the first tokens of the conversation, and so do the copies kept to go back to."""
    live = session._keeper.live
    if live is not None:
        assert live.rows[0] == session.ids[: live.length]
    alive = session._conversation.alive()
    for (number, place), (copy, nbytes) in session._keeper.snapshots._copies.items():
        ids = alive[number].all_ids() if number in alive else session.ids
        first = alive[number].base if copy.rewinds else 0
        assert copy.rows[0] == ids[first : first + copy.length]
        assert nbytes == copy.nbytes
        if number in alive and not copy.rewinds:
            assert copy.length == (alive[number].held if place == "end" else alive[number].prompt_length - 1)


def talk(session: ChatSession, words: str, cancel: threading.Event | None = None) -> Finished:
    """One turn, checking the invariant at each of its events."""
    events: list[Event] = []
    for event in session.ask(words, cancel):
        events.append(event)
        check(session)
    check(session)
    finished = events[-1]
    assert isinstance(finished, Finished)
    assert session.ids == [*session.prompt_ids, *finished.token_ids]
    return finished


def rendered(text: ToyText, session: ChatSession) -> list[int]:
    """The last prompt as it would be without any kept state."""
    messages = [{"role": m.role, "content": m.content} for m in session.messages[:-1]]
    ids: list[int] = text.encode_chat(messages).ids
    return ids


@BOTH
def test_each_turn_computes_only_what_is_new(text: ToyText, recurrent: bool) -> None:
    replies = ("Nice to meet you!", "Hello there", "Goodbye")
    model = ToyModel(VOCAB, recurrent=recurrent, answer=replying(text, *replies))
    session = ChatSession(model, text, GREEDY, system="I am a small model")
    kept = 0
    for words, reply in zip(("my name is Ada", "one two", "see you"), replies, strict=True):
        finished = talk(session, words)
        assert (finished.reason, finished.text) == ("stop", reply)
        assert session.messages[-2:] == [Message("user", words), Message("assistant", reply)]
        assert finished.computed_prompt_tokens == len(session.prompt_ids) - max(0, kept - 1)
        # The replies were spelled in bytes, and stay so: the conversation goes on with the tokens really produced.
        assert text.tokenizer.decode(session.prompt_ids, skip_special_tokens=False) == text.tokenizer.decode(
            rendered(text, session), skip_special_tokens=False
        )
        kept = len(session.ids)
    assert session.prompt_ids != rendered(text, session)
    assert sum(model.calls) == len(session.ids) - 1
    assert session.context_used == len(session.ids)
    assert session.context_length == 4096


@BOTH
def test_the_answer_is_what_a_fresh_run_over_the_same_tokens_gives(text: ToyText, recurrent: bool) -> None:
    session = ChatSession(ToyModel(VOCAB, recurrent=recurrent), text, GREEDY, max_new_tokens=7)
    for words in ("Hello", "one two three", "I like numbers"):
        finished = talk(session, words)
        fresh = generate(ToyModel(VOCAB), text, session.prompt_ids, sampling=GREEDY, max_new_tokens=7)
        assert list(fresh)[-1].token_ids == finished.token_ids
        assert session.messages[-1].content == finished.text == text.decode(finished.token_ids)


@BOTH
def test_a_reply_cut_by_length_goes_on_exactly(text: ToyText, recurrent: bool) -> None:
    """Its last token was never fed, and the template puts a stop token after it that the model did not produce."""
    model = ToyModel(VOCAB, recurrent=recurrent, answer=replying(text, "Nice to meet you!", "Hello"))
    session = ChatSession(model, text, GREEDY, max_new_tokens=4)
    assert talk(session, "Hello").text == session.messages[-1].content == "Nice"
    before = session.ids
    finished = talk(session, "one")
    assert session.prompt_ids[: len(before) + 1] == [*before, END]
    assert finished.computed_prompt_tokens == len(session.prompt_ids) - len(before) + 1


@BOTH
@pytest.mark.parametrize("looks", range(8))
def test_a_cancelled_answer_stays_and_goes_on_exactly(text: ToyText, recurrent: bool, looks: int) -> None:
    model = ToyModel(VOCAB, recurrent=recurrent, answer=replying(text, "Nice to meet you!", "Hello"))
    session = ChatSession(model, text, GREEDY)
    finished = talk(session, "my name is Ada", CancelAfter(looks))
    reading = 2 if recurrent else 1  # looks while the prompt is read: a recurrence's last token is fed alone
    assert finished.reason == "cancelled"
    assert session.messages == [
        Message("user", "my name is Ada"),
        Message("assistant", "Nice to meet you!"[: max(0, looks - reading)]),
    ]
    before, held = session.ids, session._keeper.live.length
    finished = talk(session, "one")
    assert finished.text == "Hello"
    assert session.prompt_ids[: len(before)] == before
    assert finished.computed_prompt_tokens == len(session.prompt_ids) - held


@BOTH
@pytest.mark.parametrize("events", range(5))
def test_closing_the_iterator_is_a_cancel(text: ToyText, recurrent: bool, events: int) -> None:
    model = ToyModel(VOCAB, recurrent=recurrent, answer=replying(text, "Nice", "Hello"))
    session = ChatSession(model, text, GREEDY)
    turn = session.ask("my name is Ada")
    for _ in range(events):
        next(turn)
    turn.close()
    check(session)
    expected = [] if events == 0 else [Message("user", "my name is Ada"), Message("assistant", "Nice"[: events - 1])]
    assert session.messages == expected
    assert talk(session, "one").text == ("Hello" if events else "Nice")


def test_a_finished_turn_may_be_left_before_its_last_event(text: ToyText) -> None:
    model = ToyModel(VOCAB, answer=replying(text, "Hi STOP", "Hello"))
    session = ChatSession(model, text, GREEDY, stop_strings=["STOP"])
    for event in session.ask("one"):
        if isinstance(event, Token) and event.id == spell(text, "P")[0]:
            break
    assert session.messages[-1] == Message("assistant", "Hi ")


@BOTH
def test_a_stop_string_is_neither_in_the_message_nor_in_the_next_prompt(text: ToyText, recurrent: bool) -> None:
    model = ToyModel(VOCAB, recurrent=recurrent, answer=replying(text, "Nice STOP now", "Hello"))
    session = ChatSession(model, text, GREEDY, stop_strings=["STOP"])
    first = talk(session, "my name is Ada")
    assert (first.reason, first.text, session.messages[-1].content) == ("stop", "Nice ", "Nice ")
    prompt = session.prompt_ids
    second = talk(session, "one")
    assert second.text == "Hello"
    assert session.prompt_ids == rendered(text, session)
    # A cache goes back to where the two differ; a recurrence to the copy from before its prompt's last token.
    assert second.computed_prompt_tokens == len(session.prompt_ids) - (len(prompt) - recurrent)


@BOTH
def test_without_a_reply_end_the_common_beginning_is_kept(text: ToyText, recurrent: bool) -> None:
    text.with_reply_end = False
    model = ToyModel(VOCAB, recurrent=recurrent, answer=replying(text, "Nice", "Hello there", "Goodbye"))
    session = ChatSession(model, text, GREEDY)
    talk(session, "my name is Ada")
    first_prompt = len(session.prompt_ids)
    second = talk(session, "one")
    assert session.prompt_ids == rendered(text, session)
    shared = first_prompt  # the replies are spelled in bytes, which rendering does not do
    assert second.computed_prompt_tokens == len(session.prompt_ids) - (shared - recurrent)
    second_prompt = len(session.prompt_ids)
    held = second_prompt - 1  # a recurrence is answered again from the copy before its prompt's last token
    third = talk(session, "two")
    assert third.text == "Goodbye"
    assert third.computed_prompt_tokens == len(session.prompt_ids) - (held if recurrent else second_prompt)


@BOTH
def test_a_reply_that_renders_to_its_own_tokens_needs_no_reply_end(text: ToyText, recurrent: bool) -> None:
    text.with_reply_end = False
    replies = [text.encode("Nice to meet you!"), text.encode("Hello")]
    session = ChatSession(ToyModel(VOCAB, recurrent=recurrent, answer=replying(text, *replies)), text, GREEDY)
    talk(session, "my name is Ada")
    before = len(session.ids)
    assert talk(session, "one").computed_prompt_tokens == len(session.prompt_ids) - before + 1


@BOTH
def test_where_no_copy_may_be_kept_a_recurrence_reads_again(text: ToyText, recurrent: bool) -> None:
    answer = replying(text, text.encode("Nice to meet you!"), "Hello STOP", "Goodbye")
    model = ToyModel(VOCAB, recurrent=recurrent, answer=answer)
    session = ChatSession(model, text, GREEDY, stop_strings=["STOP"], snapshot_bytes=0)
    talk(session, "my name is Ada")
    talk(session, "one")
    prompt = session.prompt_ids
    # The first reply is rendered as it was produced; of the second, the stop string is not rendered.
    third = talk(session, "two")
    assert session.snapshot_bytes == 0
    assert session.prompt_ids == rendered(text, session)
    assert third.computed_prompt_tokens == len(session.prompt_ids) - (0 if recurrent else len(prompt))
    assert third.text == "Goodbye"


@BOTH
def test_a_template_that_rewrites_the_past_is_followed(text: ToyText, recurrent: bool) -> None:
    """Today's date at its top, say: then what is kept is no longer what the template wants."""
    session = ChatSession(ToyModel(VOCAB, recurrent=recurrent, answer=replying(text, "Nice", "Hello")), text, GREEDY)
    text.header = "<s>today\n"
    talk(session, "my name is Ada")
    text.header = "<s>tomorrow\n"
    second = talk(session, "one")
    assert session.prompt_ids == rendered(text, session)
    assert second.computed_prompt_tokens < len(session.prompt_ids) or recurrent
    assert second.text == "Hello"


@BOTH
def test_a_new_system_message_is_read_from_where_it_stands(text: ToyText, recurrent: bool) -> None:
    model = ToyModel(VOCAB, recurrent=recurrent, answer=replying(text, "Nice", "Hello"))
    session = ChatSession(model, text, GREEDY, system="I am a model")
    talk(session, "my name is Ada")
    session.set_system("I am small")
    check(session)
    assert (session.system, session.messages[0]) == ("I am small", Message("system", "I am small"))
    second = talk(session, "one")
    assert session.prompt_ids == rendered(text, session)
    start = len(text.encode("<|im_start|>system\nI am"))
    assert second.computed_prompt_tokens == len(session.prompt_ids) - (0 if recurrent else start)
    session.set_system(None)
    assert session.system is None
    assert [message.role for message in session.messages] == ["user", "assistant"] * 2


def test_clear_forgets_all_but_the_system_message(text: ToyText) -> None:
    session = ChatSession(ToyModel(VOCAB), text, GREEDY, system="I am a model", max_new_tokens=5)
    first = talk(session, "Hello")
    session.clear()
    assert (session.messages, session.context_used) == ([Message("system", "I am a model")], 0)
    assert talk(session, "Hello").token_ids == first.token_ids
    assert first.computed_prompt_tokens == len(session.prompt_ids)


@BOTH
def test_loaded_messages_are_answered_and_continued(text: ToyText, recurrent: bool) -> None:
    model = ToyModel(VOCAB, recurrent=recurrent, answer=replying(text, "unused", "Hello there", "Goodbye"))
    session = ChatSession(model, text, GREEDY, system="ignored")
    history = [
        Message("system", "I am a model"),
        Message("user", "I"),
        Message("assistant", "Nice"),
        Message("user", "o"),
    ]
    session.load_messages(history)
    finished = list(session.answer())[-1]
    check(session)
    assert session.messages == [*history, Message("assistant", "Hello there")]
    assert session.prompt_ids == rendered(text, session)
    assert finished.computed_prompt_tokens == len(session.prompt_ids)
    kept = len(session.ids) - 1
    assert talk(session, "two").computed_prompt_tokens == len(session.prompt_ids) - kept
    session.load_messages(history[1:])
    assert session.messages == history  # the session's own system message stays
    again = list(session.answer())[-1]
    check(session)
    assert (again.text, again.computed_prompt_tokens) == ("Hello there", len(session.prompt_ids) if recurrent else 1)


def test_loaded_messages_replace_what_was_really_said(text: ToyText) -> None:
    session = ChatSession(ToyModel(VOCAB, answer=replying(text, "Nice", "Hello")), text, GREEDY)
    talk(session, "I")
    session.load_messages([Message("user", "I"), Message("assistant", "Goodbye"), Message("user", "one")])
    list(session.answer())
    check(session)
    assert session.prompt_ids == rendered(text, session)


def test_a_conversation_that_ends_with_an_answer_has_nothing_to_answer(text: ToyText) -> None:
    session = ChatSession(ToyModel(VOCAB), text, GREEDY)
    for messages in ([], [Message("user", "I"), Message("assistant", "Nice")]):
        session.load_messages(messages)
        with pytest.raises(InputError, match="does not end with a user's message"):
            next(session.answer())
        assert session.messages == messages


@BOTH
def test_an_error_leaves_the_session_as_it_was(text: ToyText, recurrent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ToyModel(VOCAB, recurrent=recurrent, answer=replying(text, "Nice", "Hello"))
    session = ChatSession(model, text, GREEDY)
    talk(session, "my name is Ada")
    messages, ids, computed = session.messages, session.ids, sum(model.calls)

    def refuse(*args: object, **kwargs: object) -> None:
        raise InputError("the template refuses", "say something else")

    with monkeypatch.context() as patched:
        patched.setattr(ToyText, "encode_chat", refuse)
        with pytest.raises(InputError, match="refuses"):
            list(session.ask("one"))
    model.context_length = len(ids) + 10
    with pytest.raises(InputError, match="tokens long"):
        list(session.ask("one two three " * 9))
    model.context_length = 4096
    check(session)
    assert (session.messages, session.ids, sum(model.calls)) == (messages, ids, computed)
    assert talk(session, "one").computed_prompt_tokens == len(session.prompt_ids) - len(ids) + 1


@BOTH
@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("call", [1, 3])
def test_a_model_that_breaks_off_half_way_cannot_corrupt_the_session(
    text: ToyText, recurrent: bool, error: BaseException, call: int
) -> None:
    """`ToyModel` leaves its state half written, which no later answer may be built on."""
    model = ToyModel(VOCAB, recurrent=recurrent, answer=replying(text, "Nice", "Hello"))
    session = ChatSession(model, text, GREEDY)
    talk(session, "my name is Ada")
    messages, ids = session.messages, session.ids
    model.fails_at_call, model.error = len(model.calls) + call, error
    with pytest.raises(type(error)):
        list(session.ask("one"))
    check(session)
    assert (session.messages, session.ids) == (messages, ids)
    model.fails_at_call = None
    finished = talk(session, "one")
    assert finished.text == "Hello"
    kept = len(ids) - 1 if recurrent else 0  # a recurrence has its copy from before the turn
    assert finished.computed_prompt_tokens == len(session.prompt_ids) - kept


@BOTH
def test_nan_leaves_the_session_as_it_was(text: ToyText, recurrent: bool) -> None:
    model = ToyModel(VOCAB, recurrent=recurrent, answer=replying(text, "Nice", "Hello"))
    session = ChatSession(model, text, GREEDY)
    talk(session, "my name is Ada")
    messages = session.messages
    model.nan_at_call = len(model.calls) + 2
    with pytest.raises(InputError, match="NaN"):
        list(session.ask("one"))
    check(session)
    assert session.messages == messages
    assert talk(session, "one").text == "Hello"


def test_one_answer_at_a_time(text: ToyText) -> None:
    session = ChatSession(ToyModel(VOCAB, answer=replying(text, "Nice", "Hello")), text, GREEDY)
    turn = session.ask("I")
    assert isinstance(next(turn), PromptProcessed)
    for change in (lambda: next(session.ask("one")), session.clear, lambda: session.set_system("x")):
        with pytest.raises(UsageError, match="still being generated"):
            change()
    list(turn)
    assert talk(session, "one").text == "Hello"


def test_no_new_tokens_shows_how_the_conversation_becomes_ids(text: ToyText) -> None:
    model = ToyModel(VOCAB)
    session = ChatSession(model, text, GREEDY, max_new_tokens=0)
    for words in ("Hello", "one"):
        finished = talk(session, words)
        assert (finished.reason, finished.token_ids) == ("length", ())
        assert session.prompt_ids == rendered(text, session)
    assert model.calls == []


def test_each_turn_draws_with_a_seed_of_its_own(text: ToyText) -> None:
    def conversation(seed: int) -> list[tuple[int, ...]]:
        session = ChatSession(ToyModel(VOCAB), text, Sampling(temperature=1.0, seed=seed), max_new_tokens=5)
        return [talk(session, words).token_ids for words in ("Hello", "Hello")]

    assert conversation(4) == conversation(4)
    assert conversation(4) != conversation(5)
    session = ChatSession(ToyModel(VOCAB), text, Sampling(temperature=1.0, seed=4), max_new_tokens=5)
    talk(session, "Hello")
    second = talk(session, "Hello").token_ids
    alone = generate(
        ToyModel(VOCAB), text, session.prompt_ids, sampling=Sampling(temperature=1.0, seed=5), max_new_tokens=5
    )
    assert list(alone)[-1].token_ids == second


def test_stop_ids_beside_the_templates_own(text: ToyText) -> None:
    reply = text.encode("Hello there")
    model = ToyModel(VOCAB, answer=replying(text, reply, "Goodbye"))
    session = ChatSession(model, text, GREEDY, stop_ids=frozenset({reply[-1]}))
    first = talk(session, "I")
    assert (first.reason, first.text) == ("stop", text.decode(reply[:-1]))
    before = session.ids
    talk(session, "one")
    # The template knows nothing of that stop token: it puts its own after the reply, and the other is dropped.
    assert session.prompt_ids[: len(before)] == [*before[:-1], END]


@needs_shared
@pytest.mark.parametrize("family", ["dbrx", "falcon_mamba", "mixtral", "olmoe", "recurrent_gemma"])
def test_conversations_of_trained_checkpoints(family: str) -> None:
    """Typed one message after another: the ids and replies that transformers gives to each whole conversation."""
    folder = SHARED / "checkpoints" / family
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    model = load_model(Checkpoint.open(folder), dtype=torch.float32)
    continued = 0
    with TextEngine.open(folder, chat=True) as engine:
        session = ChatSession(model, engine, GREEDY, stop_ids=frozenset(expected["stop_ids"]), max_new_tokens=48)
        for case in expected["conversations"]:
            history = [Message(message["role"], message["content"]) for message in case["messages"]]
            if session.messages != history[:-1]:
                session.clear()
                session.load_messages(history[:-1])
            held = session._keeper.live.length if session._keeper.live is not None else 0
            continued += held > 0
            finished = list(session.ask(history[-1].content))[-1]
            assert isinstance(finished, Finished)
            assert session.prompt_ids == case["prompt_ids"]
            assert list(finished.token_ids) == case["greedy_ids"]
            assert session.messages[-1].content == finished.text == case["reply"]
            assert finished.computed_prompt_tokens == len(case["prompt_ids"]) - held
    assert continued > 0
