"""Whom a pull tells what, and what it believes: tokens, signed addresses, redirects, sizes."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import LARGE_BYTES, Hub, random_bytes, tree_of
from huggingface_hub import constants
from pulls import WEIGHTS, hub_with, repository

import lmx
from lmx.convert.hub import Wish
from lmx.convert.pull import pull
from lmx.core.errors import InputError, NetworkError, UsageError

SIZE = 3 * LARGE_BYTES
CANARY = "hf_canaryCANARYcanary"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def hubs(cache: Path) -> Iterator[tuple[Hub, Hub]]:
    with hub_with(repository(SIZE), cache) as pair:
        yield pair


@pytest.mark.parametrize("how", ["environment", "option"])
def test_the_token_goes_to_the_hub_alone(
    hubs: tuple[Hub, Hub],
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    how: str,
) -> None:
    """Through redirects, bad answers and a failure in the end, with all loggers at their most talkative."""
    hub, store = hubs
    if how == "environment":
        monkeypatch.setenv("HF_TOKEN", CANARY)
    token = CANARY if how == "option" else None
    monkeypatch.setattr(constants, "HF_DEBUG", True)
    caplog.set_level(logging.DEBUG)
    for name in ("huggingface_hub", "httpx2", "httpcore2", "httpcore2.http11", "httpcore2.connection"):
        caplog.set_level(logging.DEBUG, name)
    store.answers = [(500, {}), (403, {}), (302, {"Location": f"{store.url}/elsewhere?signed=s3cret"})]
    told = [str(event) for event in pull(Wish.of("org/tiny", token=token))]
    store.answers = [(500, {})] * 100
    hub.files[WEIGHTS], hub.commit, store.commit = random_bytes(SIZE, 3), "c" * 40, "c" * 40
    with pytest.raises(NetworkError) as caught:
        told.extend(str(event) for event in pull(Wish.of("org/tiny", token=token)))
    assert hub.tokens == {"127.0.0.1": {f"Bearer {CANARY}"}}
    assert store.tokens == {"127.0.0.1": {None}}
    assert not any(CANARY in request for request in store.seen)
    texts = [*told, caplog.text, *capfd.readouterr(), *tree_of(tmp_path)]
    error: BaseException | None = caught.value
    while error is not None:
        texts += [str(error), repr(error.__dict__)]
        error = error.__cause__
    texts += [path.read_text("latin-1") for path in cache.rglob("*") if path.is_file() and path.stat().st_size < 10_000]
    for text in texts:
        assert CANARY not in text
        assert "s3cret" not in text


@pytest.mark.parametrize("token", ["", " ", "\n"])
def test_an_empty_token_is_none(hubs: tuple[Hub, Hub], token: str) -> None:
    """As of a variable that is not set."""
    lmx.pull("org/tiny", token=token)
    assert hubs[0].tokens == {"127.0.0.1": {None}}


@pytest.mark.parametrize("token", [f"{CANARY}\nX-Other: 1", f"{CANARY}é", f"{CANARY}\0"])
def test_what_is_no_token_is_not_told(hubs: tuple[Hub, Hub], token: str) -> None:
    with pytest.raises(UsageError, match="no token") as caught:
        lmx.pull("org/tiny", token=token)
    assert CANARY not in caught.value.message + caught.value.hint
    assert hubs[0].calls == []


def test_a_redirect_on_the_hub_itself_keeps_the_token(hubs: tuple[Hub, Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    hub, _ = hubs
    monkeypatch.setenv("HF_TOKEN", CANARY)
    hub.elsewhere = True  # the same machine under another name
    lmx.pull("org/tiny")
    assert hub.tokens == {"127.0.0.1": {f"Bearer {CANARY}"}, "localhost": {None}}


@pytest.mark.parametrize(
    "location",
    [
        "file:///etc/passwd",
        "ftp://127.0.0.1/x",
        "http://[",
        "http://a:b/",
        "javascript:0",
        "http://127.0.0.1:99999999/",
    ],
)
def test_redirects_that_lead_nowhere_are_refused(hubs: tuple[Hub, Hub], location: str) -> None:
    _, store = hubs
    store.answers = [(302, {"Location": location})] * 20
    with pytest.raises((InputError, NetworkError)):
        lmx.pull("org/tiny")


@pytest.mark.parametrize("size", [SIZE - 1, SIZE + 1])
def test_a_file_of_another_size_is_refused(hubs: tuple[Hub, Hub], cache: Path, size: int) -> None:
    hubs[1].wrong[WEIGHTS] = random_bytes(size)
    with pytest.raises(InputError, match=f"has {size} bytes there"):
        lmx.pull("org/tiny")
    assert not list(cache.rglob(f"snapshots/*/{WEIGHTS}"))
