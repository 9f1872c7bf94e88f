"""Several pulls of the same at once, of lmx and of huggingface_hub: locks, and one result."""

import errno
import hashlib
import json
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hub_server import Fault, Hub, wait_until
from huggingface_hub.utils import WeakFileLock
from pulls import AT_RISK_BYTES, WEIGHTS, hub_with, left_overs, repository, sha256, start_pull

import lmx
from lmx.convert import places
from lmx.convert.hub import Wish
from lmx.convert.pull import pull
from lmx.convert.pull_events import Installed, Pulled, Waiting

SIZE = 24_000_000
FILES = repository(SIZE)


@pytest.fixture
def hubs(tmp_path: Path) -> Iterator[tuple[Hub, Hub]]:
    with hub_with(dict(FILES), tmp_path / "cache") as pair:
        yield pair


def digest(files: dict[str, bytes]) -> str:
    return hashlib.sha256(files[WEIGHTS]).hexdigest()


def test_two_pulls_at_once_share_one_result(hubs: tuple[Hub, Hub], tmp_path: Path) -> None:
    hub, store = hubs
    children = [start_pull(hub, tmp_path / "cache") for _ in range(2)]
    said = [child.communicate(timeout=60) for child in children]
    assert [child.returncode for child in children] == [0, 0], said
    assert said[0][0] == said[1][0]
    assert sha256(Path(said[0][0].strip()) / WEIGHTS) == digest(hub.files)
    assert store.sent == SIZE
    assert left_overs(tmp_path / "cache") == []


def test_two_pulls_at_once_share_the_work(hubs: tuple[Hub, Hub], tmp_path: Path) -> None:
    """Of several files each fetches those that the other one does not."""
    hub, store = hubs
    weights = hub.files.pop(WEIGHTS)
    shards = {
        f"model-0000{number}-of-00006.safetensors": weights[number * 4_000_000 :][:4_000_000] for number in range(6)
    }
    hub.files.update(shards)
    children = [start_pull(hub, tmp_path / "cache", "--json") for _ in range(2)]
    said = [child.communicate(timeout=60) for child in children]
    assert [child.returncode for child in children] == [0, 0], said
    done = [json.loads(out) for out, _ in said]
    assert done[0]["folder"] == done[1]["folder"]
    assert sum(one["fetched_bytes"] for one in done) == sum(map(len, hub.files.values()))
    assert store.sent == SIZE
    assert all((Path(done[0]["folder"]) / name).read_bytes() == data for name, data in hub.files.items())
    assert left_overs(tmp_path / "cache") == []


def test_the_second_takes_over_when_the_first_is_killed(hubs: tuple[Hub, Hub], tmp_path: Path) -> None:
    hub, store = hubs
    first = start_pull(hub, tmp_path / "cache")
    store.faults = [Fault("call", 12_000_000, first.kill)]
    wait_until(lambda: store.sent > 0)
    second = start_pull(hub, tmp_path / "cache")
    first.communicate(timeout=60)
    out, err = second.communicate(timeout=60)
    assert (first.returncode, second.returncode) == (-signal.SIGKILL, 0), err
    assert sha256(Path(out.strip()) / WEIGHTS) == digest(hub.files)
    assert store.sent <= SIZE + AT_RISK_BYTES


def test_huggingface_hub_is_waited_for(hubs: tuple[Hub, Hub], tmp_path: Path) -> None:
    """It takes the same lock for the same content."""
    hub, _ = hubs
    lock = tmp_path / "cache" / ".locks" / "models--org--tiny" / f"{digest(hub.files)}.lock"
    lock.parent.mkdir(parents=True)
    with ExitStack() as held:
        held.enter_context(WeakFileLock(lock))
        events = pull(Wish.of("org/tiny"))
        for event in events:
            if event == Waiting(WEIGHTS):
                held.close()
        assert isinstance(event, Pulled)
    assert sha256(event.folder / WEIGHTS) == digest(hub.files)


def test_a_file_that_somebody_else_fetches_holds_up_no_other(hubs: tuple[Hub, Hub], tmp_path: Path) -> None:
    hub, _ = hubs
    config = hashlib.sha1(b"blob %d\0" % len(hub.files["config.json"]) + hub.files["config.json"]).hexdigest()
    lock = tmp_path / "cache" / ".locks" / "models--org--tiny" / f"{config}.lock"
    lock.parent.mkdir(parents=True)
    installed = []
    with ExitStack() as held:
        held.enter_context(WeakFileLock(lock))
        for event in pull(Wish.of("org/tiny")):
            if isinstance(event, Installed):
                installed.append(event.name)
                if event.name == WEIGHTS:
                    held.close()
    assert installed[-1] == "config.json"
    assert set(installed) == set(hub.files)


def test_a_disk_without_locks(hubs: tuple[Hub, Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    """As some network disks are."""

    def flock(fd: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(places.fcntl, "flock", flock)
    assert sha256(lmx.pull("org/tiny") / WEIGHTS) == digest(hubs[0].files)
