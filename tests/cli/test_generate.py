import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

PROMPT = "The quick brown fox"
FIELDS = {
    "model": str,
    "text": str,
    "prompt_ids": list,
    "token_ids": list,
    "logprobs": list,
    "finish_reason": str,
    "prompt_tokens": int,
    "computed_prompt_tokens": int,
    "generated_tokens": int,
    "prompt_tokens_per_second": float,
    "generated_tokens_per_second": float,
    "peak_memory_bytes": int,
}

Generate = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def answers(lmx: Any, checkpoint: Path) -> Generate:
    def generate(*args: object, stdin: str = "") -> list[dict[str, Any]]:
        ran = lmx("generate", checkpoint, *args, "--json", stdin=stdin)
        assert (ran.code, ran.err) == (0, "")
        return [json.loads(line) for line in ran.out.splitlines()]

    return generate


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Callable[[list[int], int], tuple[list[int], list[float]]]:
    """Greedy ids and their log probabilities by transformers."""
    from transformers import MixtralForCausalLM

    model = MixtralForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)

    def greedy(prompt: list[int], count: int) -> tuple[list[int], list[float]]:
        out = model.generate(
            torch.tensor([prompt]),
            do_sample=False,
            max_new_tokens=count,
            output_logits=True,
            return_dict_in_generate=True,
        )
        ids = out.sequences[0, len(prompt) :].tolist()
        return ids, [step[0].log_softmax(-1)[i].item() for step, i in zip(out.logits, ids, strict=True)]

    return greedy


def test_greedy_ids_and_logprobs_are_those_of_transformers(answers: Generate, reference: Any) -> None:
    (answer,) = answers(PROMPT, "-n", 12, "--dtype", "fp32", "--temperature", 0)
    ids, logprobs = reference(answer["prompt_ids"], 12)
    assert answer["token_ids"] == ids
    assert answer["logprobs"] == pytest.approx(logprobs, abs=1e-4)


def test_the_object_has_the_contracts_fields(answers: Generate, checkpoint: Path) -> None:
    (answer,) = answers(PROMPT, "-n", 5)
    assert {name: type(value) for name, value in answer.items()} == FIELDS
    assert answer["model"] == str(checkpoint)
    assert answer["prompt_tokens"] == answer["computed_prompt_tokens"] == len(answer["prompt_ids"])
    assert answer["generated_tokens"] == len(answer["token_ids"]) == len(answer["logprobs"]) == 5
    assert answer["finish_reason"] == "length"
    assert answer["prompt_ids"][0] == 1, "BOS, as the tokenizer's post-processor adds it"
    assert answer["peak_memory_bytes"] > 10**8


def test_prompts_come_as_argument_stdin_ids_or_file(answers: Generate, tmp_path: Path) -> None:
    (given,) = answers(PROMPT, "-n", 6)
    (piped,) = answers("-n", 6, stdin=PROMPT + "\n")
    (ids,) = answers("-n", 6, "--prompt-ids", ",".join(map(str, given["prompt_ids"])))
    assert piped["token_ids"] == ids["token_ids"] == given["token_ids"]
    lines = tmp_path / "prompts.txt"
    lines.write_text(f"{PROMPT}\nHello\n\u2028x\n")
    text = answers("-n", 6, "--file", lines, "--batch-size", 2)
    assert [answer["token_ids"] for answer in text[:1]] == [given["token_ids"]]
    assert len(text) == 3


def test_batches_give_what_single_prompts_give(answers: Generate, tmp_path: Path) -> None:
    prompts = [{"prompt": PROMPT}, {"prompt_ids": [1, 9, 7]}, {"prompt": "x"}, {"prompt_ids": [5] * 40}]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    single = answers("--file", file, "--batch-size", 1, "-n", 8, "--dtype", "fp32")
    batched = answers("--file", file, "--batch-size", 3, "-n", 8, "--dtype", "fp32")
    assert [answer["token_ids"] for answer in batched] == [answer["token_ids"] for answer in single]
    assert [answer["prompt_ids"][-1:] for answer in batched][1::2] == [[7], [5]]


def test_plain_output_is_the_generated_text_alone(
    lmx: Any, answers: Generate, checkpoint: Path, tmp_path: Path
) -> None:
    (answer,) = answers(PROMPT, "-n", 6)
    ran = lmx("generate", checkpoint, PROMPT, "-n", 6)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out == answer["text"] + "\n"
    file = tmp_path / "p"
    file.write_text(f"{PROMPT}\n{PROMPT}\n")
    assert lmx("generate", checkpoint, "--file", file, "-n", 6).out.count("\n") == 2


