import csv
import io
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lmx.core import ceilings

KEYS = """model architecture scheme parameters bytes device threads kernels test n_prompt n_gen depth repetitions
tokens_per_second_mean tokens_per_second_stddev samples load_seconds first_token_seconds peak_memory_bytes
bytes_per_token bandwidth_utilization flops_utilization lmx_version torch_version date""".split()  # noqa: SIM905


@pytest.fixture(autouse=True)
def _quick_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = partial(ceilings.measure_ceilings, read_bytes=8 << 20, width=256, rounds=2)
    monkeypatch.setattr(ceilings, "measure_ceilings", quick)


def test_json_has_what_the_contract_says(lmx: Any, checkpoint: Path) -> None:
    import torch

    from lmx.core.native.compiled import kernel_path

    ran = lmx("bench", checkpoint, "-p", "6", "-n", "3", "-d", "0,9", "-r", "2", "-o", "json")
    assert ran.code == 0, ran.err
    rows = json.loads(ran.out)
    assert [(row["test"], row["depth"]) for row in rows] == [("pp6", 0), ("tg3", 0), ("pp6", 9), ("tg3", 9)]
    for row in rows:
        assert set(KEYS) <= set(row)
        assert row["cpu"]
        assert (row["model"], row["architecture"], row["scheme"]) == (str(checkpoint), "Mixtral", "fp32")
        assert (row["device"], row["threads"]) == ("cpu", torch.get_num_threads())
        assert row["kernels"] == kernel_path()
        assert row["repetitions"] == len(row["samples"]) == 2
        assert row["tokens_per_second_mean"] == pytest.approx(sum(row["samples"]) / 2)
        assert min(row["tokens_per_second_mean"], row["load_seconds"], row["first_token_seconds"]) > 0
        assert row["peak_memory_bytes"] > row["bytes"] == 4 * row["parameters"]
    shown = json.loads(lmx("show", checkpoint, "--json").out)
    assert rows[0]["parameters"] == shown["parameters"]


def test_bytes_and_shares_are_those_of_a_count_by_hand(lmx: Any, checkpoint: Path) -> None:
    prompt, step = json.loads(lmx("bench", checkpoint, "-p", "6", "-n", "4", "-d", "10", "-r", "2", "-o", "json").out)
    # float32: 512 tokens, width 32, inner 48, 2 layers, 4 heads of 8 on 2 of keys, 2 of 4 experts
    attention = 2 * 32 * 32 + 2 * 32 * 16
    layer = attention + 2 * 32 + 4 * 32 + 2 * 3 * 32 * 48
    weights = 2 * layer + 32 + 512 * 32 + 32  # the last norm, the head, one row of the embedding
    key = 2 * 2 * 2 * 8 * 4  # keys and values of a token: layers, heads of width 8
    assert step["bytes_per_token"] == 4 * weights + key * (11 + 12 + 13 + 14) / 4
    speed = step["tokens_per_second_mean"] * step["bytes_per_token"]
    assert step["bandwidth_utilization"] == pytest.approx(speed / step["memory_bandwidth"])
    assert (step["flops_utilization"], prompt["bytes_per_token"], prompt["bandwidth_utilization"]) == (None, None, None)
    products = 2 * ((2 * layer + 32) * 6 + 512 * 32)
    seen = 2 * 4 * 32 * sum(range(11, 17))
    assert prompt["flops_utilization"] == pytest.approx(
        (products + seen) / 6 * prompt["tokens_per_second_mean"] / prompt["matrix_flops"]
    )


def test_the_demo_and_every_form(lmx: Any) -> None:
    shape = ("-p", "4", "-n", "2", "-pg", "3,2", "-r", "1")
    lines = lmx("bench", *shape, "-o", "jsonl").out.splitlines()
    objects = [json.loads(line) for line in lines]
    assert [row["test"] for row in objects] == ["pp4", "tg2", "pp3+tg2"]
    assert {row["model"] for row in objects} == {"demo"}
    table = list(csv.DictReader(io.StringIO(lmx("bench", *shape, "-o", "csv").out)))
    assert [row["test"] for row in table] == ["pp4", "tg2", "pp3+tg2"]
    assert list(table[0]) == list(objects[0])
    assert table[0]["bytes_per_token"] == "", "null is nothing"
    assert float(table[0]["samples"]) == pytest.approx(float(table[0]["tokens_per_second_mean"]), rel=1e-4)
    ran = lmx("bench", *shape)
    head, rule, *rows, blank, foot = ran.out.splitlines()
    assert ran.err == ""
    assert {line.count("|") for line in (head, rule, *rows)} == {9}
    assert (len(rows), blank) == (3, "")
    assert "of matrix" in rows[0]
    assert "of memory" in rows[1]
    assert foot.startswith("demo: loaded in ")
    assert "GB/s read" in foot


def test_several_models_ranges_and_zero(lmx: Any, checkpoint: Path) -> None:
    ran = lmx("bench", checkpoint, checkpoint, "-p", "0", "-n1-4*2", "-r", "1", "-o", "jsonl", "--8bit")
    rows = [json.loads(line) for line in ran.out.splitlines()]
    assert [row["test"] for row in rows] == ["tg1", "tg2", "tg4"] * 2
    assert {row["scheme"] for row in rows} == {"int8"}


