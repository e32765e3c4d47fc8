"""What every request passes first, those of the page too: hosts, origins, the key, limits, and one log line."""

from __future__ import annotations

import asyncio
import ipaddress
import secrets
import socket
import threading
import time
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kandinsky_jax.common.errors import quote
from kandinsky_jax.serve.api.bodies import Budget, LimitedBody
from kandinsky_jax.serve.api.errors import CLIENT_LEFT, ApiError, ClientLeft, internal, stopping
from kandinsky_jax.serve.api.keys import Keys
from kandinsky_jax.serve.api.log_lines import Facts, FaultLog, log_request
from kandinsky_jax.serve.api.metrics import Metrics
from kandinsky_jax.serve.server_settings import ServerSettings

OPEN_PATHS = ("/health",)  # without the key, and while the server stops
OWN_PATHS = (*OPEN_PATHS, "/metrics", "/docs", "/openapi.json")
PAGE_PATHS = ("/ui/", "/ui", "/", "/favicon.ico", "/manifest.json")
PAGE_EVENTS = "/ui/gradio_api/"
NEW_PAGE = "/ui/config"  # what a page that is opened asks for
CONCURRENT_BODIES = 8  # of the largest size


class Guard:
    """ASGI middleware around API and page.

    Args:
        app: what is guarded.
        settings: of the server.
        metrics: that count requests.
        stopping: set once the server takes no new requests.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings, metrics: Metrics, stopping: threading.Event):
        self.app, self.settings, self.metrics, self.stopping = app, settings, metrics, stopping
        self.keys, self.faults = Keys(settings), FaultLog()
        self.bodies = Budget(CONCURRENT_BODIES * settings.max_body, "the bodies")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request, as ASGI has it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await self._handle(scope, receive, send)
        else:  # nothing here speaks WebSocket
            await send({"type": "websocket.close", "code": 1008})

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        facts = Facts(scope["method"], f"req_{secrets.token_hex(8)}", path=scope["path"])
        if scope["method"] == "HEAD" and not scope["path"].startswith(PAGE_EVENTS):
            scope = {**scope, "method": "GET"}  # the server sends no body
        scope["headers"] = own_headers(scope["headers"], self.settings.behind_proxy)
        if _first(scope["headers"], b"x-forwarded-proto") == b"https":
            scope["scheme"] = "https"  # uvicorn takes no list
        scope.setdefault("state", {})["facts"] = facts
        body = LimitedBody(receive, self.settings.max_body, self.settings.body_time, self.bodies, scope["headers"])
        scope["state"]["body"] = body
        answer = _Answer(send, body, facts, self._security_headers())
        began = time.monotonic()
        try:
            refused = await self._refused(scope, body)
            if refused is not None:
                await refused(scope, receive, answer)
            else:
                await self.app(scope, body, answer)
        except asyncio.CancelledError:
            if not self.stopping.is_set():  # else the loop ends, and the connection is closed
                raise
        except Exception as error:
            await self._failed(error, scope, body, answer)
        finally:
            body.release()
            if not answer.started:
                facts.status = CLIENT_LEFT
            facts.route = self._route(scope)
            seconds = time.monotonic() - began
            self.metrics.count_request(facts, seconds)
            log_request(facts, seconds, self.settings.log_prompts)

    async def _failed(self, error: Exception, scope: Scope, body: LimitedBody, answer: _Answer) -> None:
        """Answer what was raised, unless a response has begun or nobody is there."""
        if isinstance(error, ClientLeft) or body.left:
            return
        if answer.started and isinstance(error.__cause__, HTTPException):  # Gradio's, of a stream of no session
            await answer({"type": "http.response.body", "body": b""})
            return
        known = body.error or (error if isinstance(error, ApiError) else None)
        if known is None:
            self.faults.log(answer.facts.id, error)
            known = internal()
        if not answer.started:
            await known.response()(scope, body, answer)

    def _route(self, scope: Scope) -> str:
        """Return the path of an API's route, or "page", "unknown", and "refused" for what got to no route."""
        path = str(getattr(scope.get("route"), "path", ""))
        if path in OWN_PATHS or path.startswith("/v1/"):
            return path
        if scope["path"] == self.keys.LOGIN and self.keys.needed:
            return self.keys.LOGIN
        if "router" not in scope:
            return "refused"
        of_page = scope["path"] in PAGE_PATHS or scope["path"].startswith(PAGE_PATHS[0])
        return "page" if of_page else "unknown"

    # What is refused ------------------------------------------------------------------------------------------------

    async def _refused(self, scope: Scope, body: LimitedBody) -> Response | None:
        """Return the answer to a request that goes no further; None for others."""
        request = Request(scope, body)
        headers, path = request.headers, scope["path"]
        try:
            self._check_host(headers)
            if self.stopping.is_set() and path not in (*OPEN_PATHS, "/metrics") and not _of_open_page(path):
                return stopping().response()
            self._check_origin(request)
            if path == self.keys.LOGIN and self.keys.needed:
                return await self.keys.login(request)
            if path not in OPEN_PATHS and not self.keys.fit(request):
                if _navigates(headers) and request.method == "GET":
                    return RedirectResponse(self.keys.LOGIN, 303)
                raise self.keys.error(headers)
            length = headers.get("content-length", "")
            if length.isdigit() and (len(length) > 15 or int(length) > self.settings.max_body):
                raise body.too_large()
        except ApiError as error:
            return error.response()
        return None

    def _check_host(self, headers: Headers) -> None:
        """Raise ApiError for a host name that is not this server's: a page elsewhere may have it point here."""
        host = host_name(headers.get("host", ""))
        if host is None or not (is_own_name(host) or host in self.settings.hosts or "*" in self.settings.hosts):
            shown = quote(headers.get("host", ""), 80)
            raise ApiError(
                403, f"host is {shown}, which is not a name of this server; --allow-host adds one", code="unknown_host"
            )

    def _check_origin(self, request: Request) -> None:
        """Raise ApiError for requests of other sites' pages, except that they may link to this one."""
        headers = request.headers
        origin = headers.get("origin")
        site = headers.get("sec-fetch-site", "none")
        if origin is not None:
            allowed = origin in self.settings.origins or _same_origin(origin, headers.get("host", ""))
        else:
            link = request.method in ("GET", "HEAD") and _navigates(headers)
            allowed = site in ("same-origin", "none") or link
        if not allowed:
            raise ApiError(
                403,
                f"the request is of a page elsewhere ({quote(origin or site, 80)}); --allow-origin admits one",
                code="cross_site",
            )

    def _security_headers(self) -> list[tuple[bytes, bytes]]:
        ancestors = " ".join(["'self'", *self.settings.origins])
        found = {
            "x-content-type-options": "nosniff",
            "referrer-policy": "same-origin",
            "content-security-policy": f"frame-ancestors {ancestors}",
        }
        if not self.settings.origins:
            found["cross-origin-resource-policy"] = "same-origin"
        return [(name.encode(), value.encode("latin-1", "replace")) for name, value in found.items()]


