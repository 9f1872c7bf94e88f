"""Listings that lie: names that leave the folder, digests that are paths. Refused before anything is written."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import COMMIT, Hub, ask_here, serving, tree_of

import lmx
from lmx.core.errors import InputError

GOOD = "0123456789abcdef" * 4
BLOB = "0123456789abcdef0123456789abcdef01234567"

NAMES = [
    "../evil",
    "../../../../../../tmp/evil",
    "a/../../evil",
    "a/..",
    "..",
    ".",
    "",
    "./config.json",
    "a//b",
    "a/./b",
    "a/",
    "/etc/cron.d/evil",
    "//server/share/evil",
    "C:\\evil",
    "C:evil",
    "..\\evil",
    "a\\..\\..\\evil",
    "config.json\x00.txt",
    "evil\x1b[2J.json",
    "line\nbreak.json",
    "NUL",
    "con.json",
    "a/COM1.safetensors",
    "lpt9 .txt",
    "aux",
    "..  /evil",
    ".../evil",
    "half \ud800 a pair.json",
    "x" * 256 + ".json",
    "/".join("d" * 200 for _ in range(8)),
    ".git/hooks/post-checkout",
]


def entry(name: object = "model.safetensors", **changed: Any) -> dict[str, Any]:
    return {"rfilename": name, "size": 1 << 20, "blobId": BLOB, **changed}


def lfs(sha256: object, size: object = 1 << 20) -> dict[str, Any]:
    return entry(lfs={"sha256": sha256, "size": size, "pointerSize": 135})


LISTINGS: dict[str, list[Any]] = {
    **{f"name {name!r:.40}": [entry(name)] for name in NAMES},
    "digest that is a path": [lfs("../../../../evil")],
    "digest that is absolute": [lfs("/etc/passwd")],
    "digest too short": [lfs(GOOD[:-1])],
    "digest in capitals": [lfs(GOOD.upper())],
    "digest with a line break": [lfs(GOOD + "\n")],
    "digest that is a number": [lfs(7)],
    "blob id that is a path": [entry(blobId="../" * 13 + "x")],
    "blob id of dots": [entry(blobId="." * 40)],
    "size below zero": [entry(size=-1)],
    "size beyond all disks": [entry(size=1 << 62)],
    "size that is text": [entry(size="12")],
    "size that is true": [entry(size=True)],
    "name that is a number": [entry(5)],
    "a file twice": [entry(), entry()],
    "a file that is a folder": [entry("a"), entry("a/model.safetensors")],
    "a folder that is a link's target": [entry("a/b"), entry("a/b/c/model.safetensors")],
    "no objects": [7, "x"],
    "no names": [{"size": 5}],
    "lfs that is text": [entry(lfs="sha256:" + GOOD)],
}
COMMITS: list[object] = ["main", "../" * 13 + "x", COMMIT.upper(), COMMIT + "/..", "", None, 5, [COMMIT]]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serving({"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": bytes(1 << 20)}) as server:
        ask_here(server, monkeypatch, tmp_path / "home" / "cache")
        (tmp_path / "home").mkdir()
        (tmp_path / "outside").write_text("untouched")
        yield server


def refused(tmp_path: Path, **options: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        lmx.pull("org/tiny", **options)
    assert caught.value.exit_code == 3
    assert caught.value.message.isprintable()
    assert caught.value.hint
    assert tree_of(tmp_path) == {"outside"}
    assert not any((tmp_path / "home").iterdir())
    return caught.value


def test_there_are_forty_of_them() -> None:
    assert len(LISTINGS) + len(COMMITS) >= 40


@pytest.mark.parametrize("name", LISTINGS)
def test_a_hostile_listing_is_refused(hub: Hub, tmp_path: Path, name: str) -> None:
    """Beside honest files, and asked for or not."""
    hub.entries = [entry("config.json", size=2), *LISTINGS[name]]
    refused(tmp_path)
    refused(tmp_path, include=["*"])
    refused(tmp_path, include=["config.json"], local_dir=tmp_path / "home" / "here")


@pytest.mark.parametrize("name", [".cache/huggingface/download/config.json.metadata", ".Huggingface/x"])
def test_notes_of_a_pull_are_not_pulled(hub: Hub, tmp_path: Path, name: str) -> None:
    """Some honest repositories hold them, by mistake; who asks for them would have his own notes replaced."""
    hub.files[name] = b"not a note"
    folder = lmx.pull("org/tiny", local_dir=tmp_path / "home" / "here")
    notes = tree_of(folder) - set(hub.files)
    with pytest.raises(InputError, match="notes of a pull") as caught:
        lmx.pull("org/tiny", include=["*"], local_dir=folder)
    assert "--exclude" in caught.value.hint
    assert tree_of(folder) - set(hub.files) == notes
    assert not any(note.endswith("metadata.metadata") for note in notes)


@pytest.mark.parametrize("commit", COMMITS)
def test_a_hostile_commit_is_refused(hub: Hub, tmp_path: Path, commit: object) -> None:
    hub.commit = commit
    refused(tmp_path)


def test_a_listing_that_is_no_json_or_no_object(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hub_server

    for body in (b"<html>sign in to this network</html>", b"[]", b"null", b'{"id": 5}', b'{"id":' * 5000):
        monkeypatch.setattr(
            hub_server.Handler, "_send_json", lambda self, value, send, body=body: self._send(body, send, {})
        )
        refused(tmp_path)


def test_links_that_lie_in_the_way_are_not_written_through(hub: Hub, tmp_path: Path) -> None:
    """Whoever could make them owns the cache; still, a blob or a part is never written through a link."""
    blobs = tmp_path / "home" / "cache" / "models--org--tiny" / "blobs"
    blobs.mkdir(parents=True)
    outside = tmp_path / "outside"
    digest = hub.etag(hub.files["model.safetensors"])
    for suffix in (".lmx.incomplete", ".lmx-journal.incomplete"):
        (blobs / f"{digest}{suffix}").symlink_to(outside)
    folder = lmx.pull("org/tiny")
    assert (folder / "model.safetensors").read_bytes() == bytes(1 << 20)
    assert outside.read_text() == "untouched"