def test_compare_shows_ratios(lmx: Any, tmp_path: Path) -> None:
    shape = ("-p", "4", "-n", "2", "-r", "1")
    for form in ("json", "jsonl"):
        before = tmp_path / form
        before.write_text(lmx("bench", *shape, "-o", form).out)
        now = json.loads(lmx("bench", "-p", "4", "-n", "3", "-r", "1", "-o", "json", "--compare", before).out)
        text = before.read_text()
        then = json.loads(text)[0] if form == "json" else json.loads(text.splitlines()[0])
        assert now[0]["ratio"] == pytest.approx(now[0]["tokens_per_second_mean"] / then["tokens_per_second_mean"])
        assert now[1]["ratio"] is None, "tg3 was not measured then"
    table = lmx("bench", *shape, "--compare", before).out
    assert "times before" in table.splitlines()[0]
    assert float(table.splitlines()[2].split("|")[-2]) > 0


@pytest.mark.parametrize("text", ["", "[]", "{}", "[1]", "no JSON", '[{"model": "demo"}]', '[{"rows": 1}, 2]'])
def test_compare_refuses_other_files(lmx: Any, tmp_path: Path, text: str) -> None:
    (tmp_path / "before").write_text(text)
    ran = lmx("bench", "-r", "1", "--compare", tmp_path / "before")
    assert (ran.code, ran.out) == (3, "")
    assert "before" in ran.err


def test_a_dummy_needs_no_weights(lmx: Any, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    ran = lmx("bench", tmp_path, "--dummy", "--4bit", "--double-quant", "--head", "int8", "-p4", "-n2", "-r1", "-ojson")
    rows = json.loads(ran.out)
    assert rows[0]["scheme"] == "nf4 double, int8 head"
    assert rows[0]["parameters"] == json.loads(lmx("show", checkpoint, "--json").out)["parameters"]


def test_a_dummy_that_does_not_fit(lmx: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmx.core.memory.available_memory_bytes", lambda: 24 * 10**9)
    ran = lmx("bench", "mistralai/Mixtral-8x7B-Instruct-v0.1", "--dummy", "--4bit", "-r", "1")
    assert (ran.code, ran.out) == (6, "")
    assert "takes 27.3 GB of memory, and 24.0 GB are free" in ran.err
    assert "--4bit" not in ran.err, "it is in four bits already"


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (("-p", "0", "-n", "0"), 2),
        (("-p", "5-1"), 2),
        (("-pg", "5"), 2),
        (("-r", "0"), 2),
        (("-o", "xml"), 2),
        (("--double-quant",), 2),
        (("--4bit", "--8bit"), 2),
        (("--dummy", "openai/gpt-2"), 4),
        (("./nothing-here",), 4),
    ],
)
def test_what_cannot_be_has_an_error_and_a_hint(lmx: Any, args: tuple[str, ...], code: int) -> None:
    ran = lmx("bench", "--offline", *args)
    assert (ran.code, ran.out) == (code, "")
    assert "lmx: hint: " in ran.err


def test_help_has_an_example(lmx: Any) -> None:
    assert "Example: lmx bench " in lmx("bench", "--help").out


def test_a_person_sees_what_is_being_done_and_no_trace_of_it_stays(lmx: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmx.cli.bench.may_animate", lambda: True)
    ran = lmx("bench", "-p", "4", "-n", "0", "-r", "2")
    shown = ran.err.split("\r\x1b[2K")
    assert "demo: measuring the machine" in shown
    assert shown[-5:] == ["demo: pp4 0/2", "demo: pp4 1/2", "demo: pp4 2/2", "", ""]
    assert "\x1b" not in ran.out
    assert lmx("bench", "-p", "4", "-n", "0", "-r", "2", "--quiet").err == ""


def test_what_lies_where_is_said(lmx: Any, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a plan for a `card` that is the CPU; without one nothing is said."""
    import torch

    from lmx import benchmark
    from lmx.core.placement import Budget

    assert lmx("bench", checkpoint, "-p", "3", "-n", "0", "-r", "1").err == ""
    monkeypatch.setattr(benchmark, "choose_budgets", lambda *_: (Budget(torch.device("cpu"), 1 << 30),))
    ran = lmx("bench", checkpoint, "-p", "3", "-n", "0", "-r", "1")
    assert ran.err.startswith(f"{checkpoint}: cpu: 2 of 2 layers, 2 banks of experts, embedding, head; ")
    assert lmx("bench", checkpoint, "-p", "3", "-n", "0", "-r", "1", "-q").err == ""


def test_the_share_is_of_what_memory_gave_beside_the_runs(
    lmx: Any, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first run and after each; a prompt has no need of it, and keeps what was measured before loading."""
    given = iter([1e9, 2e9, 6e9])
    monkeypatch.setattr(ceilings, "bandwidth_beside", lambda device: next(given))
    ran = lmx("bench", checkpoint, "-p", "6", "-n", "3", "-r", "2", "-o", "json")
    assert ran.code == 0, ran.err
    prompt, step = json.loads(ran.out)
    assert step["memory_bandwidth"] == 3e9
    assert step["bandwidth_utilization"] == pytest.approx(
        step["bytes_per_token"] * step["tokens_per_second_mean"] / 3e9
    )
    assert prompt["memory_bandwidth"] not in (1e9, 2e9, 3e9, 6e9)
    assert next(given, None) is None
