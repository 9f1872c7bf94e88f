"""A server that speaks the calls of the hub that a pull, or a look at the headers, needs; and how it can fail."""

import hashlib
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

import pytest
from huggingface_hub import constants

COMMIT = "a" * 40
LARGE_BYTES = 1 << 20  # of what size on files are kept with Git LFS
_BLOCK = 1 << 16

Cut = Literal["fin", "rst", "stall", "call"]


@dataclass
class Fault:
    """What to do to the body of large files once `after` bytes of them went out, once.

    "fin" ends the connection in order, "rst" without it, "stall" sends nothing for a while, "call" calls `call`.
    """

    kind: Cut
    after: int
    call: Callable[[], None] = field(default=lambda: None)
    stall_seconds: float = 30.0


class Hub(ThreadingHTTPServer):
    """Serves `files` as the repository org/tiny.

    `status` other than 200, with the hub's `X-Error-Code`, is the answer to every call. `ranges`: whether it honours
    ranged requests; `sent` counts the bytes of files that went out. `elsewhere`: files are answered by a redirect to
    another host, as the hub does for large ones (those are, in any case, where `signed` is another server); `tokens`
    is what each host was shown. `answers`: statuses and headers of the next requests for large files, in order.
    `ignored_ranges`: so many requests for ranges get the whole file; `surplus` comes after each range of a large file;
    `says_length`: whether an answer to a range tells its length. `file_answer`: a status and an `X-Error-Code` for
    every file. `wrong`: what comes in place of a file's content. `entries` replaces the files of the listing, and
    `without_metadata` takes their sizes and digests away.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, files: Mapping[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = dict(files)
        self.commit: object = COMMIT
        self.status, self.code, self.ranges = 200, "", True
        self.calls: list[str] = []
        self.sent = 0
        self.elsewhere = False
        self.signed: Hub | None = None
        self.tokens: dict[str, set[str | None]] = {}
        self.seen: list[str] = []
        self.answers: list[tuple[int, dict[str, str]]] = []
        self.wrong: dict[str, bytes] = {}
        self.entries: list[dict[str, Any]] | None = None
        self.without_metadata = False
        self.file_answer: tuple[int, str] | None = None
        self.ignored_ranges = 0
        self.surplus, self.says_length, self.connections = b"", True, 0
        self.faults: list[Fault] = []
        self.ended = threading.Event()
        self.lock = threading.Lock()
        self._digests: dict[int, tuple[bytes, str, str]] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def digests(self, data: bytes) -> tuple[str, str]:
        """git's blob id and SHA-256, computed once for each content."""
        if id(data) not in self._digests:
            oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            self._digests[id(data)] = (data, oid, hashlib.sha256(data).hexdigest())
        return self._digests[id(data)][1:]

    def etag(self, data: bytes) -> str:
        return self.digests(data)[len(data) >= LARGE_BYTES]

    def take_fault(self, sent: int) -> Fault | None:
        with self.lock:
            if self.faults and self.sent + sent >= self.faults[0].after:
                return self.faults.pop(0)
        return None

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections += 1
        super().process_request(request, client_address)

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: clients leave early in many tests."""


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(send_body=False)

    def do_GET(self) -> None:
        self._answer(send_body=True)

    def _answer(self, send_body: bool) -> None:
        hub = self.server
        hub.calls.append(self.path)
        hub.seen.append(f"{self.path}\n{self.headers}")
        host = self.headers["Host"].partition(":")[0]
        hub.tokens.setdefault(host, set()).add(self.headers.get("Authorization"))
        path, _, query = self.path.partition("?")
        if hub.status != 200:
            self._send(b"", False, {"X-Error-Code": hub.code})
        elif path.startswith("/api/models/org/tiny/tree/"):
            self._send_json(self._tree(), send_body)
        elif path.startswith("/api/models/org/tiny"):
            self._send_json(
                {"id": "org/tiny", "sha": hub.commit, "siblings": self._siblings("blobs" in query)}, send_body
            )
        else:
            self._file(unquote(path), query, send_body)

    def _file(self, path: str, query: str, send_body: bool) -> None:
        hub = self.server
        name = path.partition(f"/resolve/{hub.commit}/")[2]
        data = hub.files.get(name)
        if hub.file_answer is not None:
            status, code = hub.file_answer
            self._send(b"", False, {"X-Error-Code": code}, status)
            return
        if data is None:
            self._send(b"", False, {"X-Error-Code": "EntryNotFound"}, 404)
            return
        headers = {"ETag": f'"{hub.etag(data)}"', "X-Repo-Commit": str(hub.commit)}
        signed = query.startswith("signed")
        large = len(data) >= LARGE_BYTES
        if hub.signed is not None and large and not signed:
            linked = {"X-Linked-Etag": f'"{hub.etag(data)}"', "X-Linked-Size": str(len(data))}
            location = {"Location": f"{hub.signed.url}{path}?signed=s3cret"}
            self._send(b"", False, {**headers, **linked, **location}, 302)
        elif hub.elsewhere and not signed:
            self._send(b"", False, {"Location": f"http://localhost:{hub.server_port}{path}?signed"}, 302)
        elif large and send_body and hub.answers:
            status, more = hub.answers.pop(0)
            self._send(b"", False, more, status)
        else:
            self._send_file(hub.wrong.get(name, data), send_body, headers)

    def _tree(self) -> list[dict[str, Any]]:
        hub, entries = self.server, []
        for name, data in hub.files.items():
            oid, sha256 = hub.digests(data)
            entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": oid}
            if len(data) >= LARGE_BYTES:
                entry["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 135}
            entries.append(entry)
        return entries

    def _siblings(self, metadata: bool) -> list[dict[str, Any]]:
        hub, entries = self.server, []
        if hub.entries is not None:
            return hub.entries
        for name, data in hub.files.items():
            entry: dict[str, Any] = {"rfilename": name}
            if metadata and not hub.without_metadata:
                oid, sha256 = hub.digests(data)
                entry |= {"size": len(data), "blobId": oid}
                if len(data) >= LARGE_BYTES:
                    entry["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 135}
            entries.append(entry)
        return entries

    def _send_file(self, data: bytes, send_body: bool, headers: dict[str, str]) -> None:
        wanted = self.headers.get("Range", "").removeprefix("bytes=")
        status, body = 200, memoryview(data)
        if send_body and wanted and self._honours_ranges(data):
            first, last = wanted.split("-")
            start, stop = int(first), min(len(data), int(last) + 1)
            if start >= len(data):
                self._send(b"", False, {"Content-Range": f"bytes */{len(data)}"}, 416)
                return
            status, body = 206, body[start:stop]
            headers |= {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
            if self.server.surplus and len(data) >= LARGE_BYTES:
                body = memoryview(bytes(body) + self.server.surplus)
        if self.server.says_length:
            headers |= {"Content-Length": str(len(body))}
        self.close_connection = not self.server.says_length
        self._head(status, headers)
        if not send_body:
            return
        for offset in range(0, len(body), _BLOCK):
            block = body[offset : offset + _BLOCK]
            if len(data) >= LARGE_BYTES and (fault := self.server.take_fault(len(block))) is not None:
                self._suffer(fault)
                return
            self.wfile.write(block)
            with self.server.lock:
                self.server.sent += len(block)

    def _honours_ranges(self, data: bytes) -> bool:
        with self.server.lock:
            if self.server.ignored_ranges and len(data) >= LARGE_BYTES:
                self.server.ignored_ranges -= 1
                return False
        return self.server.ranges

    def _suffer(self, fault: Fault) -> None:
        if fault.kind == "stall":
            self.server.ended.wait(fault.stall_seconds)
        elif fault.kind == "call":
            fault.call()
        elif fault.kind == "rst":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        if fault.kind == "rst":
            self.connection.close()
        else:
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

    def _send_json(self, value: object, send_body: bool) -> None:
        self._send(json.dumps(value).encode(), send_body, {"Content-Type": "application/json"})

    def _send(self, body: bytes, send_body: bool, headers: dict[str, str], status: int | None = None) -> None:
        self._head(status or self.server.status, {**headers, "Content-Length": str(len(body))})
        if send_body:
            self.wfile.write(body)

    def _head(self, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@contextmanager
def serving(files: Mapping[str, bytes]) -> Iterator[Hub]:
    """A running server."""
    server = Hub(files)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.ended.set()
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def serving_two(files: Mapping[str, bytes]) -> Iterator[tuple[Hub, Hub]]:
    """A hub, and the other origin where it keeps its large files. The two share their files."""
    with serving(files) as hub, serving({}) as store:
        store.files = hub.files
        hub.signed = store
        yield hub, store


def ask_here(server: Hub, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Let huggingface_hub, in this process, take `server` for the hub and `cache` for its cache."""
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    template = constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


def environment(server: Hub, cache: Path) -> dict[str, str]:
    """The same for a child process."""
    return {"HF_ENDPOINT": server.url, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "", "HF_HUB_DISABLE_XET": "1"}


def random_bytes(count: int, seed: int = 0) -> bytes:
    """Bytes that look like weights to anything that would compress them."""
    import random

    return random.Random(seed).randbytes(count)


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


def tree_of(folder: Path) -> set[str]:
    """All files and links below a folder."""
    return {os.path.relpath(os.path.join(top, name), folder) for top, _, names in os.walk(folder) for name in names}
