import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support import run_lmx

from lmx.core.native.compiled import kernel_path


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(checkpoint, tmp_path / "copy")


def test_facts_are_those_of_transformers(lmx: Any, checkpoint: Path) -> None:
    from transformers import MixtralForCausalLM

    model = MixtralForCausalLM.from_pretrained(checkpoint)
    shown = json.loads(lmx("show", checkpoint, "--json").out)
    assert shown["model"] == str(checkpoint)
    assert (shown["architecture"], shown["model_type"]) == ("Mixtral", "mixtral")
    assert shown["parameters"] == model.num_parameters()
    experts = sum(weight.numel() for name, weight in model.named_parameters() if ".experts." in name)
    assert shown["active_parameters"] == model.num_parameters() - experts // 2, "two of four experts"
    assert shown["weight_bytes"] == model.num_parameters() * 4
    assert (shown["dtype"], shown["quantization"], shown["kernels"]) == ("f32", None, kernel_path())
    assert shown["size_on_disk"] == sum(file.stat().st_size for file in checkpoint.iterdir())
    assert shown["context_length"] == shown["state_context"] == 2048
    # keys and values, 2 layers, 2 heads of width 8, in float32
    assert shown["state_bytes"] == 2 * 2 * 2 * 8 * 4 * 2048
    assert shown["memory_to_run"] == shown["weight_bytes"] + shown["state_bytes"]
    assert shown["chat_template"] == "chat_template.jinja"


@pytest.mark.parametrize("path", ["torch", "portable"])
def test_the_kernels_in_use_are_named(path: str) -> None:
    there = kernel_path() != "torch"
    shown = json.loads(run_lmx("show", "--json", env={"LMX_KERNELS": path}).stdout)
    assert shown["kernels"] == (path if there else "torch")


def test_a_path_that_nobody_knows_is_refused() -> None:
    shown = run_lmx("show", env={"LMX_KERNELS": "avx1024"})
    assert shown.returncode == 2
    assert shown.stderr.splitlines() == [
        "lmx: error: LMX_KERNELS is 'avx1024'",
        "lmx: hint: known are portable, avx2, avx512, neon, amx, torch; unset, the best one",
    ]


def test_the_state_estimate_is_what_a_run_takes(checkpoint: Path) -> None:
    import torch

    from lmx.core.checkpoint import Checkpoint
    from lmx.core.loader import load_model

    model = load_model(Checkpoint.open(checkpoint))
    state = model.make_state()
    with torch.no_grad():
        model(torch.ones(1, 300, dtype=torch.long), state=state)
    assert 0.5 * state.nbytes <= state.nbytes_at(300) <= state.nbytes


LICENSES = [
    ({"README.md": "---\nlicense: apache-2.0 # free\ntags: [x]\n---\nA model"}, "apache-2.0"),
    ({"README.md": "---\nlicense: other\nlicense_name: 'falcon-llm-license'\n---\n"}, "falcon-llm-license"),
    ({"README.md": "license: mit, says the text, not the front matter"}, "not stated"),
    ({"LICENSE.txt": "Do as you like"}, "see LICENSE.txt"),
    ({}, "not stated"),
]


@pytest.mark.parametrize(("files", "stated"), LICENSES)
def test_license(tmp_path: Path, files: dict[str, str], stated: str) -> None:
    from lmx.describe import license_of

    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert license_of(tmp_path) == stated


def test_text_is_a_fact_a_line(lmx: Any, copy: Path) -> None:
    (copy / "chat_template.jinja").unlink()
    (copy / "README.md").write_text("---\nlicense: \x1b[31mred\n---\n")
    ran = lmx("show", copy, "--offline", "-q")
    assert (ran.code, ran.err) == (0, "")
    rows = dict(line.split("\t") for line in ran.out.splitlines())
    assert rows["architecture"] == "Mixtral (mixtral)"
    assert rows["chat template"] == "none"
    assert rows["license"] == "␛[31mred"
    assert rows["context length"] == "2,048 tokens"
    assert "\x1b" not in ran.out


def test_a_revision_is_for_the_hub(lmx: Any, checkpoint: Path) -> None:
    assert lmx("show", checkpoint, "--revision", "main").code == 2


def test_weights_that_do_not_fit_the_config_are_refused(lmx: Any, copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    ran = lmx("show", copy)
    assert ran.code == 3
    assert "layers.2." in ran.err


def test_it_is_a_table_on_a_terminal(lmx: Any, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = lmx("show", checkpoint, terminal=True).out
    monkeypatch.setenv("NO_COLOR", "1")
    plain = lmx("show", checkpoint, terminal=True).out
    assert "\x1b[" in coloured
    assert "\x1b[" not in plain
    assert "architecture" in plain
    assert "Mixtral (mixtral)" in plain


def test_placement_is_planned_for_a_card_of_that_size(lmx: Any, checkpoint: Path) -> None:
    folder, facts = checkpoint, json.loads(lmx("show", checkpoint, "--json").out)
    total, state = facts["weight_bytes"], facts["state_bytes"]
    assert facts["placement"] == []
    whole = json.loads(lmx("show", folder, "--json", "--gpu-memory", "1GB").out)["placement"]
    assert [(share["device"], share["layers"], share["banks"]) for share in whole] == [("cuda:0", 2, 2)]
    assert whole[0]["nbytes"] == total + state
    half = lmx("show", folder, "--gpu-memory", str((total * 3 // 4 + state) * 8 // 7)).out
    rows = [line.split("\t")[1] for line in half.splitlines() if line.startswith("placement")]
    assert [row.partition(":")[0] for row in rows] == ["cpu", "cuda"]
    assert "2 of 2 layers, 1 bank of experts, head" in rows[1]
    assert "embedding" in rows[0]
    assert lmx("show", folder, "--gpu-memory", "much").code == 2
