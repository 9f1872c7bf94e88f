"""`lmx pull`, `list`, `show`, `rm`, `verify`: what they print, and the exit codes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import COMMIT, LARGE_BYTES, Hub, environment, random_bytes
from huggingface_hub import constants
from pulls import SMALL, WEIGHTS, hub_with, repository, start_pull
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


def test_a_model_by_name_is_pulled_on_the_way(lmx: Any, hub: Hub, checkpoint: Path) -> None:
    hub.files.clear()
    hub.files.update({path.name: path.read_bytes() for path in checkpoint.iterdir()})
    ran = lmx("generate", "org/tiny", "--prompt-ids", "1,2", "-n", "2")
    assert ran.code == 0, ran.err
    assert "pulling org/tiny" in ran.err
    hub.calls.clear()
    assert lmx("generate", "org/tiny", "--prompt-ids", "1,2", "-n", "2", "--offline").out == ran.out
    assert hub.calls == []


@pytest.mark.parametrize("command", ["pull", "list", "rm", "verify"])
def test_help_has_an_example(command: str) -> None:
    assert f"Example: lmx {command}" in run_lmx(command, "--help").stdout
