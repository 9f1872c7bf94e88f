"""Looking into the cache, deleting from it and checking it, against huggingface_hub on the same cache."""

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from hub_server import COMMIT, LARGE_BYTES, Hub, tree_of
from huggingface_hub import constants
from pulls import WEIGHTS, as_nobody, hub_with, readable_to_all, repository

import lmx
from lmx.convert import cache
from lmx.convert.cache import Repository, find_repository, remove, scan, verify
from lmx.convert.hub import find_model
from lmx.core.errors import ConflictError, InputError, NotFoundError

NEXT = "b" * 40


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def hub(folder: Path) -> Iterator[Hub]:
    with hub_with(repository(LARGE_BYTES), folder) as (hub, _):
        yield hub


@pytest.fixture
def two(hub: Hub) -> Repository:
    """Two snapshots that share their weights; "main" is the older one."""
    lmx.pull("org/tiny")
    assert hub.signed is not None
    hub.commit = hub.signed.commit = NEXT
    hub.files["config.json"] = b'{"model_type": "unheard-of"}'
    lmx.pull("org/tiny", revision="v2")
    return find_repository("org/tiny")[0]


def test_a_scan_agrees_with_huggingface_hub(two: Repository, folder: Path) -> None:
    theirs = huggingface_hub.scan_cache_dir(folder)
    (repo,) = theirs.repos
    (ours,) = scan()
    assert (ours.name, ours.nbytes, ours.incomplete_bytes) == (repo.repo_id, repo.size_on_disk, 0)
    assert {one.commit: (set(one.refs), one.nbytes) for one in ours.revisions} == {
        one.commit_hash: (set(one.refs), one.size_on_disk) for one in repo.revisions
    }


def test_everything_is_listed_whatever_it_is(two: Repository, folder: Path) -> None:
    (folder / "datasets--org--text" / "snapshots" / COMMIT).mkdir(parents=True)
    (folder / "models--gpt2" / "blobs").mkdir(parents=True)
    (folder / "models--gpt2" / "blobs" / ("0" * 64 + ".lmx.incomplete")).write_bytes(bytes(5000))
    broken = folder / "models--org--broken" / "snapshots" / COMMIT
    broken.mkdir(parents=True)
    (broken / "config.json").symlink_to("../../blobs/gone")
    (folder / "something else").mkdir()
    (folder / "models--file").write_text("")
    found = {repo.name: repo for repo in scan()}
    assert found.keys() == {"org/tiny", "dataset/org/text", "gpt2", "org/broken"}
    assert found["gpt2"].incomplete_bytes >= 4096
    assert found["org/broken"].revisions[0].files == {"config.json": None}
    for name in ("dataset/org/text", "gpt2", "org/broken"):
        remove(*find_repository(name))
    assert [repo.name for repo in scan()] == ["org/tiny"]


def test_a_snapshot_goes_and_what_is_shared_stays(two: Repository, folder: Path) -> None:
    repo, revisions = find_repository("org/tiny", "main")
    assert [one.commit for one in revisions] == [COMMIT]
    freed = remove(repo, revisions)
    assert freed == len(b'{"model_type": "mixtral"}')
    (left,) = scan()
    assert [one.commit for one in left.revisions] == [NEXT]
    assert all(size for size in left.revisions[0].files.values())
    assert not (folder / "models--org--tiny" / "refs" / "main").exists()
    assert not huggingface_hub.scan_cache_dir(folder).warnings


def test_all_of_it_goes(two: Repository, folder: Path) -> None:
    assert remove(two, two.revisions) == two.nbytes
    assert scan() == []
    assert all(name.startswith(".locks") for name in tree_of(folder))


def test_another_repository_with_the_same_commit_stays(two: Repository, hub: Hub, folder: Path) -> None:
    """A copy of a repository on the hub has its commits too."""
    other = folder / "models--org--copy"
    os.system(f"cp -a '{folder / 'models--org--tiny'}' '{other}'")
    before = tree_of(other)
    remove(*find_repository("org/tiny"))
    assert tree_of(other) == before
    assert [repo.name for repo in scan()] == ["org/copy"]


