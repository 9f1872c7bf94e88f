"""Models of the hub by their headers alone, against the same model on the disk."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import Hub, ask_here, serving
from huggingface_hub import constants
from small_checkpoint import write_checkpoint

from lmx.convert import hub_headers
from lmx.convert.hub import HubId
from lmx.convert.hub_headers import HeaderCheckpoint
from lmx.core.checkpoint import INDEX, Checkpoint
from lmx.core.errors import InputError, LmxError, NetworkError, NotFoundError
from lmx.describe import describe, open_described
from lmx.quantization import Quantization

CARD = "---\nlicense: mit\n---\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_checkpoint(tmp_path_factory.mktemp("model") / "m", vocab_size=4096)
    (folder / "README.md").write_text(CARD)
    (folder / "chat_template.jinja").write_text("")
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path) -> Iterator[Hub]:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(hub_headers, "_FIRST_BYTES", 1 << 10)
    with serving({path.name: path.read_bytes() for path in folder.iterdir()}) as server:
        server.files |= {"consolidated.safetensors": b"", "sub/model.safetensors": b"", "pytorch_model.bin": b""}
        ask_here(server, monkeypatch, tmp_path / "cache")
        yield server


def nothing_is_left(tmp_path: Path) -> bool:
    return not (tmp_path / "cache").exists() and not any((tmp_path / "temporary").iterdir())


def test_the_headers_are_those_of_the_files(hub: Hub, folder: Path, tmp_path: Path) -> None:
    found, whole = HeaderCheckpoint.fetch(HubId("org/tiny")), Checkpoint.open(folder)
    assert found.infos.keys() == whole.infos.keys()
    for name, info in whole.infos.items():
        there = found.infos[name]
        assert (there.dtype, there.shape, there.offset, there.nbytes, there.file.name) == (
            *(info.dtype, info.shape, info.offset, info.nbytes),
            info.file.name,
        )
    assert (found.config, found.generation_config) == (whole.config, whole.generation_config)
    assert hub.sent < whole.total_bytes / 2
    with pytest.raises(InputError, match="only the headers"):
        found.tensor("lm_head.weight")
    del found, there
    assert nothing_is_left(tmp_path)


def test_a_prediction_takes_headers_only(hub: Hub, folder: Path, tmp_path: Path) -> None:
    ours = Quantization.open("org/tiny@v1", "out", headers_only=True)
    report, expected = ours.predict(), Quantization.open(folder, "out").predict()
    assert report.source == "org/tiny@v1"
    without = [{**r.to_json(), "source": "", "peak_memory_bytes": 0} for r in (report, expected)]
    assert without[0] == without[1]
    assert Quantization.open("org/tiny@v1", headers_only=True).target == Path("tiny-nf4")
    assert any("/revision/v1" in call for call in hub.calls)
    del ours
    assert nothing_is_left(tmp_path)


def test_a_description_takes_headers_only(hub: Hub, folder: Path, tmp_path: Path) -> None:
    ours = describe("x", open_described("org/tiny"))
    whole = describe("x", Checkpoint.open(folder))
    assert ours == whole
    assert ours.license == "mit"
    assert nothing_is_left(tmp_path)


def test_offline_nothing_is_asked(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotFoundError, match="the network is off") as caught:
        Quantization.open("org/tiny", headers_only=True, offline=True)
    assert caught.value.hint
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(NotFoundError, match="the network is off"):
        open_described("org/tiny")
    assert hub.calls == []


ANSWERS = [
    (404, "RepoNotFound", NotFoundError),
    (403, "GatedRepo", NotFoundError),
    (503, "", NetworkError),
]


@pytest.mark.parametrize(("status", "code", "kind"), ANSWERS)
def test_the_hubs_refusals(hub: Hub, tmp_path: Path, status: int, code: str, kind: type[LmxError]) -> None:
    hub.status, hub.code = status, code
    with pytest.raises(kind):
        HeaderCheckpoint.fetch(HubId("org/tiny"))
    assert nothing_is_left(tmp_path)


def test_nobody_answers(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(NetworkError):
        HeaderCheckpoint.fetch(HubId("org/tiny"))


def test_a_server_that_knows_no_ranges_is_stopped_early(hub: Hub, folder: Path) -> None:
    hub.ranges = False
    found = HeaderCheckpoint.fetch(HubId("org/tiny"))
    assert found.total_bytes == Checkpoint.open(folder).total_bytes


def test_a_redirect_is_followed_and_takes_no_token_along(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.elsewhere = True
    HeaderCheckpoint.fetch(HubId("org/tiny"))
    assert hub.tokens == {"127.0.0.1": {"Bearer hf_secret"}, "localhost": {None}}


def broken(hub: Hub) -> str:
    return next(name for name in hub.files if name.startswith("model-00001"))


def test_damaged_files_are_refused_under_the_hubs_name(hub: Hub, tmp_path: Path) -> None:
    name = broken(hub)
    whole = hub.files[name]
    for content, words in [
        (whole[:-4], "truncated"),
        ((2**62).to_bytes(8, "little") + whole[8:], "claims"),
        (b"{}", "too few"),
    ]:
        hub.files[name] = content
        with pytest.raises(InputError, match=words) as caught:
            HeaderCheckpoint.fetch(HubId("org/tiny"))
        assert "org/tiny/model-00001" in caught.value.message
        assert str(tmp_path) not in caught.value.message
    del hub.files[name]
    with pytest.raises(InputError, match="missing"):
        HeaderCheckpoint.fetch(HubId("org/tiny"))
    assert nothing_is_left(tmp_path)


def test_an_index_that_leads_out_and_a_config_of_gigabytes(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    index = hub.files[INDEX]
    hub.files[INDEX] = json.dumps({"weight_map": {"a": "../../a.safetensors"}}).encode()
    with pytest.raises(InputError, match="plain"):
        HeaderCheckpoint.fetch(HubId("org/tiny"))
    hub.files[INDEX] = index
    monkeypatch.setattr(hub_headers, "_SMALL_LIMIT_BYTES", len(index) + 1)
    hub.files["config.json"] = b" " * (len(index) + 2)
    with pytest.raises(InputError, match=r"config\.json has more than"):
        HeaderCheckpoint.fetch(HubId("org/tiny"))


def test_pickles_have_no_headers_to_fetch(hub: Hub) -> None:
    for name in [name for name in hub.files if "safetensors" in name]:
        del hub.files[name]
    with pytest.raises(InputError, match="has no safetensors") as caught:
        Quantization.open("org/tiny", headers_only=True)
    assert "download it first" in caught.value.hint