def test_zero_tokens_show_the_prompt(answers: Generate) -> None:
    (answer,) = answers("Hello", "-n", 0)
    assert answer["token_ids"] == answer["logprobs"] == []
    assert answer["text"] == ""
    assert answer["computed_prompt_tokens"] == 0
    assert len(answer["prompt_ids"]) > 1


def test_a_stop_string_is_cut_from_the_text_and_kept_in_the_ids(answers: Generate) -> None:
    (free,) = answers(PROMPT, "-n", 12)
    stop = free["text"][2:5]
    (answer,) = answers(PROMPT, "-n", 12, "--stop", "never there", "--stop", stop)
    assert answer["finish_reason"] == "stop"
    assert answer["text"] == free["text"][: free["text"].index(stop)]
    assert answer["token_ids"] == free["token_ids"][: len(answer["token_ids"])]
    assert len(answer["token_ids"]) < 12


def test_a_seed_fixes_the_draw(answers: Generate) -> None:
    def draw(*args: object) -> list[int]:
        ids: list[int] = answers(PROMPT, "-n", 12, "--temperature", 1.5, *args)[0]["token_ids"]
        return ids

    assert draw("--seed", 1) == draw("--seed", 1) != draw("--seed", 2)


GREEDY_AGAIN = [("--top-k", 1), ("--top-p", 0.0), ("--min-p", 1.0)]


@pytest.mark.parametrize("option", GREEDY_AGAIN)
def test_each_truncation_reaches_the_sampler(answers: Generate, option: tuple[str, float]) -> None:
    (greedy,) = answers(PROMPT, "-n", 8)
    (cut,) = answers(PROMPT, "-n", 8, "--temperature", 2, "--seed", 3, *option)
    assert cut["token_ids"] == greedy["token_ids"]


@pytest.mark.parametrize("option", [("--repeat-penalty", 50), ("--presence-penalty", 2), ("--frequency-penalty", 2)])
def test_each_penalty_reaches_the_sampler(answers: Generate, option: tuple[str, float]) -> None:
    (plain,) = answers("--prompt-ids", ",".join(["7"] * 4), "-n", 60, "--dtype", "fp32")
    (penalized,) = answers("--prompt-ids", ",".join(["7"] * 4), "-n", 60, "--dtype", "fp32", *option)
    assert len(set(penalized["token_ids"])) > len(set(plain["token_ids"]))


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_runtime_options_that_change_no_answer(answers: Generate, dtype: str) -> None:
    (answer,) = answers(
        *(PROMPT, "-n", 3, "--dtype", dtype, "--device", "cpu", "--threads", torch.get_num_threads()),
        *("--attention", "eager" if dtype == "fp32" else "sdpa", "--head", "bf16", "--offline", "-q"),
    )
    (plain,) = answers(PROMPT, "-n", 3)
    assert answer["logprobs"] == pytest.approx(plain["logprobs"], abs=0.1)
    assert all(math.isfinite(value) for value in answer["logprobs"])


def test_threads_are_set(answers: Generate) -> None:
    before = torch.get_num_threads()
    try:
        answers(PROMPT, "-n", 0, "--threads", 1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_control_characters_reach_json_but_not_the_terminal(lmx: Any, checkpoint: Path, tmp_path: Path) -> None:
    """The last 256 ids of the vocabulary are bytes; a model that produces ESC [ must not colour the screen."""
    from lmx.core.text.tokenizer import Tokenizer

    escape = Tokenizer.load(checkpoint).token_to_id("<0x1B>")
    model = _always(checkpoint, tmp_path / "escape", escape)
    assert json.loads(lmx("generate", model, "x", "-n", 3, "--json").out)["text"] == "\x1b" * 3
    assert lmx("generate", model, "x", "-n", 3).out == "␛" * 3 + "\n"


def _always(checkpoint: Path, folder: Path, token_id: int | None) -> Path:
    """A checkpoint whose every next token is the same."""
    from transformers import MixtralForCausalLM

    assert token_id is not None
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    model = MixtralForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        # The stream is all ones from end to end, and only one row of the head answers to it.
        model.model.embed_tokens.weight.fill_(1.0)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.experts.down_proj.zero_()
        model.lm_head.weight.zero_()
        model.lm_head.weight[token_id] = 1.0
    model.save_pretrained(folder)
    return folder
