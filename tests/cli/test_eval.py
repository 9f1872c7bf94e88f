import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from support import SHARED, needs_shared

TEXT = "Hello there, my name is Ada. What is your name? " * 20
COMPARED = {"kl_divergence", "top1_agreement", "routing_agreement", "state_drift"}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    path = tmp_path / "ids.json"
    path.write_text("[[3, 4, 5, 6, 7], [8, 9, 10]]")
    return path


def test_perplexity_of_a_text_is_that_of_transformers(lmx: Any, checkpoint: Path, text: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    total = tokens = 0.0
    for start in range(0, len(ids), 31):
        row = torch.tensor([[tokenizer.bos_token_id, *ids[start : start + 31]]])
        with torch.no_grad():
            total += model(row, labels=row).loss.item() * (row.shape[1] - 1)
        tokens += row.shape[1] - 1
    found = json.loads(lmx("eval", checkpoint, "--text", text, "--context", 32, "--json").out)
    assert found.keys() == {"perplexity", "nll", "tokens"}
    assert found["tokens"] == tokens == len(ids)
    assert found["nll"] == pytest.approx(total / tokens, abs=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-5)


def test_runtime_options_are_the_models_and_not_the_bases(lmx: Any, checkpoint: Path, ids: Path) -> None:
    def run(*options: str) -> dict[str, float]:
        ran = lmx("eval", checkpoint, "--ids", ids, "--against", checkpoint, "--json", *options)
        assert ran.code == 0, ran.err
        found: dict[str, float] = json.loads(ran.out)
        return found

    same = run()
    assert same.keys() == {"perplexity", "nll", "tokens"} | COMPARED
    assert (same["tokens"], same["kl_divergence"], same["top1_agreement"], same["routing_agreement"]) == (6, 0, 1, 1)
    assert same["state_drift"] is None
    divergence = [run(*options)["kl_divergence"] for options in (("--8bit",), ("--4bit",), ("--4bit", "--head", "nf4"))]
    assert 0 < divergence[0] < divergence[1]
    assert divergence[2] != divergence[1]


def test_people_get_a_table(lmx: Any, checkpoint: Path, ids: Path) -> None:
    lines = lmx("eval", checkpoint, "--ids", ids, "--against", checkpoint).out.splitlines()
    assert [line.split("\t")[0] for line in lines][:4] == ["perplexity", "nll", "tokens", "kl divergence"]
    assert lines[-1] == "state drift\tnone in this family"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "either --text or --ids"),
        (("--text", "TEXT", "--ids", "IDS"), 2, "either --text or --ids"),
        (("--ids", "IDS", "--context", "10"), 2, "--context cuts a --text"),
        (("--text", "TEXT", "--context", "100000"), 2, "beyond the model's"),
        (("--text", "no-such-file"), 4, "does not exist"),
        (("--ids", "TEXT"), 3, "text.txt"),
        (("--ids", "IDS", "--4bit", "--8bit"), 2, "exclude each other"),
        (("--ids", "IDS", "--against", "no-such-folder/x/y"), 4, "no-such-folder"),
    ],
)
def test_bad_usage(
    lmx: Any, checkpoint: Path, text: Path, ids: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    given = [{"TEXT": text, "IDS": ids}.get(argument, argument) for argument in arguments]
    ran = lmx("eval", checkpoint, *given)
    assert ran.code == code
    assert message in ran.err


@pytest.mark.parametrize(
    "content", ["{}", "[]", "[1, 2]", "[[1, true]]", "[[1.5, 2]]", '[["a"]]', "[[1, 99999999999]]"]
)
def test_malformed_ids(lmx: Any, checkpoint: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "bad.json").write_text(content)
    ran = lmx("eval", checkpoint, "--ids", tmp_path / "bad.json")
    assert ran.code == 3
    assert "bad.json" in ran.err


def test_quantize_checks_the_output_before_it_gets_its_name(
    lmx: Any, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    out, command = tmp_path / "out", ("quantize", checkpoint, tmp_path / "out", "--4bit", "--check", text)
    ran = lmx(*command, "--max-kl", "1e-9")
    assert ran.code == 3
    assert "KL divergence" in ran.err
    assert not out.exists()
    ran = lmx(*command, "--max-kl", "10")
    assert ran.code == 0, ran.err
    assert "going on after the 100%" in ran.err, "only the check had to be done again"
    told = float(re.search(r"source: ([0-9.]+) nats", ran.err)[1])  # type: ignore[index]
    found = json.loads(lmx("eval", out, "--text", text, "--against", checkpoint, "--json").out)
    assert told == pytest.approx(found["kl_divergence"], abs=1e-6)
    assert told > 1e-4
    assert lmx("quantize", checkpoint, tmp_path / "other", "--max-kl", "1").code == 2


def test_a_quantized_model_is_shown_and_converted_back(lmx: Any, checkpoint: Path, ids: Path, tmp_path: Path) -> None:
    assert lmx("quantize", checkpoint, tmp_path / "out", "--4bit").code == 0
    shown, before = (json.loads(lmx("show", folder, "--json").out) for folder in (tmp_path / "out", checkpoint))
    assert (shown["quantization"], shown["dtype"]) == ("nf4 (bitsandbytes)", "f32")
    assert shown["parameters"] == before["parameters"]
    # widths are small: the embedding, the head and the tables weigh much
    assert shown["weight_bytes"] < before["weight_bytes"] * 0.6
    ran = lmx("convert", tmp_path / "out", tmp_path / "plain", "--dtype", "fp32", "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["parameters"] == before["parameters"]
    found = lmx("eval", tmp_path / "plain", "--ids", ids, "--against", tmp_path / "out", "--json")
    assert json.loads(found.out)["kl_divergence"] < 1e-9
    assert lmx("convert", tmp_path / "out", tmp_path / "plain").code == 7
    assert lmx("eval", tmp_path / "out", "--ids", ids, "--4bit").code == 2


@needs_shared
def test_a_trained_checkpoint_by_its_ids(lmx: Any, tmp_path: Path) -> None:
    folder = SHARED / "checkpoints" / "falcon_mamba"
    expected = json.loads((folder / "expected.json").read_text())
    (tmp_path / "ids.json").write_text(json.dumps(expected["eval_ids"][:8]))
    ran = lmx(
        "eval", folder, "--ids", tmp_path / "ids.json", "--dtype", "fp32", "--8bit", "--against", folder, "--json"
    )
    found = json.loads(ran.out)
    assert found["routing_agreement"] is None
    assert 0 < found["state_drift"] < 0.1
    assert 0 < found["kl_divergence"] < 1e-4
