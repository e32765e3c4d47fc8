"""Listening, and stopping in good order."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from kandinsky_jax.common.errors import counted
from kandinsky_jax.serve.api.errors import ApiError
from kandinsky_jax.serve.server_settings import ServerSettings
from kandinsky_jax.serve.service import Service

HEADER_SECONDS = 15.0  # in which the headers of a request have to arrive
STALLED_SECONDS = 60.0  # in which a client has to read some of its response, else it is dropped
LEAST_READ = 2**16  # bytes in that time; the kernel takes them in steps of up to a megabyte
MAX_HEADERS = 32 * 2**10  # bytes
MAX_CONNECTIONS = 1000
CLOSING_SECONDS = 5  # for responses that are being sent when the server ends
PAGE_SECONDS = 1.0  # in which pages that are open show and fetch what was finished last
ABORT_SECONDS = 2  # for requests to notice that their connections are closed
logger = logging.getLogger("kandinsky_jax.serve")


class _Connection(h11.Connection):
    """h11's connection, which limits headers that are incomplete; here, those that arrive at once too."""

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request):
            size = len(event.target) + sum(len(name) + len(value) + 4 for name, value in event.headers)
            if size > MAX_HEADERS:
                raise h11.RemoteProtocolError("too large", error_status_hint=431)
        return event


class Protocol(H11Protocol):
    """uvicorn's protocol, which also drops clients that send headers or read responses too slowly."""

    def __init__(self, *given: Any, **named: Any):
        super().__init__(*given, **named)
        self.conn = _Connection(h11.SERVER, MAX_HEADERS)

    _late: asyncio.TimerHandle | None = None
    _reading: asyncio.TimerHandle | None = None
    _unread = 0  # bytes of a response at the last look

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_headers()
        self._reading = self.loop.call_later(STALLED_SECONDS, self._check_reading)

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._late, self._reading):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        super().handle_events()
        if self.conn.their_state is h11.IDLE:
            self._await_headers()
        elif self._late is not None:
            self._late.cancel()
            self._late = None

    def _await_headers(self) -> None:
        if self._late is None:
            self._late = self.loop.call_later(HEADER_SECONDS, self.transport.abort)

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, in the form of the API's errors; uvicorn calls it where it handles h11's error."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # the response to a request whose body is none
            self.transport.close()
            return
        error = sys.exc_info()[1]
        status = getattr(error, "error_status_hint", 400)
        fault = f"the headers have more than {MAX_HEADERS:,} bytes" if status == 431 else "the request is not HTTP/1.1"
        response = ApiError(status, fault, code="invalid_http").response()
        headers = [*response.raw_headers, (b"connection", b"close")]
        reason = STATUS_PHRASES.get(status, b"")
        for event in (
            h11.Response(status_code=status, headers=headers, reason=reason),
            h11.Data(data=bytes(response.body)),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event))
        self.transport.close()

    def _check_reading(self) -> None:
        """Drop a client that has read nothing for a while, or next to nothing."""
        grows = not (self.flow.write_paused or self.transport.is_closing())
        unread = 0 if grows else self.transport.get_write_buffer_size()
        if self._unread and unread > self._unread - LEAST_READ:
            self.transport.abort()
            return
        self._unread = unread
        self._reading = self.loop.call_later(STALLED_SECONDS, self._check_reading)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unread = 0


