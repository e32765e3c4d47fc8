"""Errors of the API in OpenAI's form, from which its clients choose their exception classes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kandinsky_jax.common.errors import shorten
from kandinsky_jax.serve.requests import RequestError
from kandinsky_jax.serve.tickets import Cancelled, QueueFull, TimedOut

CLIENT_LEFT = 499  # of the log and of metrics: nobody is there to be answered
NO_RETRY = {"x-should-retry": "false"}  # the official clients repeat 408, 409, 429 and 5xx otherwise
STOPPING = "the server is stopping"

# Fields of `ImageRequest` by the names that they have in the API.
API_NAMES = {
    "num_images": "n",
    "num_inference_steps": "steps",
    "prior_num_inference_steps": "prior_steps",
    "mask_image": "mask",
    "height": "size",
    "width": "size",
}
_NAMES = re.compile(r"\b(prior_num_inference_steps|num_inference_steps|num_images|mask_image)\b")


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: what was given, and what is needed.
        param: the field that is wrong.
        code: OpenAI's short name of the fault.
        headers: further ones of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The response's JSON."""
        kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """Return the response."""
        return JSONResponse(self.body, self.status, self.headers)


class ClientLeft(Exception):
    """The client has closed the connection."""


def too_busy(message: str, seconds: float) -> ApiError:
    """Return the answer to a request for which there is no place."""
    return ApiError(429, message, code="rate_limit_exceeded", headers=retry_after(seconds))


def stopping() -> ApiError:
    """Return the answer of a server that is stopping."""
    return ApiError(503, STOPPING, code="server_stopping", headers=retry_after(10))


def retry_after(seconds: float) -> dict[str, str]:
    """Return the header that asks a client to wait."""
    return {"retry-after": str(max(1, math.ceil(seconds)))}


def from_request_error(error: RequestError) -> ApiError:
    """Convert an error of the service's, with the names of the API."""
    name = error.param or ""
    ours = API_NAMES.get(name, name)
    message = _NAMES.sub(lambda found: API_NAMES[found[0]], str(error))
    if name.startswith("prior_"):
        message = re.sub(rf"\b{API_NAMES['num_inference_steps']}\b", ours, message)  # the prior's check names its own
    return ApiError(400, message, None if name in ("", "mode") else ours, "invalid_value")


def from_failure(error: Exception) -> ApiError:
    """Convert the error with which a request ended."""
    if isinstance(error, RequestError):
        return from_request_error(error)
    if isinstance(error, QueueFull):
        return too_busy(str(error), error.retry_after)
    if isinstance(error, TimedOut):
        return ApiError(504, str(error), code="timeout", headers=NO_RETRY)
    if isinstance(error, Cancelled):
        return ApiError(503, "the request was cancelled by the server", code="cancelled", headers=retry_after(10))
    return internal()


def internal() -> ApiError:
    """Return the answer where the server is at fault; the log has the rest."""
    return ApiError(500, "the server failed; its log says why", code="internal_error", headers=NO_RETRY)


async def answer_api_error(request: Request, error: Exception) -> Response:
    """Handle `ApiError` in FastAPI."""
    assert isinstance(error, ApiError)
    return error.response()


async def answer_http_error(request: Request, error: Exception) -> Response:
    """Handle Starlette's own errors: unknown routes and methods."""
    assert isinstance(error, HTTPException)
    path = shorten(request.url.path, 80)
    message = {
        404: f"there is no {path}; see /docs",
        405: f"{path} does not take {request.method}; see /docs",
    }.get(error.status_code, shorten(str(error.detail), 200))
    code = "method_not_allowed" if error.status_code == 405 else "not_found"
    return ApiError(error.status_code, message, code=code, headers=error.headers).response()
