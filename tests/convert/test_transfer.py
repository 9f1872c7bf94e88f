"""A pull of 64 MB through connections that fail: it ends with the right bytes, and few of them came twice."""

import errno
import hashlib
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import Fault, Hub, wait_until
from huggingface_hub import constants
from pulls import AT_RISK_BYTES, WEIGHTS, hub_with, left_overs, repository, sha256, start_pull

import lmx
from lmx.convert import part_file
from lmx.convert.fetch import retry_after
from lmx.convert.hub import Wish
from lmx.convert.part_file import PIECE_BYTES
from lmx.convert.pull import pull
from lmx.convert.pull_events import Arrived, Pulled, Restarted, Retrying
from lmx.convert.transfer import CONNECTIONS
from lmx.core.errors import InputError, NetworkError, ResourceError

CUT_SIZE, SIZE, STOPPED_BYTES = 64_000_000, 24_000_000, 18_000_000
CONTENT = repository(CUT_SIZE)
LESS = CONTENT | {WEIGHTS: CONTENT[WEIGHTS][:SIZE]}


@pytest.fixture
def large_hubs(tmp_path: Path) -> Iterator[tuple[Hub, Hub]]:
    with hub_with(dict(CONTENT), tmp_path / "cache") as pair:
        yield pair


@pytest.fixture
def hubs(tmp_path: Path) -> Iterator[tuple[Hub, Hub]]:
    with hub_with(dict(LESS), tmp_path / "cache") as pair:
        yield pair


def digest(files: dict[str, bytes]) -> str:
    return hashlib.sha256(files[WEIGHTS]).hexdigest()


def test_what_a_death_can_cost_is_what_is_asked_for_at_a_time() -> None:
    assert CONNECTIONS * PIECE_BYTES <= AT_RISK_BYTES


CUTS = [
    (("fin", "rst", "stall", "death")[number % 4], random.Random(number).randrange(CUT_SIZE)) for number in range(40)
]


def pull_through(kind: str, offset: int, hubs: tuple[Hub, Hub], cache: Path) -> None:
    """Pull with one cut after `offset` bytes of the weights went out; after a death, pull once more."""
    hub, store = hubs
    if kind == "death":
        child = start_pull(hub, cache)
        store.faults = [Fault("call", offset, child.kill)]
        child.communicate(timeout=60)
        assert child.returncode == -signal.SIGKILL
        again = start_pull(hub, cache)
        out, err = again.communicate(timeout=60)
        assert again.returncode == 0, err
        folder = Path(out.strip())
    else:
        store.faults = [Fault(kind, offset)]  # type: ignore[arg-type]
        folder = lmx.pull("org/tiny")
    assert not store.faults
    assert sha256(folder / WEIGHTS) == digest(hub.files)
    assert store.sent <= CUT_SIZE + AT_RISK_BYTES
    assert left_overs(cache) == []


@pytest.mark.parametrize(("kind", "offset"), CUTS[:4])
def test_a_pull_survives_a_cut(large_hubs: tuple[Hub, Hub], tmp_path: Path, kind: str, offset: int) -> None:
    pull_through(kind, offset, large_hubs, tmp_path / "cache")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "offset"), CUTS)
def test_a_pull_survives_forty_cuts(large_hubs: tuple[Hub, Hub], tmp_path: Path, kind: str, offset: int) -> None:
    pull_through(kind, offset, large_hubs, tmp_path / "cache")


def test_many_deaths_one_after_the_other(large_hubs: tuple[Hub, Hub], tmp_path: Path) -> None:
    """Each run gets further than the one before, though each is killed."""
    hub, store = large_hubs
    for _ in range(3):
        child = start_pull(hub, tmp_path / "cache")
        store.faults = [Fault("call", store.sent + 20_000_000, child.kill)]
        child.communicate(timeout=60)
        assert child.returncode == -signal.SIGKILL
    before = store.sent
    folder = lmx.pull("org/tiny")
    assert sha256(folder / WEIGHTS) == digest(hub.files)
    assert store.sent - before < CUT_SIZE - 3 * (20_000_000 - AT_RISK_BYTES)


