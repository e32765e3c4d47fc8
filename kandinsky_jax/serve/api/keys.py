"""The server's key: as a bearer token of API clients, and as a cookie of browsers that have logged in with it."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from urllib.parse import parse_qs

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from kandinsky_jax.serve.api.errors import ApiError, ClientLeft
from kandinsky_jax.serve.api.html import page
from kandinsky_jax.serve.server_settings import ServerSettings

MAX_FORM = 4096  # bytes of the login form
WRONG_KEY_SECONDS = 0.5  # before a wrong key is answered
_FORM = """
<h1>Kandinsky</h1>
{fault}
<form method="post"><label for="key">Key of this server</label>
<input id="key" name="key" type="password" autocomplete="current-password" required autofocus>
<button>Log in</button></form>
"""


class Keys:
    """Checks the key of requests.

    Args:
        settings: of the server, whose `api_key` may be None: then all requests fit.
    """

    LOGIN = "/login"

    def __init__(self, settings: ServerSettings):
        self._key = None if settings.api_key is None else settings.api_key.encode()
        self.cookie_name = f"kandinsky_jax_{settings.port}"  # cookies do not tell ports apart

    @property
    def needed(self) -> bool:
        """Whether there is a key."""
        return self._key is not None

    @property
    def cookie(self) -> str:
        """What a browser has after a login: it proves the key without showing it."""
        return hmac.new(self._key or b"", b"kandinsky-jax page", hashlib.sha256).hexdigest()

    def fit(self, request: Request) -> bool:
        """Whether a request has the key; compared in constant time."""
        if self._key is None:
            return True
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and self._is_key(token.strip()):
            return True
        given = request.cookies.get(self.cookie_name, "")
        return hmac.compare_digest(given.encode("utf-8", "replace"), self.cookie.encode())

    def _is_key(self, text: str) -> bool:
        digests = (hashlib.sha256(one).digest() for one in (text.encode("utf-8", "replace"), self._key or b""))
        return hmac.compare_digest(*digests)

    def error(self, headers: Headers) -> ApiError:
        """Return the answer to a request without the key."""
        given = "is not this server's" if "authorization" in headers else "is missing"
        return ApiError(
            401,
            f"the key {given}; send it as Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )

    async def login(self, request: Request) -> Response:
        """Answer the form in which a person gives the key."""
        if request.method != "POST":
            return HTMLResponse(page("Log in", _FORM.format(fault="")))
        data = b""
        try:
            async for part in request.stream():
                data += part
                if len(data) > MAX_FORM:
                    raise ApiError(413, f"the form has more than {MAX_FORM:,} bytes", code="body_too_large")
        except ClientDisconnect:
            raise ClientLeft from None
        try:
            given = parse_qs(data.decode(), max_num_fields=4).get("key", [""])[0].strip()
        except ValueError:
            given = ""
        if not self._is_key(given):
            await asyncio.sleep(WRONG_KEY_SECONDS)
            return HTMLResponse(page("Log in", _FORM.format(fault='<p role="alert">This is not the key.</p>')), 401)
        answer = RedirectResponse("/", 303)
        answer.set_cookie(
            self.cookie_name, self.cookie, httponly=True, samesite="strict", secure=request.url.scheme == "https"
        )
        return answer
