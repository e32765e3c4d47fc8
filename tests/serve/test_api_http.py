"""What is between the socket and the routes: slow readers, large headers, proxies, faults of what is mounted."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import math
import threading
import time

import httpx
import pytest
from fastapi import FastAPI
from starlette.responses import Response, StreamingResponse

from kandinsky_jax.serve.api import log_lines, make_app
from kandinsky_jax.serve.api import server as server_module
from kandinsky_jax.serve.page import mount_page
from kandinsky_jax.serve.server_settings import ServerSettings
from kandinsky_jax.serve.service import Service
from tests.serve.servers import server, tiny

KEY = "a-key-of-many-letters"
LARGE = 40_000_000  # bytes of a response


@pytest.fixture(scope="module")
def plain():
    with server(generates=False, add=add_routes) as running:
        yield running


def add_routes(app, service, settings):
    @app.get("/large")
    def large():
        return Response(bytes(LARGE))

    @app.get("/slow")
    async def slow():
        async def parts():
            for _ in range(10):
                yield b"x"
                await asyncio.sleep(0.1)

        return StreamingResponse(parts())

    mounted = FastAPI()
    app.mount("/ui", mounted)

    @mounted.get("/fault")
    def fault(kind: str):
        raise {"key": KeyError, "value": ValueError}[kind]("of what is mounted")

    @mounted.get("/answer")
    def answer():
        return Response("a page of its own", 500)


ASK = b"GET /large HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"


def received(connection, size: int = 2**17, pause: float = 0.0) -> int:
    """Read a response in parts, until it ends; return its bytes."""
    found = 0
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(size):
            found += len(part)
            time.sleep(pause)
    return found


# Slow readers ------------------------------------------------------------------------------------------------------


def test_a_steady_reader_has_the_time_that_it_needs(plain, monkeypatch):
    monkeypatch.setattr(server_module, "STALLED_SECONDS", 0.5)
    with plain.connect() as connection:
        connection.sendall(ASK)
        began = time.monotonic()
        assert received(connection, pause=0.007) > LARGE
        assert time.monotonic() - began > 1.5


def test_a_reader_of_next_to_nothing_is_dropped(plain, monkeypatch):
    monkeypatch.setattr(server_module, "STALLED_SECONDS", 0.3)
    with plain.connect() as connection:
        connection.sendall(ASK)
        until = time.monotonic() + 1.5
        while time.monotonic() < until:
            assert connection.recv(1)
            time.sleep(0.05)
        assert received(connection) < LARGE


# Headers -----------------------------------------------------------------------------------------------------------


def answer_to(running, *parts: bytes) -> tuple[int, dict]:
    """Send bytes, and return status and JSON of the last answer."""
    with running.connect() as connection:
        for part in parts:
            connection.sendall(part)
            time.sleep(0.05)
        found = b""
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(2**16):
                found += part
    head, _, body = found[found.rindex(b"HTTP/1.1 ") :].partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body or b"{}")


HEAD = b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"


@pytest.mark.parametrize(
    "parts",
    [
        [HEAD + b"a: b\r\n" * 20_000 + b"\r\n"],  # at once, so that they are never incomplete
        [HEAD, b"x: " + b"y" * 40_000, b"y\r\n\r\n"],
        [HEAD + b"cookie: " + b"y" * 120_000 + b"\r\n\r\n"],
        [HEAD.replace(b"models", b"models?" + b"y" * 40_000) + b"\r\n"],
    ],
    ids=["many", "in parts", "one", "path"],
)
def test_large_headers_are_refused(plain, parts):
    status, body = answer_to(plain, *parts)
    assert status == 431
    assert body["error"]["message"] == "the headers have more than 32,768 bytes"
    assert body["error"]["type"] == "invalid_request_error"


def test_headers_below_the_limit_are_taken(plain):
    assert answer_to(plain, HEAD + b"cookie: " + b"y" * 30_000 + b"\r\n\r\n")[0] == 200


@pytest.mark.parametrize("sent", [b"\0\r\n\r\n", b"GET / HTTP/1.1\r\na b\r\n\r\n", b"x" * 70_000])
def test_what_is_no_http_is_an_error_of_the_usual_form(plain, sent):
    status, body = answer_to(plain, sent)
    assert status == (431 if len(sent) > 1000 else 400)
    assert body["error"]["code"] == "invalid_http"


def test_a_broken_body_after_the_answer_has_begun_is_no_fault_of_the_server(plain, caplog):
    head = b"GET /slow HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
    with plain.connect() as connection:
        connection.sendall(head + b"1\r\nx\r\n")
        connection.recv(100)  # it has begun
        connection.sendall(b"no chunk\r\n" * 10)
        received(connection)
    assert not caplog.records


# Proxies -----------------------------------------------------------------------------------------------------------

FORWARDED = {
    "x-forwarded-host": "pictures.example",
    "x-forwarded-proto": "https",
    "x-forwarded-for": "192.0.2.1",
    "x-gradio-server": "http://pictures.example",
}


def root_of_page(running, headers) -> str:
    """The address that the page gives for its own files and events."""
    response = running.send("GET", "/ui/config", headers=headers)
    assert response.status_code == 200
    return response.json()["root"]


def test_headers_of_proxies_are_ignored():
    with server(generates=False, add=mount_page) as running:
        assert root_of_page(running, {}) == f"{running.url}/ui"
        assert running.send("HEAD", "/ui/own/page.js").status_code == 200
        for name, value in [*FORWARDED.items(), ("forwarded", "host=pictures.example;proto=https")]:
            assert root_of_page(running, {name: value}) == f"{running.url}/ui"


def test_headers_of_a_proxy_in_front_are_heeded():
    with server(generates=False, add=mount_page, behind_proxy=True, hosts=("pictures.example",)) as running:
        assert root_of_page(running, {}) == f"{running.url}/ui"
        assert root_of_page(running, {"x-gradio-server": "http://evil.example"}) == f"{running.url}/ui"
        assert root_of_page(running, FORWARDED) == "https://pictures.example/ui"
        assert root_of_page(running, FORWARDED | {"origin": "https://pictures.example"})
        other = running.send("GET", "/ui/config", headers={"x-forwarded-host": "evil.example"})
        assert other.status_code == 403


def test_the_cookie_is_secure_where_the_client_comes_by_https():
    with server(generates=False, behind_proxy=True, api_key=KEY) as running:
        for protocols, secure in (("https", True), ("https, http", True), ("http, https", False), ("http", False)):
            answer = running.send("POST", "/login", content=f"key={KEY}", headers={"x-forwarded-proto": protocols})
            assert ("secure" in answer.headers["set-cookie"].lower()) == secure


# Faults ------------------------------------------------------------------------------------------------------------


def test_faults_of_what_is_mounted_are_answered_alike_and_logged_once(plain, caplog, monkeypatch):
    monkeypatch.setattr(log_lines, "FAULT_SECONDS", 2.0)
    with httpx.Client(base_url=plain.url) as client:
        for path in ["/ui/fault?kind=key"] * 20 + ["/ui/fault?kind=value"] * 20 + ["/ui/answer"]:
            response = client.get(path)
            assert response.status_code == 500
            assert response.json()["error"]["code"] == "internal_error"
        time.sleep(2.0)
        client.get("/ui/fault?kind=key")
    until = time.monotonic() + 20  # it is logged once it is answered
    while len(failed := [record for record in caplog.records if record.levelname == "ERROR"]) < 3:
        assert time.monotonic() < until
        time.sleep(0.01)
    assert [record.exc_info[0] for record in failed] == [KeyError, ValueError, KeyError]
    assert failed[0].getMessage().endswith(" failed")
    assert failed[-1].getMessage().endswith(" failed, as 19 requests before it")


# Starting and stopping ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grace", [math.inf, 1e10])
def test_a_server_may_wait_for_requests_without_end(grace):
    settings = ServerSettings(grace=grace)
    service = Service(tiny(), settings)
    http = server_module.Server(service, settings, make_app(service, settings))
    ended = threading.Thread(target=int)
    ended.start()
    ended.join(http.grace)  # more is an OverflowError


@pytest.mark.parametrize("given", [{"grace": math.nan}, {"grace": -1.0}, {"time_limit": math.nan}, {"body_time": -1}])
def test_settings_need_seconds(given):
    [(name, value)] = given.items()
    with pytest.raises(ValueError, match=f"{name} is {value}; needed are seconds"):
        ServerSettings(**given)


def test_a_connection_is_kept_for_the_next_request(plain):
    connection = http.client.HTTPConnection(plain.url.removeprefix("http://"))
    with contextlib.closing(connection):
        connection.connect()
        kept = connection.sock
        for _ in range(3):
            connection.request("GET", "/health")
            assert connection.getresponse().read()
            assert connection.sock is kept
