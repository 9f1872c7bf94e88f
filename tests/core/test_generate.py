"""Generation on a toy model whose memory can be looked into, and on small Mixtrals against transformers."""

import itertools
import threading

import pytest
import torch
from tokenizers import Tokenizer
from toys import END, CancelAfter, ToyModel, ToyText, replying, spell, toy_tokenizer
from transformers import AutoModelForCausalLM, FalconMambaConfig, MixtralConfig, PreTrainedModel

from lmx.core.answer import Event, Finished, PromptProcessed, Token
from lmx.core.checkpoint import Checkpoint
from lmx.core.errors import InputError, UsageError
from lmx.core.generate import PROMPT_CHUNK, BatchResult, generate, generate_batch, prompt_chunk_for
from lmx.core.loader import load_model
from lmx.core.model import LanguageModel
from lmx.core.sampling import Sampling

GREEDY = Sampling()
STOP = frozenset({END})
VOCAB = 400


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return toy_tokenizer()


@pytest.fixture
def text(tokenizer: Tokenizer) -> ToyText:
    return ToyText(tokenizer)


@pytest.fixture
def chat(text: ToyText) -> list[int]:
    return text.encode("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)


def last(events: list[Event]) -> Finished:
    assert isinstance(events[-1], Finished)
    return events[-1]


def run(model: ToyModel, text: ToyText, prompt: list[int], **options: object) -> list[Event]:
    return list(generate(model, text, prompt, **{"sampling": GREEDY, "stop_ids": STOP, **options}))


def test_events_come_in_order_and_agree_with_each_other(text: ToyText, chat: list[int]) -> None:
    model = ToyModel(VOCAB, answer=replying(text, "Nice to meet you!"))
    events = run(model, text, chat)
    first, *tokens, finished = events
    assert isinstance(first, PromptProcessed)
    assert (first.prompt_tokens, first.computed_tokens) == (len(chat), len(chat))
    assert all(isinstance(token, Token) for token in tokens)
    assert finished.reason == "stop"
    assert finished.token_ids == tuple(token.id for token in tokens) == (*spell(text, "Nice to meet you!"), END)
    assert finished.logprobs == tuple(token.logprob for token in tokens)
    assert finished.text == "".join(token.text for token in tokens) == "Nice to meet you!"
    assert finished.tail == ""
    assert finished.generated_tokens == len(tokens)
    assert (finished.prompt_tokens, finished.computed_prompt_tokens) == (len(chat), len(chat))
    assert finished.prompt_seconds == first.seconds > 0
    assert finished.generation_seconds > 0
    assert finished.generated_tokens_per_second == pytest.approx((len(tokens) - 1) / finished.generation_seconds)


def test_seconds_leave_out_the_consumers_time(text: ToyText, chat: list[int]) -> None:
    events = []
    for event in generate(ToyModel(VOCAB), text, chat, sampling=GREEDY, max_new_tokens=3):
        threading.Event().wait(0.1)
        events.append(event)
    assert last(events).generation_seconds < 0.1
    assert last(events).prompt_seconds < 0.1


def test_logprobs_are_the_models_own(text: ToyText, chat: list[int]) -> None:
    model = ToyModel(VOCAB)
    finished = last(run(model, text, chat, max_new_tokens=6, sampling=Sampling(temperature=0.5, top_k=3, seed=1)))
    history = list(chat)
    for token_id, logprob in zip(finished.token_ids, finished.logprobs, strict=True):
        assert logprob == pytest.approx(model.logits(history).log_softmax(0)[token_id].item(), abs=1e-5)
        history.append(token_id)


@pytest.mark.parametrize("chunk", [1, 2, 5, 512])
def test_the_prompt_is_read_in_chunks(text: ToyText, chat: list[int], chunk: int) -> None:
    model = ToyModel(VOCAB)
    events = run(model, text, chat, max_new_tokens=4, prompt_chunk=chunk)
    assert last(events).token_ids == last(run(ToyModel(VOCAB), text, chat, max_new_tokens=4)).token_ids
    assert model.calls == [min(chunk, len(chat) - n) for n in range(0, len(chat), chunk)] + [1] * 3


def test_the_state_lacks_only_the_last_token_and_continues(text: ToyText, chat: list[int]) -> None:
    model = ToyModel(VOCAB)
    state = model.make_state()
    whole = last(run(model, text, chat, max_new_tokens=9)).token_ids
    ids, computed = list(chat), []
    for _ in range(3):
        events = []
        for event in generate(model, text, ids, sampling=GREEDY, state=state, max_new_tokens=3):
            events.append(event)
            assert state.rows[0] == [*chat, *whole][: state.length]
        ids += last(events).token_ids
        computed.append(last(events).computed_prompt_tokens)
        assert state.rows[0] == ids[:-1]
    assert ids == [*chat, *whole]
    assert computed == [len(chat), 1, 1]


def test_a_state_that_holds_the_whole_prompt_is_refused(text: ToyText, chat: list[int]) -> None:
    model = ToyModel(VOCAB)
    state = model.make_state()
    run(model, text, chat, state=state, max_new_tokens=1)
    with pytest.raises(UsageError, match=f"holds {len(chat)} tokens"):
        run(model, text, chat, state=state)


def test_no_new_tokens_computes_nothing(text: ToyText, chat: list[int]) -> None:
    model = ToyModel(VOCAB)
    events = run(model, text, chat, max_new_tokens=0)
    assert len(events) == 1
    assert (last(events).reason, last(events).token_ids, last(events).computed_prompt_tokens) == ("length", (), 0)
    assert model.calls == []


def test_length_ends_the_answer_with_the_text_still_held_back(text: ToyText, chat: list[int]) -> None:
    model = ToyModel(VOCAB, answer=replying(text, "one <e"))
    events = run(model, text, chat, max_new_tokens=6, stop_strings=["<end>"])
    assert [event.text for event in events[1:-1]] == ["o", "n", "e", " ", "", "<e"]
    assert (last(events).reason, last(events).text) == ("length", "one <e")


@pytest.mark.parametrize("room", [0, 1, 5])
def test_the_context_ends_the_answer(text: ToyText, chat: list[int], room: int) -> None:
    model = ToyModel(VOCAB, context_length=len(chat) + room)
    finished = last(run(model, text, chat))
    assert (finished.reason, finished.generated_tokens) == ("length", room)
    assert last(run(ToyModel(VOCAB, context_length=len(chat) + 9), text, chat, max_new_tokens=2)).generated_tokens == 2


def test_a_model_without_a_context_goes_on_until_stopped(text: ToyText, chat: list[int]) -> None:
    model = ToyModel(VOCAB, context_length=None)
    events = generate(model, text, chat, sampling=GREEDY)
    assert sum(isinstance(event, Token) for event in itertools.islice(events, 400)) == 399
    events.close()


@pytest.mark.parametrize("stop", ["meet", "e to", " you!", "Nice", "t y"])
def test_a_stop_string_across_tokens_never_shows(text: ToyText, chat: list[int], stop: str) -> None:
    reply = "Nice to meet you! And more."
    for spelled in (spell(text, reply), text.encode(reply)):
        events = run(ToyModel(VOCAB, answer=replying(text, spelled)), text, chat, stop_strings=["zzz", stop])
        finished = last(events)
        assert finished.reason == "stop"
        assert finished.text == "".join(e.text for e in events if isinstance(e, Token)) == reply.split(stop)[0]
        said = text.decode(finished.token_ids)
        assert stop in said
        assert stop not in text.decode(finished.token_ids[:-1])


def test_a_stop_id_that_is_ordinary_text_does_not_show(text: ToyText, chat: list[int]) -> None:
    reply = text.encode("Hello there")
    model = ToyModel(VOCAB, answer=replying(text, reply))
    finished = last(run(model, text, chat, stop_ids=frozenset({reply[-1]})))
    assert (finished.reason, finished.token_ids) == ("stop", tuple(reply))
    assert finished.text == text.decode(reply[:-1])


def test_characters_are_never_shown_by_halves(text: ToyText, chat: list[int]) -> None:
    events = run(ToyModel(VOCAB, answer=replying(text, "né 👍 ok")), text, chat)
    pieces = [event.text for event in events if isinstance(event, Token)]
    assert "".join(pieces) == last(events).text == "né 👍 ok"
    assert not any("\ufffd" in piece for piece in pieces)
    assert pieces.count("") == 1 + 3 + 1  # of é one byte waits, of the thumb three, and the stop token is no text


def test_half_a_character_at_the_end_is_replaced(text: ToyText, chat: list[int]) -> None:
    finished = last(run(ToyModel(VOCAB, answer=replying(text, "a👍")), text, chat, max_new_tokens=3))
    assert finished.text == text.decode(finished.token_ids) == "a\ufffd"


@pytest.mark.parametrize("looks", range(9))
def test_a_cancel_between_chunks_and_tokens(text: ToyText, chat: list[int], looks: int) -> None:
    """A cancel is looked at before each call of the model: two chunks, then before each of the tokens."""
    model = ToyModel(VOCAB, answer=replying(text, "a <enough"))
    state = model.make_state()
    cancel = CancelAfter(looks)
    half = -(-len(chat) // 2)
    events = run(model, text, chat, cancel=cancel, state=state, prompt_chunk=half, stop_strings=["<end>"])
    finished = last(events)
    assert finished.reason == "cancelled"
    assert finished.generated_tokens == max(0, looks - 2)
    assert finished.computed_prompt_tokens == min(looks * half, len(chat))
    assert isinstance(events[0], PromptProcessed) == (looks >= 2)
    shown = "".join(event.text for event in events if isinstance(event, Token))
    assert shown + finished.tail == finished.text == text.decode(finished.token_ids)
    everything = [*chat, *finished.token_ids]
    assert state.rows[0] == everything[: state.length]
    assert state.length >= len(everything) - 1 or not finished.token_ids


def test_a_seeded_answer_repeats(text: ToyText, chat: list[int]) -> None:
    def ids(seed: int) -> tuple[int, ...]:
        sampling = Sampling(temperature=1.0, seed=seed)
        return last(run(ToyModel(VOCAB), text, chat, sampling=sampling, max_new_tokens=8)).token_ids

    assert ids(1) == ids(1) != ids(2)


def test_repeat_penalty_sees_the_prompt_and_the_answer(text: ToyText) -> None:
    prompt = text.encode("Hello")
    model = ToyModel(VOCAB, answer=lambda history: prompt[0])
    assert last(run(model, text, prompt, max_new_tokens=1)).token_ids == (prompt[0],)
    penalized = run(model, text, prompt, max_new_tokens=1, sampling=Sampling(repeat_penalty=50.0))
    assert last(penalized).token_ids != (prompt[0],)


def test_the_context_of_the_text_decides_its_first_character(text: ToyText) -> None:
    prompt = spell(text, "caf") + spell(text, "é")[:1]
    model = ToyModel(VOCAB, answer=lambda history: spell(text, "é")[1])
    alone = last(run(model, text, prompt, max_new_tokens=1))
    in_context = last(run(model, text, prompt, max_new_tokens=1, stream_context=spell(text, "caf")))
    assert alone.text == in_context.text == "\ufffd"  # neither holds the first half of é
    spaced = ToyModel(VOCAB, answer=lambda history: text.encode(" name")[0])
    assert (
        last(run(spaced, text, text.encode("my"), max_new_tokens=1, stream_context=text.encode("my"))).text == " name"
    )


@pytest.mark.parametrize(
    ("prompt", "message", "hint"),
    [
        ([], "empty", "at least one token"),
        ([5] * 33, "33 tokens", "context is 32 tokens"),
        ([5, 400], "token id 400", "0 to 399"),
        ([5, -1], "token id -1", "0 to 399"),
    ],
)
def test_bad_prompts_are_refused_before_computing(text: ToyText, prompt: list[int], message: str, hint: str) -> None:
    model = ToyModel(VOCAB, context_length=32)
    with pytest.raises(InputError, match=message) as single:
        run(model, text, prompt)
    assert hint in single.value.hint
    with pytest.raises(InputError, match=message):
        list(generate_batch(model, text, [[5], prompt], batch_size=1, sampling=GREEDY))
    assert model.calls == []


@pytest.mark.parametrize("options", [{"max_new_tokens": -1}, {"stop_strings": [""]}])
def test_bad_options_are_refused_before_computing(text: ToyText, options: dict[str, object]) -> None:
    model = ToyModel(VOCAB)
    with pytest.raises(UsageError):
        run(model, text, [5], **options)
    assert model.calls == []


def test_nan_from_the_model_is_an_input_error(text: ToyText, chat: list[int]) -> None:
    model = ToyModel(VOCAB)
    model.nan_at_call = 2
    with pytest.raises(InputError, match="NaN"):
        run(model, text, chat)


def test_no_gradients_are_recorded_and_the_callers_mode_is_untouched(text: ToyText, chat: list[int]) -> None:
    model = ToyModel(VOCAB)
    for _ in generate(model, text, chat, sampling=GREEDY, max_new_tokens=2):
        assert torch.is_grad_enabled()
    assert not model.grad_was_enabled
    with torch.inference_mode():
        assert last(run(model, text, chat, max_new_tokens=2)).generated_tokens == 2


# Batches


def batch(model: ToyModel, text: ToyText, prompts: list[list[int]], **options: object) -> list[BatchResult]:
    return list(generate_batch(model, text, prompts, **{"sampling": GREEDY, "stop_ids": STOP, **options}))


@pytest.fixture
def prompts(text: ToyText) -> list[list[int]]:
    words = ("Hello there, my name is Ada.", "I", "one two", "see you soon", "What is your name?")
    return [text.encode(prompt) for prompt in words]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
@pytest.mark.parametrize("chunk", [2, 512])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.0, repeat_penalty=1.2, seed=5)])
def test_a_batch_gives_what_each_prompt_gives_alone(
    text: ToyText, prompts: list[list[int]], batch_size: int, chunk: int, sampling: Sampling
) -> None:
    def answer(history: list[int]) -> int | None:
        return END if sum(history) % 5 == 0 else None  # rows end at different times

    options = {"sampling": sampling, "max_new_tokens": 12, "prompt_chunk": chunk, "stop_strings": ["e"]}
    results = batch(ToyModel(VOCAB, answer=answer), text, prompts, batch_size=batch_size, **options)
    assert [result.index for result in results] == list(range(len(prompts)))
    assert [list(result.prompt_ids) for result in results] == prompts
    for result, prompt in zip(results, prompts, strict=True):
        alone = last(run(ToyModel(VOCAB, answer=answer), text, prompt, **options))
        together = result.finished
        assert (together.token_ids, together.text, together.reason) == (alone.token_ids, alone.text, alone.reason)
        assert together.logprobs == pytest.approx(alone.logprobs, abs=1e-5)
        assert (together.prompt_tokens, together.computed_prompt_tokens) == (len(prompt), len(prompt))


