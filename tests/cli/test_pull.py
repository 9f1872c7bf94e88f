"""`lmx pull`, `list`, `show`, `rm`, `verify`: what they print, and the exit codes."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import COMMIT, LARGE_BYTES, Hub, environment, random_bytes
from huggingface_hub import constants
from pulls import MIXTRAL, SMALL, WEIGHTS, hub_with, left_overs, repository, start_pull
from support import run_lmx

from lmx.cli import pull_progress

TOTAL = LARGE_BYTES + sum(map(len, SMALL.values()))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def hub(cache: Path) -> Iterator[Hub]:
    with hub_with(repository(LARGE_BYTES) | {"consolidated.00.pt": random_bytes(LARGE_BYTES)}, cache) as (hub, _):
        yield hub


def test_it_prints_the_folder(lmx: Any, hub: Hub, cache: Path) -> None:
    ran = lmx("pull", "org/tiny")
    folder = cache / "models--org--tiny" / "snapshots" / COMMIT
    assert (ran.code, ran.out) == (0, f"{folder}\n"), ran.err
    assert "4 files, 1.0 MB" in ran.err
    assert "1.0 MB left out" in ran.err
    assert "\x1b" not in ran.err
    again = lmx("pull", "org/tiny", "--quiet")
    assert (again.code, again.out, again.err) == (0, ran.out, "")
    hub.calls.clear()
    offline = lmx("pull", "org/tiny", "--offline")
    assert (offline.code, offline.out, hub.calls) == (0, ran.out, [])


def test_json_and_dry_run(lmx: Any, hub: Hub, cache: Path) -> None:
    planned = json.loads(lmx("pull", "org/tiny", "--dry-run", "--json").out)
    assert not cache.exists()
    assert (planned["total_bytes"], planned["missing_bytes"]) == (TOTAL, TOTAL)
    assert planned["saved_bytes"] == LARGE_BYTES
    assert planned["left_out"] == [
        {"reason": "another copy of the weights", "files": ["consolidated.00.pt"], "bytes": LARGE_BYTES}
    ]
    told = lmx("pull", "org/tiny", "--dry-run").out
    assert "left out\t1.0 MB, another copy of the weights: consolidated.00.pt\n" in told
    done = json.loads(lmx("pull", "org/tiny", "--json").out)
    assert (done["fetched_bytes"], done["commit"], Path(done["folder"]).name) == (TOTAL, COMMIT, COMMIT)
    assert {file["name"]: file["is_here"] for file in done["files"]} == dict.fromkeys((*SMALL, WEIGHTS), False)
    again = json.loads(lmx("pull", "org/tiny", "--json").out)
    assert (again["fetched_bytes"], again["missing_bytes"]) == (0, 0)


def test_of_mixtrals_listing_the_safetensors_only(lmx: Any, hub: Hub) -> None:
    hub.files.clear()
    hub.files.update({name: name.encode() for name in MIXTRAL})
    ran = lmx("pull", "org/tiny", "--json")
    done = json.loads(ran.out)
    weights = {name for name in MIXTRAL if name.startswith("model")}
    taken = {path.name for path in Path(done["folder"]).iterdir()}
    assert len(weights) == 20
    assert {name for name in taken if "model" in name or "consolidated" in name} == weights
    assert hub.sent == done["fetched_bytes"] == sum(len(name) for name in taken)
    assert done["saved_bytes"] == sum(len(name) for name in set(MIXTRAL) - taken)
    assert "left out" in ran.err


def test_a_person_sees_bars(lmx: Any, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")  # Rich, too, is to take the captured stream for a terminal
    monkeypatch.setattr(pull_progress, "may_animate", lambda: True)
    ran = lmx("pull", "org/tiny")
    assert ran.code == 0
    assert "all files" in ran.err
    assert "\x1b[" in ran.err


def test_globs_revision_and_folder(lmx: Any, hub: Hub, tmp_path: Path) -> None:
    target = tmp_path / "here"
    ran = lmx(
        *("pull", "org/tiny", "--revision", "v1", "--include", "*.json", "--include", "*.md"),
        *("--exclude", "tok*", "--local-dir", target),
    )
    assert (ran.code, ran.out) == (0, f"{target}\n"), ran.err
    assert {path.name for path in target.iterdir()} == {".cache", "config.json", "README.md"}
    assert any("/revision/v1" in call for call in hub.calls)


CODES = [
    ((404, "RepoNotFound"), 4),
    ((403, "GatedRepo"), 4),
    ((401, ""), 4),
    ((503, ""), 5),
]


@pytest.mark.parametrize(("answer", "code"), CODES)
def test_exit_codes(lmx: Any, hub: Hub, answer: tuple[int, str], code: int) -> None:
    hub.status, hub.code = answer
    ran = lmx("pull", "org/tiny")
    assert (ran.code, ran.out) == (code, "")
    assert [line.split()[1] for line in ran.err.splitlines()] == ["error:", "hint:"]


def test_wrong_usage(lmx: Any, hub: Hub) -> None:
    assert lmx("pull").code == 2
    assert lmx("pull", "no-hub-id").code == 2
    assert lmx("pull", "org/tiny", "--offline", "--dry-run").code == 2
    assert lmx("pull", "org/tiny@v1", "--revision", "v2").code == 2
    assert lmx("pull", "org/tiny", "--include", "*.gguf").code == 3
    assert lmx("pull", "org/tiny", "--offline").code == 4
    assert lmx("rm", "org/tiny").code == 4
    assert lmx("verify", "org/tiny").code == 4


def test_no_route_wrong_content_and_a_hostile_listing(lmx: Any, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub.signed is not None
    hub.signed.wrong[WEIGHTS] = bytes(LARGE_BYTES)
    ran = lmx("pull", "org/tiny")
    assert ran.code == 3
    assert "digest" in ran.err
    hub.entries = [{"rfilename": "../x\x1b[2J", "size": 1, "blobId": "a" * 40}]
    ran = lmx("pull", "org/tiny")
    assert ran.code == 3
    assert "\x1b" not in ran.err
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert lmx("pull", "org/tiny").code == 5


def test_the_token_is_told_to_nobody(hub: Hub, cache: Path) -> None:
    """In a process of its own with every switch that makes the libraries talk."""
    assert hub.signed is not None
    hub.signed.answers = [(500, {})] * 200
    canary = "hf_canaryCANARY"
    env = {**environment(hub, cache), "HF_TOKEN": canary, "HF_DEBUG": "1", "HF_HUB_VERBOSITY": "debug"}
    child = start_pull(hub, cache, "--debug", env=env | {"HF_HUB_DOWNLOAD_TIMEOUT": "1"})
    hub.signed.answers = [(429, {"Retry-After": "9999"})] * 200
    out, err = child.communicate(timeout=60)
    assert child.returncode == 5, err
    assert "Traceback" in err
    assert canary not in out + err
    assert "s3cret" not in out + err
    assert hub.tokens == {"127.0.0.1": {f"Bearer {canary}"}}
    assert hub.signed.tokens == {"127.0.0.1": {None}}


def test_list_show_verify_and_rm(lmx: Any, hub: Hub, cache: Path) -> None:
    assert lmx("list").out == ""
    lmx("pull", "org/tiny", "-q")
    facts = json.loads(lmx("list", "--json").out)
    (repo,) = facts["repositories"]
    assert (facts["cache"], repo["model"], repo["size_on_disk"]) == (str(cache), "org/tiny", TOTAL)
    assert (repo["architecture"], repo["is_supported"]) == ("mixtral", True)
    assert repo["revisions"] == [{"commit": COMMIT, "refs": ["main"], "files": 4, "bytes": TOTAL}]
    assert lmx("list").out.startswith("org/tiny\tmixtral\t1.0 MB\tmain\t")
    assert "org/tiny" in lmx("list", terminal=True).out
    assert lmx("verify", "org/tiny").code == 0
    path = next(cache.rglob(f"snapshots/*/{WEIGHTS}"))
    path.write_bytes(bytes(LARGE_BYTES))
    bad = lmx("verify", "org/tiny", "--json")
    assert bad.code == 3
    assert "damaged" in bad.err
    assert {file["name"]: file["verdict"] for file in json.loads(bad.out)["files"]}[WEIGHTS] == "damaged"
    told = lmx("rm", "org/tiny", "--dry-run")
    assert (told.code, path.exists()) == (0, True)
    assert "would be deleted" in told.err
    assert json.loads(lmx("rm", "org/tiny", "--json").out)["freed_bytes"] == TOTAL
    assert lmx("list", "--json").out.count("org/tiny") == 0


def test_show_of_what_lmx_does_not_run(lmx: Any, hub: Hub) -> None:
    hub.files["config.json"] = b'{"model_type": "unheard-of"}'
    lmx("pull", "org/tiny", "-q")
    for options in ((), ("--offline",)):
        facts = json.loads(lmx("show", "org/tiny", "--json", *options).out)
        assert (facts["architecture"], facts["is_supported"], facts["license"]) == ("unheard-of", False, "mit")
        assert facts["problem"]
    shown = lmx("show", "org/tiny")
    assert shown.code == 0
    assert "runs\tno: " in shown.out
    assert lmx("show", "org/other", "--offline").code == 4
    hub.files["config.json"] = SMALL["config.json"]
    assert hub.signed is not None
    hub.commit = hub.signed.commit = "b" * 40
    lmx("pull", "org/tiny", "-q")
    assert lmx("show", "org/tiny").code == 3  # its weights are random bytes


REPOSITORIES = ("models--gpt2", "datasets--org--text", "spaces--org--demo", "models--org--gguf")


def put_into_cache(cache: Path, folder: str, files: dict[str, bytes]) -> None:
    """A repository as huggingface_hub would leave it."""
    repo = cache / folder
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    (repo / "blobs").mkdir()
    (repo / "snapshots" / COMMIT).mkdir(parents=True)
    for name, data in files.items():
        blob = repo / "blobs" / hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        blob.write_bytes(data)
        (repo / "snapshots" / COMMIT / name).symlink_to(f"../../blobs/{blob.name}")


@pytest.mark.parametrize("folder", REPOSITORIES)
def test_every_repository_is_shown_verified_and_deleted(lmx: Any, hub: Hub, cache: Path, folder: str) -> None:
    """Of any kind, with the network off or away, and nothing in it that lmx could run."""
    put_into_cache(cache, folder, {"README.md": b"---\nlicense: cc0-1.0\n---\n", "a.bin": b"abc"})
    put_into_cache(cache, "models--org--else", {"x": b"y"})
    hub.status = 503
    names = [repo["model"] for repo in json.loads(lmx("list", "--json").out)["repositories"]]
    (name,) = set(names) - {"org/else"}
    for options in ((), ("--offline",)):
        shown = json.loads(lmx("show", name, "--json", *options).out)
        assert (shown["model"], shown["is_supported"], shown["files"]) == (name, False, 2)
        assert (shown["license"], shown["commit"], shown["refs"]) == ("cc0-1.0", COMMIT, ["main"])
    assert lmx("verify", name).code == 0
    next((cache / folder / "snapshots").rglob("a.bin")).resolve().write_bytes(b"abd")
    assert lmx("verify", name).code == 3
    assert lmx("rm", name).code == 0
    assert [path.name for path in cache.iterdir() if path.name != ".locks"] == ["models--org--else"]


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "org/tiny", "--prompt-ids", "1,2", "-n", "2"),
        ("chat", "org/tiny", "-p", "hello", "-n", "2"),
        ("eval", "org/tiny", "--ids", "IDS"),
    ],
    ids=lambda command: command[0],
)
def test_a_model_by_name_is_pulled_on_the_way(
    lmx: Any, hub: Hub, cache: Path, checkpoint: Path, tmp_path: Path, command: tuple[str, ...]
) -> None:
    """Resumed, checked and shown as by `lmx pull`; then taken from the cache."""
    hub.files.clear()
    hub.files.update({path.name: path.read_bytes() for path in checkpoint.iterdir()})
    (tmp_path / "ids.json").write_text("[[1, 2, 3]]")
    command = tuple(part.replace("IDS", str(tmp_path / "ids.json")) for part in command)
    ran = lmx(*command)
    assert ran.code == 0, ran.err
    assert "pulling org/tiny: " in ran.err
    assert lmx("verify", "org/tiny").code == 0
    assert left_overs(cache) == []
    hub.calls.clear()
    again = lmx(*command, "--offline")
    assert (again.code, again.out, "pulling" in again.err, hub.calls) == (0, ran.out, False, [])


def test_a_gguf_by_name_is_pulled_on_the_way(lmx: Any, hub: Hub, checkpoint: Path, tmp_path: Path) -> None:
    gguf = tmp_path / "model-q8_0.gguf"
    assert lmx("convert", checkpoint, gguf, "--to", "gguf", "--dtype", "q8_0").code == 0
    hub.files.clear()
    hub.files.update({gguf.name: gguf.read_bytes(), "README.md": b"A model."})
    command = ("generate", "org/tiny", "--prompt-ids", "1,2", "-n", "2")
    ran = lmx(*command)
    assert ran.code == 0, ran.err
    hub.calls.clear()
    assert lmx(*command, "--offline").out == ran.out
    assert lmx(*command).out == ran.out
    assert hub.calls == []


def test_a_chat_shows_the_bars_of_a_pull(lmx: Any, hub: Hub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.files.clear()
    hub.files.update({path.name: path.read_bytes() for path in checkpoint.iterdir()})
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(pull_progress, "may_animate", lambda: True)
    ran = lmx("chat", "org/tiny", "-p", "hello", "-n", "2")
    assert ran.code == 0, ran.err
    assert "all files" in ran.err


@pytest.mark.parametrize("command", ["pull", "list", "rm", "verify"])
def test_help_has_an_example(command: str) -> None:
    assert f"Example: lmx {command}" in run_lmx(command, "--help").stdout
