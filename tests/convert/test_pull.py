"""What a pull makes of the hub's answers, and the cache that it leaves, against huggingface_hub itself."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from hub_server import COMMIT, LARGE_BYTES, Hub, random_bytes, tree_of
from huggingface_hub import constants
from pulls import SMALL, WEIGHTS, as_nobody, hub_with, left_overs, readable_to_all, repository, sha256

import lmx
from lmx.convert import pull as pulling
from lmx.convert.choose import SECOND_COPY
from lmx.convert.hub import Wish, find_model
from lmx.convert.pull import plan, pull
from lmx.convert.pull_events import Planned, Pulled
from lmx.core.errors import LmxError, NetworkError, NotFoundError, ResourceError, UsageError
from lmx.pulling import find_pulled

SIZE = 3 * LARGE_BYTES


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def hubs(cache: Path) -> Iterator[tuple[Hub, Hub]]:
    files = repository(SIZE) | {"original/model.pth": b"again", "pytorch_model.bin": random_bytes(LARGE_BYTES, 9)}
    with hub_with(files, cache) as pair:
        yield pair


def test_other_tools_find_what_was_pulled(hubs: tuple[Hub, Hub], cache: Path) -> None:
    hub, _ = hubs
    folder = lmx.pull("org/tiny")
    hub.status = 500
    assert huggingface_hub.snapshot_download("org/tiny", local_files_only=True) == str(folder)
    for name in (*SMALL, WEIGHTS):
        assert huggingface_hub.try_to_load_from_cache("org/tiny", name) == str(folder / name)
        assert (folder / name).read_bytes() == hub.files[name]
        assert os.readlink(folder / name) == f"../../blobs/{hub.etag(hub.files[name])}"
    (repo,) = huggingface_hub.scan_cache_dir(cache).repos
    assert (repo.repo_id, repo.nb_files, set(repo.refs)) == ("org/tiny", 4, {"main"})
    assert not huggingface_hub.scan_cache_dir(cache).warnings
    assert left_overs(cache) == []


def test_what_huggingface_hub_downloaded_is_not_downloaded_again(
    hubs: tuple[Hub, Hub], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, store = hubs
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    theirs = huggingface_hub.snapshot_download("org/tiny", allow_patterns=["*.safetensors", "*.json"])
    before = tree_of(cache)
    hub.sent = store.sent = 0
    events = list(pull(Wish.of("org/tiny")))
    assert isinstance(events[0], Planned)
    assert [file.name for file in events[0].missing] == ["README.md"]
    last = events[-1]
    assert isinstance(last, Pulled)
    assert str(last.folder) == theirs
    assert (hub.sent, store.sent, last.fetched_bytes) == (len(SMALL["README.md"]), 0, len(SMALL["README.md"]))
    assert before <= tree_of(cache)


def test_huggingface_hub_does_not_download_again_what_was_pulled(
    hubs: tuple[Hub, Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, store = hubs
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    ours = lmx.pull("org/tiny")
    hub.sent = store.sent = 0
    assert huggingface_hub.snapshot_download("org/tiny", allow_patterns=[*SMALL, WEIGHTS]) == str(ours)
    assert (hub.sent, store.sent) == (0, 0)


def test_a_second_pull_fetches_and_writes_nothing(hubs: tuple[Hub, Hub], cache: Path) -> None:
    hub, store = hubs
    lmx.pull("org/tiny")
    before = {name: os.lstat(cache / name).st_mtime_ns for name in tree_of(cache)}
    hub.sent = store.sent = 0
    *_, last = pull(Wish.of("org/tiny"))
    assert isinstance(last, Pulled)
    assert (hub.sent, store.sent, last.fetched_bytes, last.plan.missing) == (0, 0, 0, ())
    assert {name: os.lstat(cache / name).st_mtime_ns for name in tree_of(cache)} == before


def test_snapshots_share_their_blobs_and_a_ref_moves_last(hubs: tuple[Hub, Hub], cache: Path) -> None:
    hub, store = hubs
    first = lmx.pull("org/tiny")
    hub.commit = store.commit = "b" * 40
    hub.files["config.json"] = b'{"model_type": "mixtral", "changed": 1}'
    hub.wrong[WEIGHTS] = b""
    store.sent = 0
    second = lmx.pull("org/tiny@v2")
    assert (store.sent, second.name, first.name) == (0, "b" * 40, COMMIT)
    refs = cache / "models--org--tiny" / "refs"
    assert ((refs / "main").read_text(), (refs / "v2").read_text()) == (COMMIT, "b" * 40)
    assert (first / WEIGHTS).resolve() == (second / WEIGHTS).resolve()
    assert lmx.pull("org/tiny", revision="refs/pr/1") == second
    assert (refs / "refs" / "pr" / "1").read_text() == "b" * 40
    assert lmx.pull("org/tiny", revision="b" * 40) == second
    assert not (refs / ("b" * 40)).exists()


def test_a_plan_writes_nothing(hubs: tuple[Hub, Hub], cache: Path) -> None:
    planned = plan(Wish.of("org/tiny"))
    assert (planned.total_bytes, planned.missing_bytes) == (SIZE + sum(map(len, SMALL.values())),) * 2
    assert {group.reason: group.nbytes for group in planned.left_out} == {SECOND_COPY: LARGE_BYTES + len(b"again")}
    assert not cache.exists()


def test_include_and_exclude(hubs: tuple[Hub, Hub]) -> None:
    folder = lmx.pull("org/tiny", include=["original/*", "*.json"], exclude=["tokenizer*"])
    assert tree_of(folder) == {"original/model.pth", "config.json"}
    assert os.readlink(folder / "original" / "model.pth").startswith("../../../blobs/")


def test_where_links_cannot_be_made_files_are_copied(hubs: tuple[Hub, Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    hub, store = hubs
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", True)
    folder = lmx.pull("org/tiny")
    assert not any(path.is_symlink() for path in folder.iterdir())
    assert (folder / WEIGHTS).read_bytes() == hub.files[WEIGHTS]
    store.sent = 0
    assert lmx.pull("org/tiny") == folder == Path(huggingface_hub.snapshot_download("org/tiny", local_files_only=True))
    assert store.sent == 0


def test_a_folder_in_place_of_the_cache(hubs: tuple[Hub, Hub], cache: Path, tmp_path: Path) -> None:
    hub, store = hubs
    target = tmp_path / "here" / "model"
    assert lmx.pull("org/tiny", local_dir=target) == target
    names = {name for name in tree_of(target) if not name.startswith(".cache")}
    assert names == {*SMALL, WEIGHTS}
    assert not any(path.is_symlink() for path in target.iterdir())
    assert not cache.exists()
    store.sent = 0
    lmx.pull("org/tiny", local_dir=target)
    assert store.sent == 0
    (target / WEIGHTS).write_bytes(bytes(SIZE - 1))
    lmx.pull("org/tiny", local_dir=target)
    assert ((target / WEIGHTS).read_bytes(), store.sent) == (hub.files[WEIGHTS], SIZE)
    assert all(name.endswith(".metadata") for name in tree_of(target / ".cache"))
    note = target / ".cache" / "huggingface" / "download" / f"{WEIGHTS}.metadata"
    theirs = huggingface_hub._local_folder.read_download_metadata(target, WEIGHTS)
    assert theirs is not None
    assert (theirs.commit_hash, theirs.etag) == (COMMIT, note.read_text().splitlines()[1])


def test_a_mirror_that_lists_only_names_is_asked_for_its_tree(hubs: tuple[Hub, Hub]) -> None:
    hub, _ = hubs
    hub.without_metadata = True
    assert sha256(lmx.pull("org/tiny") / WEIGHTS)
    assert any("/tree/" in call for call in hub.calls)


def test_a_model_by_name_is_pulled_and_then_taken_from_the_cache(hubs: tuple[Hub, Hub]) -> None:
    hub, _ = hubs
    with pytest.raises(NotFoundError, match="the network is off"):
        find_model("org/tiny", offline=True)
    assert hub.calls == []
    seen = []

    def watch(events: Iterator[Any]) -> Pulled:
        seen.extend(events)
        last = seen[-1]
        assert isinstance(last, Pulled)
        return last

    folder = find_model("org/tiny", watch=watch)
    assert seen
    hub.calls.clear()
    assert find_model("org/tiny") == find_pulled("org/tiny") == folder
    assert hub.calls == []


def test_the_network_is_off_by_the_environment(hubs: tuple[Hub, Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(NotFoundError, match="the network is off"):
        lmx.pull("org/tiny")
    assert hubs[0].calls == []


@pytest.mark.parametrize("repo", ["org", "org/../tiny", "/etc/passwd", "org/tiny/more", "org/tiny@../x", ""])
def test_what_is_no_model_of_the_hub(repo: str) -> None:
    with pytest.raises(UsageError, match="no model of the hub"):
        lmx.pull(repo)


@pytest.mark.parametrize("revision", ["../x", "a/../../x", "a..b", "/etc", "a\n"])
def test_what_is_no_revision(revision: str) -> None:
    with pytest.raises(UsageError):
        lmx.pull("org/tiny", revision=revision)


REFUSALS = [
    (401, "", NotFoundError, "refused|private"),
    (401, "GatedRepo", NotFoundError, "gated"),
    (403, "GatedRepo", NotFoundError, "gated"),
    (403, "", NotFoundError, "refused"),
    (404, "RepoNotFound", NotFoundError, "has no org/tiny"),
    (404, "RevisionNotFound", NotFoundError, "has no revision"),
    (429, "", NetworkError, "429"),
    (503, "", NetworkError, "503"),
]


@pytest.mark.parametrize(("status", "code", "kind", "words"), REFUSALS)
def test_the_hubs_refusals(
    hubs: tuple[Hub, Hub], cache: Path, status: int, code: str, kind: type[LmxError], words: str
) -> None:
    hubs[0].status, hubs[0].code = status, code
    with pytest.raises(kind, match=words) as caught:
        lmx.pull("org/tiny@v1")
    assert caught.value.hint
    assert not cache.exists()


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (403, "GatedRepo", NotFoundError),
        (401, "", NotFoundError),
        (404, "EntryNotFound", NotFoundError),
        (451, "", NetworkError),
        (400, "", NetworkError),
        (304, "", NetworkError),
        (204, "", NetworkError),
        (500, "", NetworkError),
    ],
)
def test_a_refusal_of_the_files_alone(hubs: tuple[Hub, Hub], status: int, code: str, kind: type[LmxError]) -> None:
    """A gated repository shows its listing to all."""
    hubs[0].file_answer = (status, code)
    with pytest.raises(kind) as caught:
        lmx.pull("org/tiny")
    assert ("gated" in caught.value.message) == (code == "GatedRepo")


def test_a_bad_moment_of_the_hub_passes(hubs: tuple[Hub, Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    hub, _ = hubs
    hub.status = 503
    waits = []

    def recover(seconds: float) -> None:
        waits.append(seconds)
        hub.status = 200 if len(waits) == 2 else 503

    monkeypatch.setattr(pulling.time, "sleep", recover)
    assert (lmx.pull("org/tiny") / WEIGHTS).is_file()
    assert len(waits) == 2


def test_no_route(hubs: tuple[Hub, Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(NetworkError, match="no answer from the hub") as caught:
        lmx.pull("org/tiny")
    assert "try again" in caught.value.hint


def test_no_route_to_the_files(hubs: tuple[Hub, Hub]) -> None:
    _, store = hubs
    store.server_port = 9  # where redirects lead
    with pytest.raises(NetworkError, match=WEIGHTS) as caught:
        lmx.pull("org/tiny")
    assert "s3cret" not in caught.value.message


def test_a_disk_without_room(hubs: tuple[Hub, Hub], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: room)
    with pytest.raises(ResourceError, match="free") as caught:
        lmx.pull("org/tiny")
    assert "HF_HOME" in caught.value.hint
    assert not cache.exists()


def test_a_cache_that_cannot_be_written(hubs: tuple[Hub, Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    with readable_to_all() as folder:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "no token"))
        folder.chmod(0o555)
        with as_nobody(), pytest.raises(ResourceError, match="permission denied") as caught:
            lmx.pull("org/tiny")
        assert "permissions" in caught.value.hint
        folder.chmod(0o755)
        lmx.pull("org/tiny")
        with as_nobody():  # all is there: nothing needs to be written
            assert (lmx.pull("org/tiny", revision="v1") / WEIGHTS).is_file()
