"""Commands that look at a model of the hub and do not pull it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import Hub, ask_here, serving


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, checkpoint: Path, tmp_path: Path) -> Iterator[Hub]:
    with serving({path.name: path.read_bytes() for path in checkpoint.iterdir()}) as server:
        ask_here(server, monkeypatch, tmp_path / "cache")
        yield server


def test_they_say_what_they_say_of_the_files(lmx: Any, hub: Hub, checkpoint: Path, tmp_path: Path) -> None:
    commands = [("show",), ("quantize", tmp_path / "out", "--dry-run"), ("convert", tmp_path / "out", "--dry-run")]
    for name, *options in commands:
        ours, reference = (lmx(name, model, *options, "--json") for model in ("org/tiny", checkpoint))
        assert (ours.code, reference.code) == (0, 0), ours.err
        facts, expected = json.loads(ours.out), json.loads(reference.out)
        assert facts.get("model", facts.get("source")) == "org/tiny"
        for key in ("model", "source", "peak_memory_bytes"):
            facts.pop(key, None), expected.pop(key, None)
        assert facts == expected
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [("show", "org/tiny"), ("quantize", "org/tiny", "--dry-run")])
def test_offline_is_not_found(lmx: Any, hub: Hub, command: tuple[str, ...]) -> None:
    ran = lmx(*command, "--offline")
    assert (ran.code, ran.out, hub.calls) == (4, "", [])
    assert "without --offline" in ran.err


@pytest.mark.parametrize(("scheme", "shown"), [("nf4", "nf4 (bitsandbytes)"), ("qint8", "qint8 (optimum-quanto)")])
def test_a_quantized_model_is_pulled_to_be_shown(
    lmx: Any, hub: Hub, checkpoint: Path, tmp_path: Path, scheme: str, shown: str
) -> None:
    assert lmx("quantize", checkpoint, tmp_path / "q", "--scheme", scheme).code == 0
    hub.files = {path.name: path.read_bytes() for path in (tmp_path / "q").iterdir()}
    assert json.loads(lmx("show", "org/tiny", "--json").out)["quantization"] == shown
    assert (tmp_path / "cache").exists()
    assert lmx("quantize", "org/tiny", "--dry-run").code == 3
