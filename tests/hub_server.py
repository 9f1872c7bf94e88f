"""A server that speaks the few calls of the hub that a pull, or a look at the headers, needs."""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

COMMIT = "a" * 40


class Hub(ThreadingHTTPServer):
    """Serves `files` as the repository org/tiny.

    `status` other than 200, with the hub's `X-Error-Code`, is the answer to every call. `ranges`: whether it honours
    ranged requests; `sent` counts the bytes of files that went out. `elsewhere`: files are answered by a redirect to
    another host, as the hub does for large ones; `tokens` is what each host was shown.
    """

    def __init__(self, files: Mapping[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = dict(files)
        self.status, self.code, self.ranges = 200, "", True
        self.calls: list[str] = []
        self.sent = 0
        self.elsewhere = False
        self.tokens: dict[str, set[str | None]] = {}


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(send_body=False)

    def do_GET(self) -> None:
        self._answer(send_body=True)

    def _answer(self, send_body: bool) -> None:
        self.server.calls.append(self.path)
        files = self.server.files
        host = self.headers["Host"].partition(":")[0]
        self.server.tokens.setdefault(host, set()).add(self.headers.get("Authorization"))
        path, _, query = self.path.partition("?")
        if self.server.status != 200:
            self._send(b"", False, {"X-Error-Code": self.server.code})
        elif self.path.startswith("/api/models/org/tiny/tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in files.items()
            ]
            self._send(json.dumps(tree).encode(), send_body, {"Content-Type": "application/json"})
        elif self.path.startswith("/api/models/org/tiny"):
            siblings = [{"rfilename": name} for name in files]
            body = json.dumps({"id": "org/tiny", "sha": COMMIT, "siblings": siblings}).encode()
            self._send(body, send_body, {"Content-Type": "application/json"})
        elif self.server.elsewhere and query != "signed":
            self._send(b"", False, {"Location": f"http://localhost:{self.server.server_port}{path}?signed"}, 302)
        else:
            data = files[path.partition(f"/resolve/{COMMIT}/")[2]]
            self._send_file(data, send_body, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT})

    def _send_file(self, data: bytes, send_body: bool, headers: dict[str, str]) -> None:
        wanted = self.headers.get("Range", "")
        if send_body and self.server.ranges and wanted.startswith("bytes=0-"):
            part = data[: int(wanted.removeprefix("bytes=0-")) + 1]
            headers |= {"Content-Range": f"bytes 0-{len(part) - 1}/{len(data)}"}
            self.server.sent += len(part)
            self._send(part, True, headers, 206)
            return
        self.server.sent += len(data) * send_body
        self._send(data, send_body, headers)

    def _send(self, body: bytes, send_body: bool, headers: dict[str, str], status: int | None = None) -> None:
        self.send_response(status or self.server.status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if send_body:
            try:
                self.wfile.write(body)
            except ConnectionError:
                return  # the client had enough

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
        server.shutdown()
        thread.join()
        server.server_close()


def ask_here(server: Hub, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Let huggingface_hub, in this process, take `server` for the hub and `cache` for its cache."""
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    template = constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
