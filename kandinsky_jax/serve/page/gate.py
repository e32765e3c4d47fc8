"""Which of Gradio's routes are open, and what may be sent to them.

The page passes pictures as text, so it needs none of the routes that take, give or fetch files. An event's data holds
texts, numbers and truth values; Gradio takes an object for a file, and would open its path or address.
"""

from __future__ import annotations

import re
from collections.abc import MutableMapping
from typing import Any
from urllib.parse import parse_qs

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kandinsky_jax.serve.page.event_rules import SESSION, EventError, EventRules, is_session
from kandinsky_jax.serve.page.visitors import Visitors

_NAME = r"[A-Za-z0-9_.-]+"
OPEN_ROUTES = {
    "GET": re.compile(
        rf"/?|/config/?|/theme\.css|/favicon\.ico|/(assets|static)(/{_NAME}){{1,4}}|/session/{SESSION}/{_NAME}"
        rf"|/own/{_NAME}|/gradio_api/(heartbeat/{SESSION}|queue/data|startup-events|app_id/?|theme\.css)"
    ),
    "POST": re.compile(r"/gradio_api/(queue/join|reset/?)"),
}
JOIN, STREAM = "/gradio_api/queue/join", "/gradio_api/queue/data"
HEARTBEAT = "/gradio_api/heartbeat/"


class PageGate:
    """ASGI middleware: 404 for all routes of the page that it does not need, 400 for events that it does not have.

    Args:
        app: what is behind it.
        prefix: path of the page.
        max_body: bytes of a request.
        rules: of events.
        visitors: bounds what Gradio keeps of browser tabs.
    """

    def __init__(self, app: ASGIApp, prefix: str, max_body: int, rules: EventRules, visitors: Visitors):
        self.app, self.prefix, self.max_body, self.rules, self.visitors = app, prefix, max_body, rules, visitors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        inside = scope["path"].startswith(self.prefix + "/") if scope["type"] in ("http", "websocket") else False
        if not inside:
            await self.app(scope, receive, send)
            return
        if scope["type"] == "websocket" or not self._is_open(scope):
            await _refuse(404, "there is no such page")(scope, receive, send)
            return
        path = scope["path"][len(self.prefix) :]
        if scope["method"] == "POST":
            body = await _read(receive, self.max_body)
            if body is None:
                await _refuse(413, f"the request has more than {self.max_body:,} bytes")(scope, receive, send)
                return
            receive = _replay(body, receive)
            refused = await self._refused_event(body) if path.rstrip("/") == JOIN else None
            await (refused or self.app)(scope, receive, send)
        elif path == STREAM or path.startswith(HEARTBEAT):
            await self._connect(path, scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _refused_event(self, body: bytes) -> ASGIApp | None:
        """Return the answer to an event that goes no further, None for others."""
        try:
            name = self.rules.session_of(body)
        except EventError as error:
            return _refuse(400, str(error))
        if not await self.visitors.has_room(name):
            return _refuse(429, "this tab has not fetched the results of its last events")
        await self.visitors.enter(name)
        return None

    async def _connect(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a request that stays open, of a tab that is named in its path or its query."""
        query = parse_qs(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        names = query.get("session_hash", []) if path == STREAM else [path.removeprefix(HEARTBEAT)]
        if len(names) != 1 or not is_session(names[0]):
            await _refuse(400, "session_hash is missing, or not 1 to 64 letters, digits, - and _")(scope, receive, send)
            return
        with self.visitors.connected(names[0]):
            await self.visitors.enter(names[0])
            await self.app(scope, receive, send)

    def _is_open(self, scope: MutableMapping[str, Any]) -> bool:
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        known, path = OPEN_ROUTES.get(method), scope["path"][len(self.prefix) :]
        if known is None or not known.fullmatch(path) or ".." in path:
            return False
        return "deep_link" not in parse_qs(scope["query_string"].decode("latin-1"), keep_blank_values=True)


async def _read(receive: Receive, most: int) -> bytes | None:
    """Return a request's body, None where it is larger than allowed."""
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > most:
            return None
        more = message.get("more_body", False)
    return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives a body that was read before."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _refuse(status: int, message: str) -> ASGIApp:
    return JSONResponse({"error": message}, status)  # which Gradio's script shows
