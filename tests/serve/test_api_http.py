"""What is between the socket and the routes: slow readers, large headers, proxies, faults of what is mounted."""

from __future__ import annotations

import contextlib
import math
import threading
import time

import pytest
from starlette.responses import Response

from kandinsky_jax.serve.api import make_app
from kandinsky_jax.serve.api import server as server_module
from kandinsky_jax.serve.server_settings import ServerSettings
from kandinsky_jax.serve.service import Service
from tests.serve.servers import server, tiny

LARGE = 40_000_000  # bytes of a response


@pytest.fixture(scope="module")
def plain():
    with server(generates=False, add=add_routes) as running:
        yield running


def add_routes(app, service, settings):
    @app.get("/large")
    def large():
        return Response(bytes(LARGE))


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
