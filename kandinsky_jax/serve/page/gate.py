"""Which of Gradio's routes are open, and what may be sent to them.

The page passes pictures as text, so it needs none of the routes that take, give or fetch files. An event's data may
hold texts, numbers, truth values and lists of them; Gradio takes an object for a file, and would open its path or
address.
"""

from __future__ import annotations

import json
import re
from collections.abc import MutableMapping
from typing import Any
from urllib.parse import parse_qs

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_SESSION = r"[A-Za-z0-9_-]{1,64}"
_NAME = r"[A-Za-z0-9_.-]+"
OPEN_ROUTES = {
    "GET": re.compile(
        rf"/?|/config/?|/theme\.css|/favicon\.ico|/(assets|static)(/{_NAME}){{1,4}}|/session/{_SESSION}/{_NAME}"
        rf"|/own/{_NAME}|/gradio_api/(heartbeat/{_SESSION}|queue/data|startup-events|app_id/?|theme\.css)"
    ),
    "POST": re.compile(r"/gradio_api/(queue/join|reset/?)"),
}
MAX_LISTED = 1000  # values of an event, lists within lists included


class PageGate:
    """ASGI middleware that answers 404 for all routes of the page that it does not need.

    Args:
        app: what is behind it.
        prefix: path of the page.
        max_body: bytes of a request.
    """

    def __init__(self, app: ASGIApp, prefix: str, max_body: int):
        self.app, self.prefix, self.max_body = app, prefix, max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        inside = scope["path"].startswith(self.prefix + "/") if scope["type"] in ("http", "websocket") else False
        if not inside:
            await self.app(scope, receive, send)
            return
        if scope["type"] == "websocket" or not self._is_open(scope):
            await _refuse(404, "there is no such page")(scope, receive, send)
            return
        if scope["method"] == "POST":
            body = await _read(receive, self.max_body)
            if body is None:
                await _refuse(413, f"the request has more than {self.max_body:,} bytes")(scope, receive, send)
                return
            if not scope["path"].rstrip("/").endswith("reset") and (fault := event_fault(body)):
                await _refuse(400, fault)(scope, receive, send)
                return
            receive = _replay(body, receive)
        await self.app(scope, receive, send)

    def _is_open(self, scope: MutableMapping[str, Any]) -> bool:
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        known, path = OPEN_ROUTES.get(method), scope["path"][len(self.prefix) :]
        if known is None or not known.fullmatch(path) or ".." in path:
            return False
        return "deep_link" not in parse_qs(scope["query_string"].decode("latin-1"), keep_blank_values=True)


def event_fault(body: bytes) -> str | None:
    """Return what is wrong with an event's JSON, None for nothing."""
    try:
        event = json.loads(body)
    except (ValueError, RecursionError):
        return "the request is not JSON"
    if not isinstance(event, dict) or not isinstance(event.get("data"), list):
        return "needed is an object with a list in data"
    left, pending = MAX_LISTED, [event["data"]]
    while pending:
        for value in pending.pop():
            left -= 1
            if isinstance(value, list):
                pending.append(value)
            elif isinstance(value, dict):
                return "data holds an object; needed are texts, numbers and lists of them"
            if left < 0:
                return f"data has more than {MAX_LISTED} values"
    return None


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
    return JSONResponse({"error": message}, status)
