import json
from pathlib import Path
from typing import Any

import pytest


def test_json_is_the_contract_and_true(lmx: Any, checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    ran = lmx("quantize", checkpoint, target, "--json")
    assert ran.code == 0
    report = json.loads(ran.out)
    assert list(report) == [
        *("source", "output", "scheme", "parameters", "quantized_parameters", "source_bytes", "output_bytes"),
        *("peak_memory_bytes", "kept", "error"),
    ]
    assert (report["source"], report["output"], report["scheme"]) == (str(checkpoint), str(target), "nf4")
    assert report["output_bytes"] == sum(file.stat().st_size for file in target.glob("*.safetensors"))
    assert {tuple(entry) for entry in report["kept"]} == {("name", "dtype", "bytes", "reason")}
    assert min(report["error"].values()) > 0
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (target / name).read_bytes() == (checkpoint / name).read_bytes()


def test_a_dry_run_prints_the_same_and_writes_nothing(lmx: Any, checkpoint: Path, tmp_path: Path) -> None:
    arguments = ("quantize", checkpoint, tmp_path / "out", "--json", "--double-quant", "--skip", "o_proj")
    dry = json.loads(lmx(*arguments, "--dry-run").out)
    assert list(tmp_path.iterdir()) == []
    done = json.loads(lmx(*arguments).out)
    for key in ("parameters", "quantized_parameters", "source_bytes", "output_bytes", "kept"):
        assert dry[key] == done[key]


def test_a_dry_run_says_that_its_output_exists(lmx: Any, checkpoint: Path, tmp_path: Path) -> None:
    arguments = ("quantize", checkpoint, tmp_path / "out", "--json", "--dry-run")
    free = lmx(*arguments)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    taken = lmx(*arguments)
    assert (taken.code, free.err) == (0, "")
    assert json.loads(taken.out)["kept"] == json.loads(free.out)["kept"]
    assert "would not be written" in taken.err
    assert "--force" in taken.err
    assert lmx(*arguments, "--force").err == ""


def test_without_a_name_it_is_called_after_model_and_scheme(
    lmx: Any, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert lmx("quantize", checkpoint, "--8bit", "-q").out == ""
    assert [path.name for path in tmp_path.iterdir()] == [f"{checkpoint.name}-int8"]


def test_the_table_says_what_was_kept_and_what_is_worst(lmx: Any, checkpoint: Path, tmp_path: Path) -> None:
    ran = lmx("quantize", checkpoint, tmp_path / "out")
    rows = dict(line.split("\t") for line in ran.out.splitlines())
    assert rows["kept: router"].startswith("2 tensors")
    assert rows["kept: output head"].startswith("1 tensor,")
    assert rows["quantized"].endswith("to nf4")
    assert len([name for name in rows if name.startswith("error")]) >= 1
    assert "done" in ran.err
    shown = lmx("quantize", checkpoint, tmp_path / "out", "--dry-run", terminal=True).out
    assert "(predicted)" in shown


def test_what_exists_is_7_and_force_replaces_it(lmx: Any, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    (tmp_path / "out" / "mine").write_text("x")
    ran = lmx("quantize", checkpoint, tmp_path / "out")
    assert (ran.code, ran.out) == (7, "")
    assert "exists already" in ran.err
    assert lmx("quantize", checkpoint, tmp_path / "out", "--force").code == 0
    assert not (tmp_path / "out" / "mine").exists()


@pytest.mark.parametrize("scheme", ["qint8", "qint4", "qint2", "qfloat8"])
def test_files_of_optimum_quanto_run_and_go_back(lmx: Any, checkpoint: Path, tmp_path: Path, scheme: str) -> None:
    target, plain = tmp_path / "out", tmp_path / "plain"
    report = json.loads(lmx("quantize", checkpoint, target, "--scheme", scheme, "--json").out)
    assert report["scheme"] == scheme
    names = {name.removesuffix(".weight") for name in report["error"]}
    assert json.loads((target / "quanto_qmap.json").read_text()).keys() == names
    assert json.loads(lmx("show", target, "--json").out)["quantization"] == f"{scheme} (optimum-quanto)"
    again = lmx("quantize", target, tmp_path / "again")
    assert (again.code, "quantized already" in again.err) == (3, True)
    assert lmx("convert", target, plain, "-q").code == 0
    assert json.loads(lmx("show", plain, "--json").out)["quantization"] is None
    (tmp_path / "ids.json").write_text("[[1, 2, 3, 4, 5, 6, 7, 8]]")
    found = lmx("eval", target, "--ids", tmp_path / "ids.json", "--against", plain, "--dtype", "fp32", "--json")
    assert abs(json.loads(found.out)["kl_divergence"]) < 1e-6


BAD = [
    (("--4bit", "--8bit"), 2, "exclude each other"),
    (("--scheme", "fp4", "--4bit"), 2, "exclude each other"),
    (("--block-size", "48"), 2, "block size of 48"),
    (("--8bit", "--double-quant"), 2, "int8 has neither"),
    (("--scheme", "q4_k"), 2, "q4_k"),
    (("--scheme", "qint4", "--block-size", "128"), 2, "qint4 has neither"),
    (("--max-memory", "much"), 2, "--max-memory"),
    (("--max-memory", "1MB"), 6, "memory"),
]


@pytest.mark.parametrize(("options", "code", "message"), BAD)
def test_bad_options(
    lmx: Any, checkpoint: Path, tmp_path: Path, options: tuple[str, ...], code: int, message: str
) -> None:
    ran = lmx("quantize", checkpoint, tmp_path / "out", *options)
    assert (ran.code, ran.out) == (code, "")
    assert message in ran.err
    assert list(tmp_path.iterdir()) == []


def test_no_such_model_is_4(lmx: Any, tmp_path: Path) -> None:
    assert lmx("quantize", tmp_path / "nothing").code == 4


def test_the_library_does_the_same(checkpoint: Path, tmp_path: Path) -> None:
    import lmx

    report = lmx.quantize(checkpoint, tmp_path / "out", scheme="int8")
    assert report.scheme == "int8"
    assert (tmp_path / "out" / "tokenizer.json").exists()