def test_what_is_being_pulled_is_not_deleted(two: Repository, folder: Path) -> None:
    """By whichever tool: all take these locks."""
    lock = folder / ".locks" / "models--org--tiny" / ("0" * 64 + ".lock")
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ConflictError, match="is being pulled"):
            remove(two, two.revisions)
    assert scan()[0].nbytes == two.nbytes
    remove(two, two.revisions)
    assert scan() == []


def test_a_damaged_repository_can_only_go_as_a_whole(two: Repository, folder: Path) -> None:
    (folder / "models--org--tiny" / "blobs" / Path(os.readlink(two.revisions[0].folder / WEIGHTS)).name).unlink()
    repo, revisions = find_repository("org/tiny@v2")
    with pytest.raises(InputError, match="damaged"):
        remove(repo, revisions)
    remove(repo, repo.revisions)
    assert scan() == []


@pytest.mark.parametrize("name", ["org/other", "org/tiny@v3", "org/tiny@aaaa", "../tiny", "", "org/tiny@" + "c" * 40])
def test_what_is_not_there(two: Repository, name: str) -> None:
    with pytest.raises(NotFoundError):
        find_repository(name)


def test_a_commit_by_its_beginning(two: Repository) -> None:
    assert [one.commit for one in find_repository("org/tiny", NEXT[:6])[1]] == [NEXT]


def test_every_file_is_hashed_again(two: Repository, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {one.verdict for one in verify(two.revisions)} == {"right"}
    newest = two.revisions[-1].folder
    data = bytearray((newest / WEIGHTS).read_bytes())
    data[LARGE_BYTES // 2] ^= 1
    (newest / WEIGHTS).write_bytes(data)
    (newest / "tokenizer.json").resolve().unlink()
    (newest / "notes.txt").write_text("somebody's own")
    _, revisions = find_repository("org/tiny@v2")
    verdicts = {one.name: one.verdict for one in verify(revisions)}
    assert verdicts == {
        "README.md": "right",
        "config.json": "right",
        "notes.txt": "unknown",
        "tokenizer.json": "missing",
        WEIGHTS: "damaged",
    }


def test_what_huggingface_hub_downloaded_is_verified_too(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    huggingface_hub.snapshot_download("org/tiny")
    verdicts = list(verify(find_repository("org/tiny")[1]))
    assert [one.verdict for one in verdicts] == ["right"] * len(hub.files)


def test_a_folder_that_was_pulled_is_verified(hub: Hub, tmp_path: Path) -> None:
    target = lmx.pull("org/tiny", local_dir=tmp_path / "model")
    assert {one.name: one.verdict for one in cache.verify_folder(target)} == dict.fromkeys(hub.files, "right")
    (target / "config.json").write_text("{}")
    (target / WEIGHTS).unlink()
    verdicts = {one.name: one.verdict for one in cache.verify_folder(target)}
    assert (verdicts["config.json"], verdicts[WEIGHTS]) == ("damaged", "missing")


def test_an_empty_cache_and_none(folder: Path, hub: Hub) -> None:
    assert scan() == []
    folder.mkdir()
    assert scan() == []


@pytest.mark.parametrize("where", ["", "snapshots", "refs", "snapshots/" + COMMIT])
def test_a_repository_that_we_may_not_read_hides_no_other(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Caches are shared between users."""
    with readable_to_all() as shared:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(shared))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(shared / "no token"))
        lmx.pull("org/tiny")
        (shared / "models--org--other").mkdir()
        closed = shared / "models--org--tiny" / where
        closed.chmod(0)
        with as_nobody():
            assert [repo.name for repo in scan()] == ["org/other", "org/tiny"]
            with pytest.raises(NotFoundError, match="the network is off"):
                find_model("org/tiny", offline=True)
            if where in ("", "snapshots"):  # else it is known, without names of revisions or without files
                with pytest.raises(NotFoundError, match="permission denied"):
                    find_repository("org/tiny")
        closed.chmod(0o755)


def test_a_cache_that_we_may_not_read(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with readable_to_all() as shared:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(shared))
        shared.chmod(0)
        with as_nobody(), pytest.raises(NotFoundError, match="permission denied"):
            scan()
        shared.chmod(0o755)
