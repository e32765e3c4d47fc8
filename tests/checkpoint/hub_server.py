"""A server with the part of the Hub's API that downloads need, which fails on request."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "c" * 40


class HubServer(ThreadingHTTPServer):
    """Serves folders as repositories.

    Attributes:
        repositories: by name; of the one revision "main".
        fault: called with a request's path and how often it was asked for, from 1; a status to answer with, "cut" to
            send half of a body, or None.
        asked: how often each path was asked for.
    """

    daemon_threads = True

    def __init__(self, repositories: dict[str, Path], fault: Callable[[str, int], object] = lambda path, times: None):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories, self.fault, self.asked = repositories, fault, Counter()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextlib.contextmanager
def serving(repositories: dict[str, Path], fault: Callable[[str, int], object] | None = None) -> Iterator[HubServer]:
    with HubServer(repositories, fault or (lambda path, times: None)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield server
        server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        self.server.asked[path] += 1
        fault = self.server.fault(path, self.server.asked[path])
        if isinstance(fault, int):
            codes = {401: "RepoNotFound", 403: "GatedRepo"}
            headers = {"X-Error-Code": codes[fault]} if fault in codes else {"Retry-After": "0"}
            return self.reply(fault, b"{}", headers, body)
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            return self.api(parts[2:], body)
        name, folder = "/".join(parts[:2]), self.server.repositories.get("/".join(parts[:2]))
        if folder is None or parts[2:3] != ["resolve"]:
            return self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
        if parts[3] not in ("main", COMMIT):
            return self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
        file = folder.joinpath(*parts[4:])
        if not file.is_file():
            return self.reply(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, body)
        data = file.read_bytes()
        headers = {"ETag": f'"{etag(file)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes", "X-Name": name}
        status, given = 200, self.headers.get("Range")
        if given:
            start = int(given.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            data, status = data[start:], 206
        return self.reply(status, data, headers, body, cut=fault == "cut")

    def api(self, parts: list[str], body: bool) -> None:
        folder = self.server.repositories.get("/".join(parts[:2]))
        if folder is None:
            return self.reply(401, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
        if len(parts) > 3 and parts[3] not in ("main", COMMIT):
            return self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
        names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
        if parts[2:3] == ["tree"]:
            found = [
                {"type": "file", "path": n, "size": (folder / n).stat().st_size, "oid": etag(folder / n)} for n in names
            ]
            return self.reply(200, json.dumps(found).encode(), {}, body)
        info = {"id": "/".join(parts[:2]), "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
        return self.reply(200, json.dumps(info).encode(), {"X-Repo-Commit": COMMIT}, body)

    def reply(self, status: int, data: bytes, headers: dict[str, str], body: bool, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.close_connection = True


def etag(file: Path) -> str:
    """As the Hub's: SHA-256 of large files, git's SHA-1 of small ones."""
    data = file.read_bytes()
    if file.suffix == ".safetensors":
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
