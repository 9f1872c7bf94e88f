"""Every way in which a pull is refused, on the command line: the contract's code, and two lines that help."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import Fault, Hub, environment, wait_until
from huggingface_hub import constants
from pulls import WEIGHTS, hub_with, repository, sha256, start_pull

SIZE = 24_000_000


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def hubs(cache: Path) -> Iterator[tuple[Hub, Hub]]:
    with hub_with(repository(SIZE), cache) as pair:
        yield pair


def two_lines(err: str) -> tuple[str, str]:
    """What is wrong, and what to do about it; nothing else but what is told of the plan."""
    error, hint = err.splitlines()[-2:]
    assert error.startswith("lmx: error: ")
    assert hint.startswith("lmx: hint: ")
    assert "Traceback" not in err
    assert "s3cret" not in err
    return error, hint


ANSWERS = {
    "401": (401, "", 4, "private|refused", "HF_TOKEN"),
    "401 of a gated model": (401, "GatedRepo", 4, "org/tiny@v1 is gated", "accept its terms"),
    "403 of a gated model": (403, "GatedRepo", 4, "org/tiny@v1 is gated", "accept its terms"),
    "403": (403, "", 4, "HTTP 403", "HF_TOKEN"),
    "404": (404, "RepoNotFound", 4, "the hub has no org/tiny", "spelling"),
    "404 of a revision": (404, "RevisionNotFound", 4, "no revision v1", "revision"),
    "429": (429, "", 5, "HTTP 429", "try again"),
    "503": (503, "", 5, "HTTP 503", "try again"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_what_the_hub_refuses(lmx: Any, hubs: tuple[Hub, Hub], cache: Path, name: str) -> None:
    hub, _ = hubs
    hub.status, hub.code, code, wrong, hint = ANSWERS[name]
    ran = lmx("pull", "org/tiny@v1")
    lines = two_lines(ran.err)
    assert (ran.code, ran.out, len(ran.err.splitlines())) == (code, "", 2)
    assert any(words in lines[0] for words in wrong.split("|")), lines
    assert hint in lines[1]
    assert not cache.exists()


FILES = {
    "gated": (403, "GatedRepo", 4, "is gated"),
    "refused": (401, "", 4, "org/tiny"),
    "not there": (404, "EntryNotFound", 4, "the hub lists '"),
}


@pytest.mark.parametrize("name", FILES)
def test_what_the_hub_refuses_of_the_files_alone(lmx: Any, hubs: tuple[Hub, Hub], name: str) -> None:
    """The listing of a gated model is open to all."""
    status, error_code, code, wrong = FILES[name]
    hubs[0].file_answer = (status, error_code)
    ran = lmx("pull", "org/tiny")
    assert (ran.code, ran.out) == (code, "")
    assert wrong in two_lines(ran.err)[0]


def test_no_route_to_the_hub_and_none_to_the_files(
    lmx: Any, hubs: tuple[Hub, Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    hubs[1].server_port = 9  # where redirects lead
    ran = lmx("pull", "org/tiny")
    assert (ran.code, WEIGHTS in two_lines(ran.err)[0]) == (5, True)
    monkeypatch.setattr(constants, "ENDPOINT", "http://no-such-host.invalid")
    ran = lmx("pull", "org/tiny")
    assert ran.code == 5
    error, hint = two_lines(ran.err)
    assert "no answer from the hub" in error
    assert "connection" in hint


def test_a_disk_that_is_too_small_is_told_first(
    lmx: Any, hubs: tuple[Hub, Hub], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - SIZE, SIZE))
    ran = lmx("pull", "org/tiny")
    error, hint = two_lines(ran.err)
    assert (ran.code, f"{SIZE:,} free" in error, "HF_HOME" in hint, cache.exists()) == (6, True, True, False)


def may_mount() -> bool:
    try:
        return subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


needs_mount = pytest.mark.skipif(not may_mount(), reason="a disk of one's own needs Linux namespaces")


def pull_on_a_disk(hub: Hub, cache: Path, script: str) -> "subprocess.Popen[str]":
    """`lmx pull` where a script, run first, has mounted something at "$1"."""
    cache.mkdir(exist_ok=True)
    lmx = [sys.executable, "-m", "lmx", "pull", "org/tiny"]
    return subprocess.Popen(
        ["unshare", "-rm", "sh", "-ec", script + '\nshift 2; exec "$@"', "sh", cache, cache.parent / "told", *lmx],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment(hub, cache)},
    )


@needs_mount
def test_a_disk_that_fills_up_midway(hubs: tuple[Hub, Hub], cache: Path) -> None:
    """A real one, that another program fills while the weights arrive."""
    hub, store = hubs
    told, filled = cache.parent / "told", cache.parent / "told.done"

    def fill() -> None:
        told.touch()
        wait_until(filled.exists)

    store.faults = [Fault("call", 8_000_000, fill)] * 1000
    child = pull_on_a_disk(
        hub,
        cache,
        """mount -t tmpfs -o size=64m tmpfs "$1"
        (until [ -e "$2" ]; do sleep 0.02; done; cat /dev/zero > "$1/other" || touch "$2.done") 2> /dev/null &""",
    )
    wait_until(filled.exists)
    store.faults = []
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out) == (6, ""), err
    error, hint = two_lines(err)
    assert "does not fit on the disk" in error
    assert "free some space" in hint


@needs_mount
def test_a_disk_that_is_small_or_read_only(hubs: tuple[Hub, Hub], cache: Path) -> None:
    hub, store = hubs
    child = pull_on_a_disk(hub, cache, 'mount -t tmpfs -o size=16m tmpfs "$1"')
    _, err = child.communicate(timeout=60)
    assert (child.returncode, "free" in two_lines(err)[0], store.sent) == (6, True, 0), err
    child = pull_on_a_disk(hub, cache, 'mount -t tmpfs -o ro tmpfs "$1"')
    _, err = child.communicate(timeout=60)
    error, hint = two_lines(err)
    assert (child.returncode, "read-only" in error, "HF_HOME" in hint, store.sent) == (6, True, True, 0), err


@needs_mount
def test_a_read_only_cache_that_has_all_of_it_is_enough(hubs: tuple[Hub, Hub], cache: Path) -> None:
    hub, _ = hubs
    child = start_pull(hub, cache)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 0, err
    again = pull_on_a_disk(hub, cache, 'mount --bind "$1" "$1"; mount -o remount,bind,ro "$1"')
    assert again.communicate(timeout=60)[0] == out
    assert again.returncode == 0
    assert sha256(Path(out.strip()) / WEIGHTS)


@pytest.mark.parametrize("command", ["list", "verify", "rm", "show"])
def test_a_cache_that_cannot_be_read(lmx: Any, hubs: tuple[Hub, Hub], cache: Path, command: str) -> None:
    cache.write_text("not a folder")
    ran = lmx(command, *([] if command == "list" else ["org/tiny"]), *(["--offline"] if command == "show" else []))
    assert ran.code == (0 if command == "list" else 4)
    assert "Traceback" not in ran.err
