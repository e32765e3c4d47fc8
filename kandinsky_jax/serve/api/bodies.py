"""Request bodies: their size and time are limited while they arrive, on every route."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Iterable
from typing import Any

from python_multipart.exceptions import FormParserError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive

from kandinsky_jax.common.errors import quote, shorten
from kandinsky_jax.serve.api.errors import ApiError, ClientLeft, too_busy

MAX_FILES, MAX_FIELDS, MAX_FIELD_BYTES = 24, 64, 2**17
DRAIN_SECONDS = 2.0  # in which a client may go on sending what is refused, so that it reads the answer
_NAME = re.compile(r"([a-z_]{1,64})(?:\[([^\[\]]{0,200})\])?")


class Budget:
    """An amount that several requests share, such as bytes of memory.

    Args:
        total: that they may hold together.
        what: it is, for the message.
    """

    def __init__(self, total: int, what: str):
        self.total, self.what, self.held = total, what, 0
        self._lock = threading.Lock()

    def take(self, amount: int) -> None:
        """Hold more; ApiError (429) where it is not there."""
        with self._lock:
            if self.held + amount > self.total:
                raise too_busy(f"the server is busy with {self.what} of other requests", 2)
            self.held += amount

    def give(self, amount: int) -> None:
        """Return what was held."""
        with self._lock:
            self.held -= amount


class LimitedBody:
    """A request's `receive` that refuses bodies that are too large, too slow, or too many at once.

    Args:
        receive: of the server.
        most: bytes.
        seconds: in which the whole body has to arrive.
        budget: bytes that all requests hold together.
        headers: of the request, which say whether it has a body.
    """

    def __init__(
        self, receive: Receive, most: int, seconds: float, budget: Budget, headers: Iterable[tuple[bytes, bytes]]
    ):
        self._receive, self.most, self.budget = receive, most, budget
        self._deadline, self._seconds = time.monotonic() + seconds, seconds
        self.bytes = 0
        given = dict(headers)
        self.complete = b"transfer-encoding" not in given and given.get(b"content-length", b"0") == b"0"
        self.left = False
        self.error: ApiError | None = None

    async def __call__(self) -> Message:
        """Receive a message, as ASGI has it."""
        if self.error is not None:
            raise self.error
        if self.complete or self.left:
            return await self._next(None)
        try:
            message = await self._next(self._deadline - time.monotonic())
            size = len(message.get("body", b""))
            if self.bytes + size > self.most:
                raise self.too_large()
            self.budget.take(size)
            self.bytes += size
        except ApiError as error:
            self.error = error
            raise
        return message

    async def _next(self, seconds: float | None) -> Message:
        try:
            message = await asyncio.wait_for(self._receive(), seconds)
        except TimeoutError:
            raise ApiError(408, f"the body was not there after {self._seconds:g} seconds", code="slow_body") from None
        self.complete = self.complete or not message.get("more_body", False)
        self.left = self.left or message["type"] == "http.disconnect"
        return message

    def too_large(self) -> ApiError:
        """Return the answer to a body that is too large."""
        return ApiError(413, f"the body has more than {self.most:,} bytes", code="body_too_large")

    def release(self) -> None:
        """Return the bytes to the budget, once they are no longer held."""
        self.budget.give(self.bytes)
        self.bytes = 0

    async def drain(self) -> None:
        """Drop what still arrives, for a short time; nothing of a body that was too slow already."""
        if self.error is not None and self.error.status == 408:
            return
        until, dropped = time.monotonic() + DRAIN_SECONDS, 0
        while not (self.complete or self.left) and dropped <= self.most:
            try:
                message = await self._next(until - time.monotonic())
            except ApiError:
                return
            dropped += len(message.get("body", b""))


async def read_body(request: Request, kind: str) -> bytearray:
    """Read a body of a content type, which is held by nobody else; ApiError for another one."""
    check_kind(request, kind)
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
    except ClientDisconnect:
        raise ClientLeft from None
    return body


def check_kind(request: Request, kind: str) -> None:
    """Raise ApiError unless a request's body has a content type."""
    given = request.headers.get("content-type", "")
    if given.partition(";")[0].strip().lower() != kind:
        raise ApiError(415, f"content-type is {quote(given, 60)}; needed is {kind}", code="unsupported_media_type")


class _Parser(MultiPartParser):
    """Keeps files in memory, which is limited: nothing is written."""

    spool_max_size = 2**62


async def read_multipart(request: Request) -> dict[str, Any]:
    """Read a multipart body.

    Returns:
        by field: a text; the bytes of a file; a list of such for a name that is there several times or ends in `[]`;
        a dictionary for names such as `loras[heart]`.
    """
    check_kind(request, "multipart/form-data")
    try:
        parser = _Parser(
            request.headers,
            request.stream(),
            max_files=MAX_FILES,
            max_fields=MAX_FIELDS,
            max_part_size=MAX_FIELD_BYTES,
        )
        form = await parser.parse()
    except ClientDisconnect:
        raise ClientLeft from None
    except MultiPartException as error:
        raise ApiError(400, f"the multipart body: {shorten(error.message, 150)}", code="invalid_body") from None
    except (FormParserError, ValueError, KeyError, TypeError) as error:
        fault = shorten(str(error), 150)
        raise ApiError(400, f"the multipart body cannot be read: {fault}", code="invalid_body") from None
    found: dict[str, Any] = {}
    try:
        for name, value in form.multi_items():
            _add(found, name, value.file.read() if isinstance(value, UploadFile) else value)
    finally:
        await form.close()
    return found


def _add(found: dict[str, Any], name: str, value: str | bytes) -> None:
    """Add a field to those that were read."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise ApiError(400, f"{quote(name, 60)} is not the name of a field", shorten(name, 60), "unknown_parameter")
    field, key = match.groups()
    if key:
        nested = found.setdefault(field, {})
        if not isinstance(nested, dict) or key in nested:
            raise ApiError(400, f"{quote(name, 60)} is given twice", field, "invalid_value")
        nested[key] = value
        return
    many = found.get(field, [] if key == "" else None)
    if many is None:
        found[field] = value
    elif isinstance(many, dict):
        raise ApiError(400, f"{quote(field, 60)} is given twice", field, "invalid_value")
    else:
        found[field] = [*(many if isinstance(many, list) else [many]), value]