def test_rows_that_have_ended_are_padding(text: ToyText, prompts: list[list[int]]) -> None:
    model = ToyModel(VOCAB, context_length=len(prompts[0]) + 2)
    states = []
    make_state = model.make_state
    model.make_state = lambda batch_size: states.append(make_state(batch_size)) or states[-1]
    results = batch(model, text, prompts[:2], batch_size=2, max_new_tokens=7)
    assert [result.finished.generated_tokens for result in results] == [2, 7]
    for row, result in zip(states[0].rows, results, strict=True):
        assert row == [*result.prompt_ids, *result.finished.token_ids[:-1]]


def test_no_new_tokens_in_a_batch_computes_nothing(text: ToyText, prompts: list[list[int]]) -> None:
    model = ToyModel(VOCAB)
    results = batch(model, text, prompts, batch_size=2, max_new_tokens=0)
    assert [result.finished.reason for result in results] == ["length"] * 5
    assert [result.finished.computed_prompt_tokens for result in results] == [0] * 5
    assert model.calls == []


def test_a_cancel_ends_the_batch_and_begins_no_other(text: ToyText, prompts: list[list[int]]) -> None:
    results = batch(ToyModel(VOCAB), text, prompts, batch_size=2, max_new_tokens=9, cancel=CancelAfter(6))
    assert [result.finished.reason for result in results] == ["cancelled"] * 2
    assert [result.finished.generated_tokens for result in results] == [4, 4]
    assert [result.finished.text for result in results] == [text.decode(r.finished.token_ids) for r in results]
    during_prompt = batch(ToyModel(VOCAB), text, prompts, batch_size=2, cancel=CancelAfter(2), prompt_chunk=4)
    assert [result.finished.generated_tokens for result in during_prompt] == [0, 0]
    longest = max(map(len, prompts[:2]))
    expected = [max(0, 4 - (longest - len(prompt))) for prompt in prompts[:2]]
    assert [result.finished.computed_prompt_tokens for result in during_prompt] == expected


