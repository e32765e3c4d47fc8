"""/v1/images: generations, edits and variations."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response, StreamingResponse

from kandinsky_jax.common.errors import quote
from kandinsky_jax.common.malloc import return_freed_memory
from kandinsky_jax.serve.api.bodies import Budget, read_body, read_multipart
from kandinsky_jax.serve.api.errors import ApiError, too_busy
from kandinsky_jax.serve.api.fields import (
    CommonFields,
    EditFields,
    GenerationFields,
    VariationFields,
    from_form,
    from_json_body,
)
from kandinsky_jax.serve.api.models import model_id
from kandinsky_jax.serve.api.pictures import PictureReader
from kandinsky_jax.serve.api.requests_of import RequestOf, of_edit, of_generation, of_variation
from kandinsky_jax.serve.api.responses import NO_STORE, Form, answer_at_once, stream
from kandinsky_jax.serve.api.running import Running, Workers
from kandinsky_jax.serve.requests import ImageRequest
from kandinsky_jax.serve.service import Service

CONCURRENT_PICTURES = 8  # times the most pixels that a request may bring
THREADS = 4  # that read requests, submit them, and encode pictures
DECODING_THREADS = 2  # that decode those of requests, so that the other threads wait for none of them


class ImageRoutes:
    """Handlers of the image routes.

    Args:
        service: that generates.
    """

    def __init__(self, service: Service):
        self.service, self.workers, self.decoders = service, Workers(THREADS), Workers(DECODING_THREADS)
        self._freed = 0  # pixels, since memory was last returned
        self.pixels = Budget(CONCURRENT_PICTURES * service.settings.max_upload_pixels, "the pictures")

    def router(self) -> APIRouter:
        """Return the routes."""
        router = APIRouter(tags=["images"])
        for handler, kind, media in (
            (self.generate, GenerationFields, "application/json"),
            (self.edit, EditFields, "multipart/form-data"),
            (self.vary, VariationFields, "multipart/form-data"),
        ):
            router.add_api_route(
                kind.PATH, handler, methods=["POST"], response_class=Response, openapi_extra=_body(kind, media)
            )
        return router

    async def generate(self, request: Request) -> Response:
        """Generate pictures from a prompt, a prompt and a depth map, or a mix of prompts and pictures."""
        self._check_room()
        body = await read_body(request, "application/json")
        return await self._answer(request, body, lambda: from_json_body(GenerationFields, body), of_generation)

    async def edit(self, request: Request) -> Response:
        """Change a picture as a whole, repaint a part of it, or mix several with a prompt."""
        self._check_room()
        form = await read_multipart(request)
        return await self._answer(request, form, lambda: from_form(EditFields, form), of_edit, "image_edit")

    async def vary(self, request: Request) -> Response:
        """Generate variations of a picture."""
        self._check_room()
        form = await read_multipart(request)
        return await self._answer(request, form, lambda: from_form(VariationFields, form), of_variation)

    def _check_room(self) -> None:
        """Raise ApiError where the queue is full, before a body is read."""
        state = self.service.state
        if state.waiting + state.running >= self.service.settings.max_queue:
            raise too_busy(f"{self.service.settings.max_queue} requests are waiting or running already", 5)

    async def _answer(
        self,
        request: Request,
        body: bytearray | dict[str, Any],
        read: Callable[[], CommonFields],
        request_of: RequestOf,
        event: str = "image_generation",
    ) -> Response:
        """Read the fields and pictures, run the request, and return its pictures; `body` is emptied once it is read."""
        reader = PictureReader(self.service.settings.max_upload_pixels, self.pixels)
        streams = False
        try:
            wanted, form, streamed = await self._read(read, request_of, event, reader)
            body.clear()  # the callers hold it while the request waits
            request.state.body.release()
            running = Running(self.service, wanted, form.previews > 0, request, self.workers)
            if not streamed:
                return await answer_at_once(running, form, self.workers)
            await running.__aenter__()  # its errors are answers with a status; later ones are events
            streams = True
            events = self._events(running, form, reader)
            return StreamingResponse(events, media_type="text/event-stream", headers=NO_STORE)
        finally:
            if not streams:
                self._release(reader)

    async def _read(
        self, read: Callable[[], CommonFields], request_of: RequestOf, event: str, reader: PictureReader
    ) -> tuple[ImageRequest, Form, bool]:
        """Return the request, the form of its answer, and whether it is a stream."""

        def checked() -> tuple[CommonFields, Form]:
            fields = read()
            self._check_model(fields.model)
            return fields, Form.of(fields, event)

        fields, form = await self.workers.run(checked)
        threads = self.decoders if fields.has_pictures else self.workers
        return await threads.run(lambda: request_of(fields, reader)), form, bool(fields.stream)

    async def _events(self, running: Running, form: Form, reader: PictureReader) -> AsyncIterator[bytes]:
        try:
            async for part in stream(running, form, self.workers):
                yield part
        finally:
            self._release(reader)
            await running.__aexit__(None, None, None)

    def _release(self, reader: PictureReader) -> None:
        """Return the pictures' pixels to the budget and, after many, their memory to the system."""
        self._freed += reader.pixels
        reader.release()
        if self._freed > self.service.settings.max_upload_pixels // 4:  # else glibc keeps what decoding took
            self._freed = 0
            asyncio.get_running_loop().run_in_executor(None, return_freed_memory)

    def _check_model(self, name: str | None) -> None:
        own = model_id(self.service)
        if name is not None and name != own:
            raise ApiError(404, f"there is no model {quote(name, 60)}; there is {own}", "model", "model_not_found")


def _body(kind: type[CommonFields], media: str) -> dict[str, Any]:
    """Return what OpenAPI says of a body, which is read by hand for its limits."""
    schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
    for name, one in schema.pop("$defs", {}).items():
        schema = _inline(schema, f"#/components/schemas/{name}", one)
    return {"requestBody": {"required": True, "content": {media: {"schema": schema}}}}


def _inline(value: Any, reference: str, schema: dict[str, Any]) -> Any:
    """Put a schema where it is referred to."""
    if isinstance(value, dict):
        if value.get("$ref") == reference:
            return schema
        return {key: _inline(one, reference, schema) for key, one in value.items()}
    return [_inline(one, reference, schema) for one in value] if isinstance(value, list) else value
