"""Finding models. The hub is a server of our own that speaks the few calls that a pull needs."""

from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
from hub_server import Hub, ask_here, serving
from huggingface_hub import constants

from lmx.convert import pull
from lmx.convert.hub import HubId, find_model, is_complete
from lmx.convert.patience import Patience
from lmx.convert.pickle_source import INDEX_BIN
from lmx.core.errors import InputError, LmxError, NetworkError, NotFoundError, UsageError

FILES = {
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "model-00001-of-00001.safetensors": b"weights",
    "model.safetensors.index.json": b'{"weight_map": {"a": "model-00001-of-00001.safetensors"}}',
    "chat_template.jinja": b"",
    "README.md": b"---\nlicense: mit\n---\n",
    "consolidated.safetensors": b"the same weights again",
    "pytorch_model.bin": b"and again",
    "original/model.safetensors": b"and again",
}
WANTED = set(FILES) - {"consolidated.safetensors", "pytorch_model.bin", "original/model.safetensors"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serving(FILES) as server:
        ask_here(server, monkeypatch, tmp_path / "cache")
        monkeypatch.setattr(pull, "PATIENCE", Patience(first_wait=0.01))
        yield server


def test_a_pull_takes_what_a_run_needs_and_the_next_run_asks_nobody(hub: Hub) -> None:
    folder = find_model("org/tiny")
    assert {path.name for path in folder.iterdir()} == WANTED
    assert all((folder / name).read_bytes() == FILES[name] for name in WANTED)
    hub.calls.clear()
    assert find_model("org/tiny") == find_model("org/tiny", offline=True) == folder
    assert hub.calls == []


def test_a_partial_snapshot_is_completed_or_named(hub: Hub) -> None:
    folder = find_model("org/tiny")
    (folder / "model-00001-of-00001.safetensors").unlink()
    with pytest.raises(NotFoundError, match="only partly in the Hugging Face cache"):
        find_model("org/tiny", offline=True)
    assert is_complete(find_model("org/tiny"))


def test_pickles_are_pulled_where_there_are_no_safetensors(hub: Hub) -> None:
    for name in [name for name in hub.files if "safetensors" in name]:
        del hub.files[name]
    hub.files |= {"training_args.bin": b"", "pytorch_model.fp16.pt": b""}
    folder = find_model("org/tiny")
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "tokenizer.json", "chat_template.jinja", "README.md", "pytorch_model.bin"}
    assert find_model("org/tiny", offline=True) == folder


def test_a_snapshot_of_pickled_shards_is_whole_or_not(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "a.bin"):
        (tmp_path / name).write_bytes(b"{}")
    assert not is_complete(tmp_path)
    (tmp_path / INDEX_BIN).write_text('{"weight_map": {"x": "a.bin", "y": "b.bin"}}')
    assert not is_complete(tmp_path)
    (tmp_path / "b.bin").write_bytes(b"")
    assert is_complete(tmp_path)


def test_a_snapshot_of_ggufs_is_whole_or_not(tmp_path: Path) -> None:
    (tmp_path / "a-00001-of-00002.gguf").write_bytes(b"")
    assert not is_complete(tmp_path)
    (tmp_path / "a-00002-of-00002.gguf").write_bytes(b"")
    (tmp_path / "config.json").write_bytes(b"{}")
    assert is_complete(tmp_path)
    (tmp_path / "b.gguf").write_bytes(b"")
    with pytest.raises(InputError, match="holds 2 GGUFs"):
        is_complete(tmp_path)


def test_a_revision_is_asked_for(hub: Hub) -> None:
    find_model("org/tiny@v1.0")
    assert any(path.startswith("/api/models/org/tiny/revision/v1.0") for path in hub.calls)


def test_offline_by_the_environment(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(NotFoundError, match="the network is off"):
        find_model("org/tiny")
    assert hub.calls == []


ANSWERS = [
    (404, "RepoNotFound", NotFoundError, "has no org/tiny"),
    (404, "RevisionNotFound", NotFoundError, "has no revision"),
    (403, "GatedRepo", NotFoundError, "is gated"),
    (401, "", NotFoundError, "private|refused"),
    (403, "", NotFoundError, "refused"),
    (503, "", NetworkError, "HTTP 503"),
    (429, "", NetworkError, "HTTP 429"),
]


@pytest.mark.parametrize(("status", "code", "kind", "words"), ANSWERS)
def test_the_hubs_refusals(hub: Hub, status: int, code: str, kind: type[LmxError], words: str) -> None:
    hub.status, hub.code = status, code
    with pytest.raises(kind, match=words):
        find_model("org/tiny@v1")


def test_nobody_answers(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(NetworkError, match="no answer"):
        find_model("org/tiny")


GOOD = ["a/b", "mistralai/Mixtral-8x7B-v0.1", "org/name@refs/pr/1", "org/name@v1.0", "o.r-g/n_a.me"]
BAD = [
    "a",
    "a/b/c",
    "/a/b",
    "a/",
    "a/b@",
    "a/..",
    "a/b@../x",
    "-a/b",
    "a/b-",
    "a/b c",
    "a/b\n",
    "ä/b",
    "a--b/c",
    "a/" + "b" * 97,
]


@pytest.mark.parametrize("text", GOOD)
def test_hub_ids(text: str) -> None:
    assert str(HubId.parse(text)) == text


@pytest.mark.parametrize("text", BAD)
def test_what_is_no_hub_id(text: str) -> None:
    assert HubId.parse(text) is None


def test_our_rule_for_ids_is_the_hubs() -> None:
    for text in GOOD + BAD:
        repo = text.partition("@")[0]
        if HubId.parse(text) is not None:
            huggingface_hub.utils.validate_repo_id(repo)


REVISIONS: list[Callable[[], object]] = [
    lambda: HubId.parse("a/b@x", "y"),
    lambda: HubId.parse("a/b", "../y"),
    lambda: HubId.parse("a/b", ""),
    lambda: find_model(Path(__file__).parent, revision="main"),
]


@pytest.mark.parametrize("parse", REVISIONS)
def test_revisions_that_cannot_be(parse: Callable[[], object]) -> None:
    with pytest.raises(UsageError):
        parse()
    assert HubId.parse("a/b@x", "x") == HubId("a/b", "x")


def test_an_existing_path_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert find_model("org/name") == Path("org/name")
