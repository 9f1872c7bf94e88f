"""Bytes of a hub's file by ranged requests: redirects followed by hand, so that the token goes to the hub alone.

The hub answers for a large file with a redirect to a signed address elsewhere. That address is kept while it works, and
never told to anybody: not to a log, not in an error. Imports huggingface_hub, whose session, with its proxies and
certificates, is used.
"""

import email.utils
import logging
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING
from urllib.parse import quote, urljoin, urlsplit

from lmx.convert.hub import is_transport_error
from lmx.convert.listing import RemoteFile
from lmx.core.errors import InputError, LmxError, NetworkError, NotFoundError
from lmx.core.files import quoted

if TYPE_CHECKING:
    from httpx2 import Client, Request, Response

THREAD_PREFIX = "lmx-pull"
"""What the names of all threads that fetch begin with: what is logged there is dropped."""

_REDIRECTS = 5
_REDIRECT_BYTES = 1 << 16
_REDIRECT_CODES = (301, 302, 303, 307, 308)
_RETRIED_CODES = (408, 416, 425, 429)
_RANGE = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19}|\*)")


class UnluckyError(Exception):
    """A request failed in a way that may pass. `seconds`: what the server asks to wait; `kind`: the error if it stays.

    `ignores_ranges`: the server answered a request for a range with the whole file.
    """

    def __init__(
        self,
        reason: str,
        seconds: float | None = None,
        kind: type[LmxError] = NetworkError,
        *,
        ignores_ranges: bool = False,
    ) -> None:
        super().__init__(reason)
        self.reason, self.seconds, self.kind, self.ignores_ranges = reason, seconds, kind, ignores_ranges


class HubFiles:
    """The files of a repository at a commit, to be read in ranges by several threads."""

    def __init__(self, repo: str, commit: str, token: str | bool | None) -> None:
        from huggingface_hub import constants
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        self._base = f"{constants.ENDPOINT}/{repo}/resolve/{commit}/"
        self._origin = _origin(self._base)
        self._timeout = float(constants.HF_HUB_DOWNLOAD_TIMEOUT)
        headers = {name.lower(): value for name, value in build_hf_headers(token=token).items()}
        self._secret = {"authorization": headers.pop("authorization")} if "authorization" in headers else {}
        self._headers = headers | {"accept-encoding": "identity"}
        self._addresses: dict[str, str] = {}
        _silence_logs()

    def read(self, file: RemoteFile, start: int, stop: int, *, whole: bool = False) -> Iterator[bytes]:
        """Bytes from `start` to `stop`, or fewer. whole: of a server that knows no ranges, all of the file.

        Raises:
            UnluckyError: it may work another time.
            HfHubHTTPError: the hub refuses.

        """
        wanted = {} if whole else {"range": f"bytes={start}-{stop - 1}"}
        with self._opened(file, wanted) as response:
            _check_answer(response, file, start, stop)
            left = stop - start
            # To the very end, where the answer says where that is: only then is the connection good for the next piece
            has_end = "content-length" in response.headers
            with _transport_errors():
                for data in response.iter_raw():
                    yield data[: max(0, left)]
                    left -= len(data)
                    if left < 0 or (left == 0 and not has_end):
                        return

    @contextmanager
    def _opened(self, file: RemoteFile, headers: Mapping[str, str]) -> "Iterator[Response]":
        """The answer of whoever has the file, its body still to come."""
        from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

        client: Client = get_session()
        known = self._addresses.get(file.name)
        url = known or self._base + quote(file.name)
        for _ in range(_REDIRECTS + 1):
            with _transport_errors():
                response = client.send(self._request(client, url, headers), stream=True, follow_redirects=False)
            try:
                if response.status_code not in _REDIRECT_CODES:
                    self._check_status(response, file, url)
                    if url != self._base + quote(file.name):
                        self._addresses[file.name] = url
                    yield response
                    return
                url = self._next(url, response)
                _drain(response)
            finally:
                response.close()
        raise UnluckyError("the hub redirects without end")

    def _request(self, client: "Client", url: str, headers: Mapping[str, str]) -> "Request":
        secret = self._secret if _origin(url) == self._origin else {}
        return client.build_request("GET", url, headers={**self._headers, **headers, **secret}, timeout=self._timeout)

    def _next(self, url: str, response: "Response") -> str:
        """Where a redirect leads. Raises InputError for a place that is no web server, or less safe than the hub."""
        try:
            target = urljoin(url, response.headers.get("location", ""))
            scheme, host, _ = _origin(target)
        except ValueError:  # the port is no number, or the like
            scheme, host = "", None
        if not host or scheme not in ("http", "https") or (scheme == "http" and self._origin[0] == "https"):
            raise InputError("the hub redirects to an address that is not safe", "check HF_ENDPOINT and any proxy")
        return target

    def _check_status(self, response: "Response", file: RemoteFile, url: str) -> None:
        """Raise for an answer that is not the file."""
        status = response.status_code
        if status in (200, 206):
            return
        if status in _RETRIED_CODES or status >= 500:
            if status == 416:
                self._addresses.pop(file.name, None)
            raise UnluckyError(f"HTTP {status}", retry_after(response.headers))
        if _origin(url) != self._origin:
            # A signed address has run out: the hub gives a new one
            self._addresses.pop(file.name, None)
            raise UnluckyError(f"HTTP {status} from where the hub keeps its files")
        if status == 404 and response.headers.get("x-error-code", "EntryNotFound") == "EntryNotFound":
            message = f"the hub lists {quoted(file.name)}, and does not have it (HTTP 404)"
            raise NotFoundError(message, "the repository is changing or broken: try again, or --exclude the file")
        from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]

        with _transport_errors():
            hf_raise_for_status(response)
        raise UnluckyError(f"HTTP {status}")


