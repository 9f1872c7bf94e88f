"""Turn by turn, the tokens are those of the whole conversation rendered at once, and a turn's cost does not grow."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from support import SHARED, needs_shared
from text_folders import CHATML, INST, byte_fallback_folder, byte_level_folder, real_folders
from toys import ToyModel

from lmx.core.answer import Finished
from lmx.core.sampling import Sampling
from lmx.core.session import ChatSession
from lmx.core.text.tokenizer import Tokenizer

REAL = ("mixtral", "mixtral-22b", "mixtral-old", "dbrx", "gemma", "olmoe-0924", "olmoe-0125", "falcon")
CHECKPOINTS = ("dbrx", "falcon_mamba", "mixtral", "olmoe", "recurrent_gemma")
SAID = (
    ("Hello, who are you?", "I am a small model. Ask me!"),
    ("What is 2 + 3?", "2 + 3 = 5"),
    ("Und auf Deutsch: Grüße?", "Grüße aus Köln, naïve café - 你好 🙂."),
    ("Write code", "```python\nprint('hi')\n```\nThat is all."),
    ("  indented\n\nwith  spaces ", "A list:\n\n1. one\n2. two"),
    ("<|im_end|></s><end_of_turn>[INST] {{ bos_token }} {% raise %}", "No control token here: <s>?"),
    ("Thanks", "Bye"),
    ("One more", "And one more."),
    ("Last", "Done."),
)


class Counting:
    """A tokenizer that counts the characters that it is given to render."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.characters: list[int] = []

    def encode_chat(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> Any:
        self.characters.append(sum(len(message["content"]) for message in messages))
        return self.tokenizer.encode_chat(messages, add_generation_prompt)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


def whole(tokenizer: Tokenizer, system: str | None, turns: int, answered: bool) -> list[int]:
    """The ids of the first turns, rendered at once; of the last one without the answer unless `answered`."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for question, answer in SAID[:turns]:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    ids: list[int] = tokenizer.encode_chat(messages if answered else messages[:-1], not answered).ids  # type: ignore[arg-type]
    return ids


def canonical_answers(tokenizer: Tokenizer, system: str | None) -> list[list[int]]:
    """Each answer in the very tokens that the whole conversation has for it, with the end of turn."""
    answers = []
    for turns in range(1, len(SAID) + 1):
        prompt, full = (whole(tokenizer, system, turns, answered) for answered in (False, True))
        if full[: len(prompt)] != prompt:  # the template moves the system's message once a question is answered
            prompt, full = (whole(tokenizer, None, turns, answered) for answered in (False, True))
        answer, end = full[len(prompt) :], set(tokenizer.info.end_of_turn_ids)
        stop = next((n for n, token in enumerate(answer) if token in end), len(answer) - 1)
        answers.append(answer[: stop + 1])
    return answers


def run(codec: Any, tokenizer: Tokenizer, system: str | None, *, recurrent: bool) -> tuple[ChatSession, list[Finished]]:
    """Say all of it to a model that answers in the canonical tokens."""
    answers = canonical_answers(tokenizer, system)
    said: list[list[int]] = []

    def answer(history: list[int]) -> int | None:
        done = history[len(said[-1]) :]
        expected = answers[len(said) - 1]
        return expected[len(done)] if len(done) < len(expected) else tokenizer.info.end_of_turn_ids[0]

    model = ToyModel(max(tokenizer.info.vocab_size, 8), recurrent=recurrent, context_length=None, answer=answer)
    stops = [] if "<|im_end|>" in tokenizer.decode(tokenizer.info.end_of_turn_ids, False) else ["<|im_end|>"]
    session = ChatSession(model, codec, Sampling(), system=system, stop_strings=stops)  # type: ignore[arg-type]
    finished = []
    for turn, (question, _) in enumerate(SAID):
        session.max_new_tokens = len(answers[turn])
        said.append(whole(tokenizer, system, turn + 1, False))
        finished += [event for event in session.ask(question) if isinstance(event, Finished)]
        assert session.prompt_ids == said[-1], f"turn {turn + 1}"
        assert session.ids == [*said[-1], *answers[turn][: finished[-1].generated_tokens]]
        assert session.messages[-1].content == SAID[turn][1]
    return session, finished


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("turns")
    made: dict[str, Path] = {}
    if (SHARED / "data").is_dir():
        made = dict(real_folders(root))
        made |= {f"checkpoint-{name}": SHARED / "checkpoints" / name for name in CHECKPOINTS}

    def find(name: str) -> Path:
        return made[name]

    return find


@pytest.fixture(scope="module")
def load(folders: Callable[[str], Path]) -> Callable[[str], Tokenizer]:
    return cache(lambda name: Tokenizer.load(folders(name)))


@needs_shared
@pytest.mark.parametrize("recurrent", [False, True], ids=["cache", "recurrence"])
@pytest.mark.parametrize("system", [None, "Be brief, and kind."], ids=["plain", "system"])
@pytest.mark.parametrize("name", [*REAL, *(f"checkpoint-{name}" for name in CHECKPOINTS)])
def test_turn_by_turn_is_the_whole_conversation(
    name: str, system: str | None, recurrent: bool, load: Callable[[str], Tokenizer]
) -> None:
    tokenizer = load(name)
    codec = Counting(tokenizer)
    session, finished = run(codec, tokenizer, system, recurrent=recurrent)
    bos = tokenizer.info.bos_id
    if bos is not None and bos not in tokenizer.info.end_of_turn_ids:
        assert session.ids.count(bos) == (session.ids[0] == bos), "one BOS"
    rewrites = name == "mixtral-22b" and system is not None  # the system's message is moved to the last question
    straddles = name == "falcon"  # its end of turn is no token of its own: the last token of an answer changes
    for turn, event in enumerate(finished[1:], start=1):
        new = len(whole(tokenizer, system, turn + 1, False)) - len(whole(tokenizer, system, turn, True))
        if not rewrites and not straddles:
            # The stop token, which is never fed, and what the template puts behind it
            assert event.computed_prompt_tokens <= new + 2
    longest = max(len(question) + len(answer) for question, answer in SAID)
    if not rewrites:
        assert codec.characters[-1] <= 2 * longest + len(system or ""), "the whole was rendered again"


THINKING = CHATML.replace(
    "m['content']",
    "(m['content'].split('</think>')[-1] if m['role'] == 'assistant' and not loop.last else m['content'])",
)
SUMMARY = (
    "{% for m in messages %}{% if not (messages | length > 6 and loop.index0 < 2) %}"
    "{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRIMMED = CHATML.replace("m['content']", "(m['content'] | trim)")


@pytest.mark.parametrize("recurrent", [False, True], ids=["cache", "recurrence"])
@pytest.mark.parametrize(
    ("template", "answer"),
    [
        (THINKING, "<think>Let me see.</think>Four."),
        (SUMMARY, "Four."),
        (TRIMMED, "Four. \n\n"),
        (TRIMMED, "  Four."),
        (CHATML, "Four. \n\n"),
    ],
    ids=["thinking", "old turns", "trimmed end", "trimmed start", "kept"],
)
def test_a_template_that_rewrites_history_is_followed(
    template: str, answer: str, recurrent: bool, tmp_path: Path
) -> None:
    """The prompt is always that of the whole conversation, and the state holds its beginning."""
    tokenizer = Tokenizer.load(byte_level_folder(tmp_path / "a", template))
    spoken = [*tokenizer.encode(answer), tokenizer.token_to_id("<|im_end|>")]
    prompts: list[int] = []
    model = ToyModel(
        tokenizer.info.vocab_size,
        recurrent=recurrent,
        answer=lambda history: spoken[len(history) - prompts[-1]] if len(history) - prompts[-1] < len(spoken) else None,
    )
    session = ChatSession(model, tokenizer, Sampling(), max_new_tokens=len(spoken))  # type: ignore[arg-type]
    for number in range(1, 9):
        said = [{"role": message.role, "content": message.content} for message in session.messages]
        expected = tokenizer.encode_chat([*said, {"role": "user", "content": f"Number {number}"}]).ids  # type: ignore[list-item]
        prompts.append(len(expected))
        list(session.ask(f"Number {number}"))
        if number & (number - 1) == 0 or template != SUMMARY:
            assert session.prompt_ids == expected
        assert session._keeper.live.rows[0] == session.ids[: session._keeper.live.length]  # type: ignore[union-attr]
    assert session.messages[-1].content == answer


def test_a_system_message_is_merged_and_said(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(byte_fallback_folder(tmp_path / "a", INST))
    codec = Counting(tokenizer)
    session, _ = run(codec, tokenizer, "Be brief", recurrent=False)
    assert session.system_merged
    assert "Be brief\n\nHello" in tokenizer.decode(session.ids, skip_special_tokens=False)


def test_a_new_opening_is_seen_at_once(tmp_path: Path) -> None:
    """A date at the top of the template, say: the turn after midnight reads the conversation again."""
    folder = byte_level_folder(tmp_path / "a", "today\n" + CHATML)
    before, after = Tokenizer.load(folder), Tokenizer.load(byte_level_folder(tmp_path / "b", "tomorrow\n" + CHATML))
    codec = Counting(before)
    session = ChatSession(ToyModel(400), codec, Sampling(), max_new_tokens=4)  # type: ignore[arg-type]
    for number in range(5):
        list(session.ask(f"Number {number}"))
    codec.tokenizer = after
    list(session.ask("Number 5"))
    said = [{"role": message.role, "content": message.content} for message in session.messages[:-1]]
    assert session.prompt_ids == after.encode_chat(said).ids  # type: ignore[arg-type]
