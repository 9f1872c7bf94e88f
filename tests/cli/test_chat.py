import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Chat = Callable[..., list[dict[str, Any]]]
SHORT = ("-n", 6, "--dtype", "fp32")


@pytest.fixture(scope="module")
def answers(lmx: Any, checkpoint: Path) -> Chat:
    def chat(*args: object, stdin: str = "") -> list[dict[str, Any]]:
        ran = lmx("chat", checkpoint, *args, "--json", stdin=stdin)
        assert (ran.code, ran.err) == (0, "")
        return [json.loads(line) for line in ran.out.splitlines()]

    return chat


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Callable[[list[dict[str, str]]], list[int]]:
    """The prompt's ids by transformers."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)

    def encode(messages: list[dict[str, str]]) -> list[int]:
        ids: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        return ids

    return encode


def test_turns_are_one_conversation_and_only_new_tokens_are_computed(lmx: Any) -> None:
    """With the demo model, whose answers are what its template says again: of random weights they are not."""
    turns = ("-p", "Hello", "-p", "What is NF4?", "--prompt", "Thank you")
    ran = lmx("chat", *turns, "--json", "--temperature", 0)
    first, second, third = [json.loads(line) for line in ran.out.splitlines()]
    for before, after in ((first, second), (second, third)):
        kept = before["prompt_ids"] + before["token_ids"]
        assert after["prompt_ids"][: len(kept)] == kept
        # all but the last token produced, whose logits were never needed
        assert after["computed_prompt_tokens"] == after["prompt_tokens"] - len(kept) + 1
    assert first["computed_prompt_tokens"] == first["prompt_tokens"]


def test_prompt_ids_are_those_of_the_template(answers: Chat, reference: Any) -> None:
    (answer,) = answers("-p", "Hello, how are you?", "-n", 0)
    assert answer["prompt_ids"] == reference([{"role": "user", "content": "Hello, how are you?"}])


def test_piped_text_is_one_message(answers: Chat) -> None:
    assert answers(*SHORT, stdin="one\ntwo\n")[0]["prompt_ids"] == answers("-p", "one\ntwo", *SHORT)[0]["prompt_ids"]


def test_messages_answer_the_last_turn(answers: Chat, reference: Any, tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello, how are you?"},
        {"role": "user", "content": "I am fine"},
    ]
    file = tmp_path / "messages.json"
    file.write_text(json.dumps(messages))
    (from_file,) = answers("--messages", file, *SHORT)
    (from_stdin,) = answers("--messages", "-", *SHORT, stdin=json.dumps(messages))
    assert from_file["prompt_ids"] == from_stdin["prompt_ids"] == reference(messages)
    assert from_file["token_ids"] == from_stdin["token_ids"]


def test_a_system_message_is_merged_where_the_template_has_no_such_role(
    lmx: Any, checkpoint: Path, answers: Chat, reference: Any, tmp_path: Path
) -> None:
    merged = reference([{"role": "user", "content": "Be brief\n\nHello"}])
    file = tmp_path / "system.txt"
    file.write_text("Be brief\n")
    assert answers("-p", "Hello", "--system", "Be brief", "-n", 0, "-q")[0]["prompt_ids"] == merged
    assert answers("-p", "Hello", "--system-file", file, "-n", 0, "-q")[0]["prompt_ids"] == merged
    ran = lmx("chat", checkpoint, "-p", "Hello", "--system", "Be brief", "-n", 0)
    assert "no system role" in ran.err


def test_plain_output_is_a_line_an_answer(lmx: Any, answers: Chat, checkpoint: Path) -> None:
    texts = [answer["text"] for answer in answers("-p", "Hello", "-p", "Paris", *SHORT)]
    for form in ((), ("--plain",)):
        ran = lmx("chat", checkpoint, "-p", "Hello", "-p", "Paris", *SHORT, *form)
        assert (ran.code, ran.err) == (0, "")
        assert ran.out == "".join(text + "\n" for text in texts)


def test_jsonl_streams_the_events(lmx: Any, answers: Chat, checkpoint: Path) -> None:
    (whole,) = answers("-p", "Hello", *SHORT)
    events = [json.loads(line) for line in lmx("chat", checkpoint, "-p", "Hello", *SHORT, "--jsonl").out.splitlines()]
    assert [event["event"] for event in events] == ["prompt", *["token"] * 6, "finished"]
    assert [event["id"] for event in events[1:-1]] == whole["token_ids"]
    assert "".join(event["text"] for event in events[1:-1]) + events[-1]["tail"] == whole["text"]
    assert events[-1].keys() == whole.keys() | {"event", "tail"}
    assert events[0]["computed_prompt_tokens"] == len(whole["prompt_ids"])


def test_sampling_and_runtime_options_reach_the_chat(answers: Chat) -> None:
    (greedy,) = answers("-p", "Hello", *SHORT)
    same = ("--temperature", 3, "--seed", 5, "--top-k", 1, "--top-p", 0.9, "--min-p", 0.1)
    runtime = ("--device", "cpu", "--attention", "eager", "--head", "bf16", "--offline", "--on-full", "stop", "-q")
    assert answers("-p", "Hello", *SHORT, *same, *runtime)[0]["token_ids"] == greedy["token_ids"]
    (penalized,) = answers(
        *("-p", "Hello", "-n", 40, "--dtype", "fp32", "--repeat-penalty", 50),
        *("--presence-penalty", 2, "--frequency-penalty", 2, "--stop", "never there"),
    )
    assert len(set(penalized["token_ids"])) > len(set(answers("-p", "Hello", "-n", 40)[0]["token_ids"]))


def test_without_n_the_answer_may_fill_the_context(answers: Chat) -> None:
    (answer,) = answers("-p", "a b " * 500)
    assert answer["finish_reason"] in ("length", "stop")
    if answer["finish_reason"] == "length":
        assert answer["prompt_tokens"] + answer["generated_tokens"] == 2048


def test_on_full_drop_goes_on_where_stop_refuses(lmx: Any, answers: Chat, checkpoint: Path) -> None:
    turns = [word for _ in range(3) for word in ("-p", "a b " * 330)]  # some 800 tokens of 2,048 each
    stopped = lmx("chat", checkpoint, *turns, *SHORT)
    assert (stopped.code, "tokens long" in stopped.err) == (3, True)
    ran = lmx("chat", checkpoint, *turns, *SHORT, "--on-full", "drop", "--json")
    assert ran.code == 0
    assert len(ran.out.splitlines()) == 3
    assert "no longer reads the first" in ran.err


REFUSED = [
    (("--on-full", "keep", "-p", "x"), "--on-full"),
    (("--session", "../x", "-p", "x"), "'../x'"),
    (("--session", "x", "--messages", "m.json"), "--session"),
    (("-p", "x", "--messages", "m.json"), "--messages"),
    (("-p", "x", "--system", "a", "--system-file", "b"), "--system-file"),
    (("-p", "x", "--json", "--jsonl"), "--jsonl"),
    (("-p", "x", "--threads", "0"), "--threads"),
    (("-p", "x", "--gpu-memory", "much"), "--gpu-memory"),
    (("-p", "x", "--revision", "main"), "--revision main"),
    (("-p", "x", "-n", "-1"), "--max-new-tokens"),
    (("-p", "x", "--stop", ""), "--stop"),
    (("-p", "x", "--temperature", "-1"), "temperature"),
    (("-p", "x", "--top-p", "2"), "top_p"),
    (("-p", "x", "--device", "tpu"), "--device"),
    (("-p", "x", "--nonsense"), "--nonsense"),
]


@pytest.mark.parametrize(
    ("args", "named"), REFUSED, ids=lambda value: " ".join(value) if isinstance(value, tuple) else ""
)
def test_wrong_usage_names_the_option(lmx: Any, checkpoint: Path, args: tuple[str, ...], named: str) -> None:
    ran = lmx("chat", checkpoint, *args)
    assert ran.code == 2
    assert ran.out == ""
    assert named in ran.err.splitlines()[0]
    assert len(ran.err.splitlines()) == 2


def test_gpu_memory_and_flash_need_cuda(lmx: Any, checkpoint: Path) -> None:
    for args in (("--gpu-memory", "20GB"), ("--attention", "flash")):
        ran = lmx("chat", checkpoint, "-p", "x", "--device", "cpu", *args)
        assert ran.code == 2
        assert "CUDA" in ran.err.splitlines()[0]