ANSWERS = {
    "416": [(416, {"Content-Range": f"bytes */{SIZE}"})],
    "429": [(429, {"Retry-After": "0"})] * 3,
    "429 by date": [(429, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"})],
    "5xx": [(500, {}), (502, {}), (503, {"Retry-After": "0"}), (504, {})],
    "expired": [(403, {}), (400, {})],
    "another range": [(206, {"Content-Range": f"bytes 7-9/{SIZE}"})],
    "no range": [(206, {})],
    "empty": [(206, {"Content-Range": f"bytes 0-0/{SIZE}"})],
    "compressed": [(206, {"Content-Encoding": "gzip"})],
    "redirected without end": [(302, {"Location": "?signed=s3cret"})] * 80,
    "a range of too many digits": [(206, {"Content-Range": f"bytes 0-{'9' * 5000}/{SIZE}"})],
    "a date that is none": [(429, {"Retry-After": "Wed, 21 Oct 99999 07:28:00 GMT"})],
    "a time that is none": [(503, {"Retry-After": text}) for text in ("-5", "1e9", "x" * 5000)],
    "statuses of no use": [(status, {}) for status in (204, 205, 300, 304, 410, 418, 451)],
}


@pytest.mark.parametrize("name", ANSWERS)
def test_answers_that_may_pass(hubs: tuple[Hub, Hub], name: str) -> None:
    hub, store = hubs
    store.answers = list(ANSWERS[name])
    events = list(pull(Wish.of("org/tiny")))
    assert isinstance(events[-1], Pulled)
    assert sha256(events[-1].folder / WEIGHTS) == digest(hub.files)
    assert any(isinstance(event, Retrying) for event in events)
    assert store.sent <= SIZE + AT_RISK_BYTES


def test_a_server_is_given_the_time_that_it_asks_for(hubs: tuple[Hub, Hub]) -> None:
    _, store = hubs
    store.answers = [(429, {"Retry-After": "1"})]
    waits = [event.seconds for event in pull(Wish.of("org/tiny")) if isinstance(event, Retrying)]
    assert waits == [1.0]
    store.answers = [(503, {"Retry-After": "86400"})] * 8
    store.files[WEIGHTS] = repository(SIZE, seed=5)[WEIGHTS]
    store.commit = hubs[0].commit = "b" * 40
    with pytest.raises(NetworkError, match="asks to wait 86400 seconds"):
        lmx.pull("org/tiny")


def test_the_whole_file_for_a_range_once_or_always(hubs: tuple[Hub, Hub]) -> None:
    hub, store = hubs
    store.ignored_ranges = 2
    folder = lmx.pull("org/tiny")
    assert sha256(folder / WEIGHTS) == digest(hub.files)
    store.files[WEIGHTS] = repository(SIZE, seed=6)[WEIGHTS]
    hub.commit = store.commit = "b" * 40
    store.ranges = False
    folder = lmx.pull("org/tiny")
    assert sha256(folder / WEIGHTS) == digest(hub.files)


def test_a_server_that_is_gone_is_given_up(hubs: tuple[Hub, Hub], tmp_path: Path) -> None:
    _, store = hubs
    store.faults = [Fault("rst", 12_000_000 + number) for number in range(1000)]
    with pytest.raises(NetworkError, match=r"model\.safetensors") as caught:
        lmx.pull("org/tiny")
    assert "s3cret" not in f"{caught.value.message} {caught.value.hint}"
    store.faults, before = [], store.sent
    folder = lmx.pull("org/tiny")
    assert store.sent - before < SIZE - 1_000_000
    assert left_overs(tmp_path / "cache") == []
    assert (folder / WEIGHTS).is_file()


def test_same_size_wrong_bytes_are_never_installed(hubs: tuple[Hub, Hub], tmp_path: Path) -> None:
    hub, store = hubs
    right = hub.files[WEIGHTS]
    store.wrong[WEIGHTS] = right[:-1] + bytes([right[-1] ^ 1])
    hub.wrong["config.json"] = b'{"model_type": "mixtrol"}'
    for name in ("config.json", WEIGHTS):
        with pytest.raises(InputError, match=name.replace(".", r"\.")) as caught:
            lmx.pull("org/tiny")
        assert "digest" in caught.value.message
        installed = {path.name for path in (tmp_path / "cache").rglob("snapshots/*/*")}
        assert name not in installed
        hub.wrong.clear()
    assert not list((tmp_path / "cache").rglob("*.incomplete"))
    store.wrong.clear()
    assert sha256(lmx.pull("org/tiny") / WEIGHTS) == digest(hub.files)


def stopped(store: Hub) -> None:
    """Pull, and leave when more of the weights is here than is asked for at a time, and the rest does not come."""
    store.faults = [Fault("stall", store.sent + STOPPED_BYTES)] * 1000
    events = pull(Wish.of("org/tiny"))
    for event in events:
        if isinstance(event, Arrived) and event.name == WEIGHTS and event.done > AT_RISK_BYTES + PIECE_BYTES // 2:
            break
    events.close()  # type: ignore[attr-defined]
    wait_until(lambda: not any(thread.name.startswith("lmx-pull") for thread in threading.enumerate()))
    store.faults = []


def test_what_lay_spoiled_on_the_disk_begins_anew(hubs: tuple[Hub, Hub], tmp_path: Path) -> None:
    hub, store = hubs
    stopped(store)
    (data,) = (tmp_path / "cache").rglob("*.lmx.incomplete")
    (journal,) = (tmp_path / "cache").rglob("*.lmx-journal.incomplete")
    piece = int(journal.read_bytes().splitlines()[1])
    with data.open("r+b") as file:
        file.seek(piece * PIECE_BYTES + 5)
        file.write(b"not what was there")
    events = list(pull(Wish.of("org/tiny")))
    assert Restarted(WEIGHTS) in events
    assert sha256(events[-1].folder / WEIGHTS) == digest(hub.files)  # type: ignore[union-attr]
    assert left_overs(tmp_path / "cache") == []


def test_a_changed_revision_restarts_that_file(hubs: tuple[Hub, Hub], tmp_path: Path) -> None:
    hub, store = hubs
    stopped(store)
    assert list((tmp_path / "cache").rglob("*.lmx.incomplete"))
    hub.files[WEIGHTS] = repository(SIZE, seed=1)[WEIGHTS]
    hub.commit = store.commit = "b" * 40
    before = hub.sent
    folder = lmx.pull("org/tiny")
    assert folder.name == "b" * 40
    assert sha256(folder / WEIGHTS) == digest(hub.files)
    assert hub.sent == before  # the small files are the same, and were here
    assert left_overs(tmp_path / "cache") == []


def test_a_disk_that_fills_up_midway(hubs: tuple[Hub, Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub, store = hubs
    really, room = os.pwrite, [18_000_000]

    def pwrite(fd: int, data: bytes, offset: int) -> int:
        room[0] -= len(data)
        if room[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return really(fd, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(part_file.os, "pwrite", pwrite)
        with pytest.raises(ResourceError, match="does not fit") as caught:
            lmx.pull("org/tiny")
        assert caught.value.hint
    before = store.sent
    assert sha256(lmx.pull("org/tiny") / WEIGHTS) == digest(hub.files)
    assert store.sent - before <= SIZE - 18_000_000 + AT_RISK_BYTES


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_pull_soon_even_where_nothing_comes(
    hubs: tuple[Hub, Hub], tmp_path: Path, number: signal.Signals, code: int
) -> None:
    hub, store = hubs
    store.faults = [Fault("stall", 3_000_000 + number) for number in range(100)]
    child = start_pull(hub, tmp_path / "cache", env={"HF_HUB_DOWNLOAD_TIMEOUT": "30"})
    wait_until(lambda: len(store.faults) <= 92)
    began = time.monotonic()
    child.send_signal(number)
    _, err = child.communicate(timeout=20)
    assert child.returncode == code, err
    assert time.monotonic() - began < 3
    assert "Traceback" not in err


def test_connections_are_used_again(hubs: tuple[Hub, Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    """A new one for each piece would begin slowly each time, and shake hands."""
    hub, store = hubs
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 60)  # a machine that stands still is no lost connection
    lmx.pull("org/tiny")
    assert len(store.calls) == -(-SIZE // PIECE_BYTES)
    assert store.connections <= CONNECTIONS
    assert hub.connections <= 1 + CONNECTIONS


@pytest.mark.parametrize("ends", [False, True])
def test_more_bytes_than_asked_for_are_dropped(hubs: tuple[Hub, Hub], ends: bool) -> None:
    hub, store = hubs
    store.surplus = b"more than the range" * 1000
    store.says_length = ends
    assert sha256(lmx.pull("org/tiny") / WEIGHTS) == digest(hub.files)


def test_files_of_the_same_content_come_once(hubs: tuple[Hub, Hub]) -> None:
    hub, _ = hubs
    hub.files["generation_config.json"] = hub.files["config.json"]
    hub.files["empty.json"] = b""
    hub.files["LICENSE"] = b""
    before = hub.sent
    folder = lmx.pull("org/tiny")
    assert (folder / "generation_config.json").read_bytes() == hub.files["config.json"]
    assert (folder / "LICENSE").read_bytes() == b""
    assert hub.sent - before == sum(map(len, {data for name, data in hub.files.items() if name != WEIGHTS}))


def test_a_pull_that_is_left_early_stops(hubs: tuple[Hub, Hub]) -> None:
    """Its threads end, and ask for nothing more though it would come."""
    _, store = hubs
    stopped(store)
    sent = store.sent
    assert sent < SIZE
    time.sleep(0.3)
    assert store.sent == sent


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("", None),
        ("7", 7.0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
        ("Wed, 21 Oct 99999 07:28:00 GMT", None),
        ("-5", None),
        ("1e9", None),
        ("²", None),
        ("9" * 5000, 999_999_999.0),
        ("soon", None),
    ],
)
def test_retry_after(text: str, seconds: float | None) -> None:
    assert retry_after({"retry-after": text}) == seconds