class _Answer:
    """A request's `send` that adds headers, and notes the status."""

    def __init__(self, send: Send, body: LimitedBody, facts: Facts, headers: list[tuple[bytes, bytes]]):
        self._send, self._body, self.facts, self._headers = send, body, facts, headers
        self._of_page = facts.path.startswith(PAGE_PATHS[0])  # its faults have Gradio's form
        self.started = False
        self._dropped = False

    async def __call__(self, message: Message) -> None:
        if self._dropped:
            return
        if message["type"] == "http.response.start":
            if message["status"] >= 400:
                await self._body.drain()  # a client reads the answer once it has sent everything
            if self._body.error is not None and message["status"] >= 500:  # what the page makes of it
                await self._replace(self._body.error)
                return
            if self._of_page and message["status"] == 500:
                await self._replace(internal())
                return
            self.started, self.facts.status = True, message["status"]
            message = {**message, "headers": self._with_headers(message.get("headers", ()))}
        await self._send(message)

    def _with_headers(self, given: object) -> list[tuple[bytes, bytes]]:
        headers = list(given)  # type: ignore[call-overload]
        there = {name.lower() for name, _ in headers}
        headers += [pair for pair in self._headers if pair[0] not in there]
        headers.append((b"x-request-id", self.facts.id.encode()))
        if not self._body.complete:
            headers.append((b"connection", b"close"))  # the rest of the body is not read as a request
        return headers

    async def _replace(self, error: ApiError) -> None:
        """Send another response instead of the one that has begun."""
        response = error.response()
        self.started, self.facts.status, self._dropped = True, error.status, True
        headers = self._with_headers(response.raw_headers)
        await self._send({"type": "http.response.start", "status": error.status, "headers": headers})
        await self._send({"type": "http.response.body", "body": bytes(response.body)})


def own_headers(headers: Iterable[tuple[bytes, bytes]], behind_proxy: bool) -> list[tuple[bytes, bytes]]:
    """Drop headers of which Gradio makes the page's addresses; behind a proxy, its name of the host is the host.

    Args:
        headers: of a request.
        behind_proxy: whether a proxy sets `X-Forwarded-...`, rather than anybody.
    """
    found = [pair for pair in headers if pair[0] != b"x-gradio-server"]
    if not behind_proxy:
        return [pair for pair in found if pair[0] != b"forwarded" and not pair[0].startswith(b"x-forwarded-")]
    host = _first(found, b"x-forwarded-host")
    if host is None:
        return found
    return [(b"host", host), *(pair for pair in found if pair[0] not in (b"host", b"x-forwarded-host"))]


def _first(headers: Iterable[tuple[bytes, bytes]], wanted: bytes) -> bytes | None:
    """Return what the proxy next to the client says, of several in a row; None without the header."""
    values = (value.partition(b",")[0].strip() for name, value in headers if name == wanted)
    return next(values, None)


def host_name(host: str) -> str | None:
    """Return the name or address in a Host header; None for what is none."""
    try:
        parts = urlsplit(f"//{host}")
        if not host or parts.path or parts.query or parts.fragment or parts.username is not None:
            return None
        parts.port  # noqa: B018 - raises for a port that is none
        return parts.hostname
    except ValueError:
        return None


def is_own_name(host: str) -> bool:
    """Whether a host is an address, which no name service can point elsewhere, or a name of this machine."""
    if host in ("localhost", socket.gethostname().lower()) or host.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _of_open_page(path: str) -> bool:
    """Whether a request is one of a page that is open: it shows its last pictures, and says what is refused."""
    return path.startswith(PAGE_PATHS[0]) and path not in (PAGE_PATHS[0], NEW_PAGE)


def is_loopback(host: str) -> bool:
    """Whether a server that listens there is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _same_origin(origin: str, host: str) -> bool:
    scheme, _, place = origin.partition("://")
    return scheme in ("http", "https") and place.lower() == host.lower()


def _navigates(headers: Headers) -> bool:
    """Whether a browser opens a page, rather than a script or a picture of another page."""
    mode = headers.get("sec-fetch-mode")
    return mode == "navigate" if mode is not None else "text/html" in headers.get("accept", "")