def test_a_batch_size_below_one_is_refused(text: ToyText) -> None:
    with pytest.raises(UsageError, match="batch size"):
        batch(ToyModel(VOCAB), text, [[5]], batch_size=0)


# Real families


SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0, "initializer_range": 0.4}
ATTENTION = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
CONFIGS = {
    "mixtral": lambda: MixtralConfig(**SIZES, **ATTENTION, **EXPERTS, eos_token_id=None),
    "mixtral with a window": lambda: MixtralConfig(
        **SIZES, **ATTENTION, **EXPERTS, eos_token_id=None, sliding_window=6
    ),
    "falcon_mamba": lambda: FalconMambaConfig(**SIZES, state_size=4, eos_token_id=None, bos_token_id=None),
}


@pytest.fixture(scope="module", params=list(CONFIGS))
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[LanguageModel, PreTrainedModel]:
    """A model with random weights, ours and the reference."""
    torch.manual_seed(3)
    theirs = AutoModelForCausalLM.from_config(CONFIGS[request.param]()).eval()
    folder = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder)
    return load_model(Checkpoint.open(folder)), theirs


def reference(theirs: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    """Greedy ids by transformers."""
    ids = theirs.generate(torch.tensor([prompt]), max_new_tokens=count, min_new_tokens=count, do_sample=False)
    return ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("chunk", [3, 512])
def test_greedy_ids_are_those_of_transformers(
    pair: tuple[LanguageModel, PreTrainedModel], text: ToyText, prompts: list[list[int]], chunk: int
) -> None:
    ours, theirs = pair
    for prompt in prompts:
        events = generate(ours, text, prompt, sampling=GREEDY, max_new_tokens=24, prompt_chunk=chunk)
        assert list(last(list(events)).token_ids) == reference(theirs, prompt, 24)


def test_a_batch_of_a_real_family_gives_what_transformers_gives_alone(
    pair: tuple[LanguageModel, PreTrainedModel], text: ToyText, prompts: list[list[int]]
) -> None:
    ours, theirs = pair
    for chunk in (4, 512):
        options = {"sampling": GREEDY, "max_new_tokens": 16, "batch_size": 3, "prompt_chunk": chunk}
        for result in generate_batch(ours, text, prompts, **options):
            assert list(result.finished.token_ids) == reference(theirs, list(result.prompt_ids), 16)


def test_logprobs_of_a_real_family(
    pair: tuple[LanguageModel, PreTrainedModel], text: ToyText, prompts: list[list[int]]
) -> None:
    ours, theirs = pair
    sampling = Sampling(temperature=0.8, top_p=0.9, seed=1)
    finished = last(list(generate(ours, text, prompts[0], sampling=sampling, max_new_tokens=12)))
    ids = torch.tensor([[*prompts[0], *finished.token_ids]])
    with torch.no_grad():
        logprobs = theirs(ids).logits[0, len(prompts[0]) - 1 : -1].log_softmax(-1)
    expected = logprobs.gather(1, torch.tensor(finished.token_ids)[:, None])[:, 0].tolist()
    assert finished.logprobs == pytest.approx(expected, abs=2e-4)


def test_a_state_continues_outside_of_generate(
    pair: tuple[LanguageModel, PreTrainedModel], text: ToyText, prompts: list[list[int]]
) -> None:
    """Also in another autograd mode than it grew in."""
    ours, theirs = pair
    state = ours.make_state()
    produced = last(list(generate(ours, text, prompts[0], sampling=GREEDY, max_new_tokens=5, state=state))).token_ids
    assert state.length == len(prompts[0]) + 4
    logits = ours(torch.tensor([produced[-1:]]), state=state).logits[0, -1]
    assert int(logits.argmax()) == reference(theirs, prompts[0], 6)[5]


def test_a_card_reads_more_of_a_prompt_at_once() -> None:
    """As far as a batch leaves room for it."""
    cpu, card = torch.device("cpu"), torch.device("cuda", 0)
    assert [prompt_chunk_for(cpu, rows) for rows in (1, 8)] == [PROMPT_CHUNK] * 2
    assert [prompt_chunk_for(card, rows) for rows in (1, 2, 8)] == [2048, 1024, PROMPT_CHUNK]