def _drain(response: "Response") -> None:
    """Read the little text of a redirect, so that the connection can be used again."""
    with _transport_errors():
        left = _REDIRECT_BYTES
        for data in response.iter_raw():
            left -= len(data)
            if left < 0:
                return


def _check_answer(response: "Response", file: RemoteFile, start: int, stop: int) -> None:
    """Raise UnluckyError unless the body will be bytes from `start` on of a file of the right size, as they are."""
    if response.headers.get("content-encoding", "identity") != "identity":
        raise UnluckyError("the answer is compressed")
    if response.status_code == 206:
        match = _RANGE.fullmatch(response.headers.get("content-range", ""))
        if match is None or int(match[1]) != start or int(match[2]) >= stop:
            raise UnluckyError("the answer is another range")
        total = match[3]
    else:
        if (start, stop) != (0, file.size):
            raise UnluckyError("the answer to a range is the whole file", ignores_ranges=True)
        total = response.headers.get("content-length", "*")
    if total not in ("*", str(file.size)):
        raise UnluckyError(f"the file has {total:.20} bytes there, not {file.size:,}", kind=InputError)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """The seconds of a Retry-After header, which may be a date (RFC 9110, section 10.2.3)."""
    text = headers.get("retry-after", "").strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    with suppress(ValueError, OverflowError, TypeError, IndexError):  # a date that is none
        date = email.utils.parsedate_tz(text)
        return None if date is None else max(0.0, email.utils.mktime_tz(date) - time.time())
    return None


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


@contextmanager
def _transport_errors() -> Iterator[None]:
    """What the connection suffers, as UnluckyError; without its cause, which may know the signed address."""
    try:
        yield
    except Exception as error:
        if not is_transport_error(error):
            raise
        raise UnluckyError(type(error).__name__) from None


def _silence_logs() -> None:
    """Let nothing be logged in the threads that fetch: the HTTP library logs addresses, and those are signed."""
    coming = {f"{library}.{part}" for library in ("httpcore", "httpcore2") for part in _LOGGED_PARTS}
    for name in {*_TALKATIVE, *coming, *logging.root.manager.loggerDict}:
        if name.partition(".")[0] in _TALKATIVE:
            logger = logging.getLogger(name)
            logger.removeFilter(_outside)
            logger.addFilter(_outside)


_TALKATIVE = ("httpx", "httpcore", "httpx2", "httpcore2", "huggingface_hub")
# Loggers that some of them make only once they are needed
_LOGGED_PARTS = ("connection", "http11", "http2", "proxy", "socks")


def _outside(_record: logging.LogRecord) -> bool:
    return not threading.current_thread().name.startswith(THREAD_PREFIX)
