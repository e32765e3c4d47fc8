"""Responses of the image routes: one JSON object, or a stream of server-sent events."""

from __future__ import annotations

import base64
import dataclasses
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from PIL import Image
from starlette.responses import JSONResponse, Response

from kandinsky_jax import images
from kandinsky_jax.serve.api.errors import ApiError
from kandinsky_jax.serve.api.fields import CommonFields
from kandinsky_jax.serve.api.running import Running, Workers
from kandinsky_jax.serve.records import encode_image
from kandinsky_jax.serve.requests import ImageRequest
from kandinsky_jax.serve.tickets import Finished, GeneratedImage, ImageDone, Progress

KEEP_ALIVE_SECONDS = 15.0
NO_STORE = {"cache-control": "no-store"}
# The counts of OpenAI's price list, of which there is nothing here; its clients' types want them.
_USAGE = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}


@dataclass(frozen=True)
class Form:
    """The form in which a client wants its pictures.

    Args:
        ending: png, jpeg or webp.
        quality: of JPEG and WebP.
        url: whether as data: URLs.
        previews: of each picture of a stream.
        event: start of the names of a stream's events.
    """

    ending: str
    quality: int | None
    url: bool
    previews: int
    event: str

    @classmethod
    def of(cls, fields: CommonFields, event: str) -> Form:
        """Read it from a request; ApiError for what there is none of."""
        if fields.background == "transparent":
            raise ApiError(400, "background is transparent; pictures here are opaque", "background", "invalid_value")
        ending, quality = fields.output_format or "png", fields.output_compression
        if quality is not None and ending == "png" and quality != 100:
            raise ApiError(400, "output_compression is for jpeg and webp", "output_compression", "invalid_value")
        if fields.partial_images and not fields.stream:
            raise ApiError(400, "partial_images is for stream=true", "partial_images", "invalid_value")
        if fields.stream and fields.response_format == "url":
            raise ApiError(400, "a stream has b64_json, not url", "response_format", "invalid_value")
        url = fields.response_format == "url"
        return cls(ending, None if quality is None else max(1, quality), url, fields.partial_images or 0, event)

    def encode(self, picture: Image.Image, record: dict[str, Any] | None = None) -> str:
        """Return a picture in base64, with its record in its file."""
        if record is None:
            data = images.encode(picture, self.ending, quality=self.quality)
        else:
            data = encode_image(picture, record, self.ending, self.quality)
        return base64.b64encode(data).decode()

    def shared(self, request: ImageRequest) -> dict[str, Any]:
        """Return what responses and events say of all pictures."""
        return {
            "background": "opaque",
            "output_format": self.ending,
            "size": f"{request.width}x{request.height}",
            "quality": "auto",
        }

    def item(self, image: GeneratedImage) -> dict[str, Any]:
        """Return a picture of a response."""
        encoded = self.encode(image.picture, image.record)
        data = {"url": f"data:image/{self.ending};base64,{encoded}"} if self.url else {"b64_json": encoded}
        return data | {"seed": image.record.get("seed"), "settings": image.record}


async def answer_at_once(running: Running, form: Form, workers: Workers) -> Response:
    """Wait for the pictures, and return the response with them."""
    async with running:
        async for event in running.events():
            if isinstance(event, Finished):
                done = event.images
        assert running.ticket is not None
        request, notes = running.ticket.request, running.ticket.notes

    def encoded() -> bytes:
        shared = form.shared(request)
        del shared["quality"]  # in whole responses, the client's type has no "auto"
        body = {"created": int(time.time()), **shared, "data": [form.item(image) for image in done]}
        body |= {"notes": notes} if notes else {}
        return json.dumps(body).encode()

    return Response(await workers.run(encoded), media_type="application/json", headers=NO_STORE)


async def stream(running: Running, form: Form, workers: Workers) -> AsyncIterator[bytes]:
    """Yield a response's server-sent events; the request has been submitted."""
    assert running.ticket is not None
    request, notes, created = running.ticket.request, running.ticket.notes, int(time.time())
    shown = [0] * request.num_images

    def event_text(kind: str, facts: dict[str, Any], picture: Callable[[], str]) -> bytes:
        name = f"{form.event}.{kind}"
        body = {"type": name, "b64_json": picture(), "created_at": created, **form.shared(request), **facts}
        return _event(name, body)

    try:
        async for event in running.events(KEEP_ALIVE_SECONDS):
            if event is None:
                yield b": waiting\n\n"
            elif isinstance(event, Progress):
                for i, preview in enumerate(event.previews):
                    if preview is not None and shown[i] < _previews_due(event, form.previews):
                        shown_as: dict[str, Any] = {"partial_image_index": shown[i], "image_index": i}
                        shown[i] += 1
                        yield await workers.run(
                            lambda facts=shown_as, preview=preview: event_text(  # type: ignore[misc]
                                "partial_image", facts, lambda: form.encode(preview)
                            )
                        )
            elif isinstance(event, ImageDone):
                image = event.image
                facts: dict[str, Any] = {"usage": _USAGE, "image_index": event.index}
                facts |= {"seed": image.record.get("seed"), "settings": image.record}
                facts |= {"notes": notes} if notes else {}
                yield await workers.run(
                    lambda facts=facts, image=image: event_text(  # type: ignore[misc]
                        "completed", facts, lambda: form.encode(image.picture, image.record)
                    )
                )
    except ApiError as error:
        yield _event("error", {"type": "error", **error.body})


def _previews_due(progress: Progress, most: int) -> int:
    """Return how many of a picture's previews are due: they are spread over the decoder's steps."""
    return min(most, progress.step * (most + 1) // max(1, progress.steps))


def _event(name: str, body: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(body)}\n\n".encode()


def state_response(facts: dict[str, Any], ready: bool) -> Response:
    """Return the answer of /health."""
    return JSONResponse(facts, 200 if ready else 503, NO_STORE)


def state_facts(state: Any, stopping: bool) -> dict[str, Any]:
    """Return what /health says of a service's state."""
    status = "stopping" if stopping else "ready" if state.ready else "starting"
    return {"status": status, **dataclasses.asdict(state)}
