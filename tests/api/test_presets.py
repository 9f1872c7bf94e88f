import json
from pathlib import Path

import pytest
import torch
from families import config_of
from support import SHARED, needs_shared

from lmx.core.errors import NotFoundError, ResourceError, UsageError
from lmx.core.loader import build
from lmx.core.registry import family_of
from lmx.presets import PRESETS, build_dummy, preset

FILES = {
    "tiiuae/falcon-mamba-7b": "falcon_mamba/config.json",
    "tiiuae/falcon-mamba-7b-instruct": "falcon_mamba/config-instruct.json",
    "google/recurrentgemma-2b": "recurrent_gemma/config-2b.json",
    "google/recurrentgemma-2b-it": "recurrent_gemma/config-2b.json",
    "google/recurrentgemma-9b": "recurrent_gemma/config-9b.DERIVED.json",
    "allenai/OLMoE-1B-7B-0125-Instruct": "olmoe/config-0125-instruct.json",
    "databricks/dbrx-base": "dbrx/config.json",
    "databricks/dbrx-instruct": "dbrx/config.json",
    "mistralai/Mixtral-8x7B-v0.1": "mixtral/config-8x7b.json",
    "mistralai/Mixtral-8x22B-v0.1": "mixtral/config-8x22b.json",
}


@needs_shared
@pytest.mark.parametrize("hub_id", FILES)
def test_presets_are_the_published_configs(hub_id: str) -> None:
    published = json.loads((SHARED / "data" / FILES[hub_id]).read_text())
    family = family_of(published)
    assert family.parse(preset(hub_id)) == family.parse(published)


@needs_shared
def test_olmoe_has_one_shape_in_all_releases() -> None:
    for published in json.loads((SHARED / "data/olmoe/config_sweep.json").read_text())["configs"]:
        ours = PRESETS["allenai/OLMoE-1B-7B-0924"]
        assert {key: ours[key] for key in published if key in ours} == {k: v for k, v in published.items() if k in ours}


# What the hub's model cards and papers give, in billions.
SIZES = [
    ("tiiuae/falcon-mamba-7b", 7.27),
    ("google/recurrentgemma-2b", 2.68),
    ("google/recurrentgemma-9b", 8.58),
    ("allenai/OLMoE-1B-7B-0924", 6.92),
    ("databricks/dbrx-instruct", 131.6),
    ("mistralai/Mixtral-8x7B-v0.1", 46.7),
    ("mistralai/Mixtral-8x22B-v0.1", 140.6),
]


@pytest.mark.parametrize(("hub_id", "billions"), SIZES)
def test_presets_have_the_published_size(hub_id: str, billions: float) -> None:
    with torch.device("meta"):
        model = build(preset(hub_id))
    assert sum(weight.numel() for weight in model.parameters()) / 1e9 == pytest.approx(billions, rel=2e-3)


def test_ids_in_any_case_and_with_a_revision() -> None:
    assert preset("allenai/olmoe-1b-7b-0924@main") is PRESETS["allenai/OLMoE-1B-7B-0924"]


def test_unknown_ids_and_names() -> None:
    with pytest.raises(NotFoundError, match="no model whose size") as caught:
        preset("openai/gpt-2")
    assert "tiiuae/falcon-mamba-7b" in caught.value.hint
    with pytest.raises(UsageError, match="quantize="):
        build_dummy(config_of("olmoe"), "nf5")
    with pytest.raises(UsageError, match="dtype"):
        build_dummy(config_of("olmoe"), dtype="fp8")


def test_what_does_not_fit_is_refused_before_memory_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmx.core.memory.available_memory_bytes", lambda: 24 * 10**9)
    monkeypatch.setattr("lmx.quant.dummy.DummyModel.build", lambda self: pytest.fail("memory was taken"))
    with pytest.raises(ResourceError, match=r"takes 27\.1 GB of memory, and 24\.0 GB are free"):
        build_dummy("mistralai/Mixtral-8x7B-v0.1", "nf4", "int8")


def test_free_memory_is_known_here() -> None:
    from lmx.core.memory import available_memory_bytes

    free = available_memory_bytes()
    assert free is None or 1 << 20 < free < 1 << 50


def test_a_container_limits_memory(tmp_path: Path) -> None:
    from lmx.core.memory import _group_available

    for name, text in (("max", "1000"), ("current", "700"), ("stat", "anon 300\ninactive_file 400\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert _group_available(tmp_path) == 1000 - 700 + 400
    (tmp_path / "memory.max").write_text("max\n")
    assert _group_available(tmp_path) is None
    assert _group_available(tmp_path / "none") is None