class Server(uvicorn.Server):
    """A server that on SIGTERM or Ctrl-C refuses new requests, finishes those that run, and ends.

    Args:
        service: that is stopped.
        settings: of the server.
        app: that is served.
    """

    def __init__(self, service: Service, settings: ServerSettings, app: FastAPI):
        super().__init__(
            uvicorn.Config(
                app,
                http=Protocol,
                ws="none",
                loop="asyncio",
                lifespan="on",
                proxy_headers=settings.behind_proxy,
                forwarded_allow_ips="*",
                log_config=None,
                log_level="error",
                access_log=False,
                server_header=False,
                limit_concurrency=MAX_CONNECTIONS,
                timeout_graceful_shutdown=CLOSING_SECONDS + ABORT_SECONDS,
                h11_max_incomplete_event_size=MAX_HEADERS,
            )
        )
        logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it warns of what clients send
        self._service, self._stopping = service, app.state.stopping
        self.grace = min(settings.grace, threading.TIMEOUT_MAX)  # given may be infinity

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop on SIGTERM and SIGINT; without effect outside the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._stopping.is_set() and number == signal.SIGINT:
            self.should_exit = self.force_exit = True
        self.begin_stop()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the page's event streams, which do not end by themselves, and send the answers of the API."""
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # it has words of its own for clients that stay
        for connection in self._busy():
            if self.force_exit or not connection.scope["path"].startswith("/v1/"):
                connection.transport.close()
        late = asyncio.get_running_loop().call_later(CLOSING_SECONDS, self._abort)
        try:
            await super().shutdown(sockets)
        finally:
            late.cancel()

    def _busy(self) -> list[H11Protocol]:
        """Return the connections on which an answer is being sent."""
        found = [one for one in list(self.server_state.connections) if isinstance(one, H11Protocol)]
        return [one for one in found if one.cycle is not None and not one.cycle.response_complete]

    def _abort(self) -> None:
        """Close the connections of clients that do not read their answers."""
        for connection in self._busy():
            connection.transport.abort()

    def begin_stop(self) -> None:
        """Refuse new requests, and end once those that run are done."""
        if not self._stopping.is_set():
            self._stopping.set()
            threading.Thread(target=self._stop, name="kandinsky-jax stop", daemon=True).start()

    def _stop(self) -> None:
        if running := self._service.state.running:
            words = f"{self.grace:g} seconds at most; Ctrl-C again ends at once"
            logger.info("stopping: finishing %s, %s", counted(running, "request"), words)
        try:
            self._service.stop(self.grace)
            if running and any(one.scope["path"].startswith("/ui/") for one in self._busy()):
                time.sleep(PAGE_SECONDS)
        finally:
            self.should_exit = True


def bind(settings: ServerSettings) -> socket.socket:
    """Return a socket that listens at the address of the settings; ValueError where it cannot be had.

    Connections wait until a server takes them. A socket that is bound alone does not keep others from the port.
    """
    host, port = settings.host, settings.port
    try:
        [family, kind, protocol, _, address] = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with contextlib.ExitStack() as stack:
            found = stack.enter_context(socket.socket(family, kind, protocol))
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
            found.listen(MAX_CONNECTIONS)
            stack.pop_all()
        return found
    except (OSError, OverflowError, UnicodeError) as error:
        number = getattr(error, "errno", None)
        if number == errno.EADDRINUSE:
            raise ValueError(
                f"port {port} of {host} is in use; choose another one, or 0 for any that is free"
            ) from None
        if number in (errno.EACCES, errno.EPERM):
            raise ValueError(f"port {port} of {host} is not open to this user; choose one from 1024 on") from None
        raise ValueError(f"{host}, port {port}, is no address of this machine: {error}") from None


def address_of(listening: socket.socket) -> str:
    """Return the URL of a socket."""
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run_server(
    service: Service, settings: ServerSettings, app: FastAPI, listening: socket.socket | None = None
) -> None:
    """Serve until SIGTERM or Ctrl-C; the service has been started, and is stopped.

    Args:
        service: that generates.
        settings: of the server.
        app: of `make_app`.
        listening: of `bind`; None binds one.
    """
    found = bind(settings) if listening is None else listening
    Server(service, settings, app).run([found])


class ServerThread:
    """A server in a thread, for notebooks and tests; a context that ends it.

    Args:
        service, settings, app: see `run_server`.
    """

    def __init__(self, service: Service, settings: ServerSettings, app: FastAPI):
        self._listening = bind(settings)
        self.url = address_of(self._listening)
        self._server = Server(service, settings, app)
        self._thread = threading.Thread(
            target=self._server.run, args=([self._listening],), name="kandinsky-jax http", daemon=True
        )

    def start(self) -> ServerThread:
        """Start to listen; returns once it does."""
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise RuntimeError("the server ended before it listened")
            time.sleep(0.01)
        return self

    def wait(self) -> None:
        """Wait until the server has been stopped."""
        self._thread.join()

    def stop(self) -> None:
        """Finish what runs, and end."""
        self._server.begin_stop()
        self._thread.join()

    def __enter__(self) -> ServerThread:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def no_telemetry() -> None:
    """Tell Gradio and the Hub's client, before they are imported, to report nothing."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
