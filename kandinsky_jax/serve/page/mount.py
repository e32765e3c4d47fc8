"""Adding the page to a FastAPI app."""

from __future__ import annotations

import asyncio
import atexit
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable
from importlib import resources
from typing import TypeVar

import gradio as gr
from fastapi import FastAPI, HTTPException
from fastapi.responses import JSONResponse, RedirectResponse, Response

from kandinsky_jax.serve.page.context import PageContext
from kandinsky_jax.serve.page.event_rules import EventRules
from kandinsky_jax.serve.page.gate import PageGate
from kandinsky_jax.serve.page.layout import build_page
from kandinsky_jax.serve.page.theme import page_theme
from kandinsky_jax.serve.page.visitors import Visitors
from kandinsky_jax.serve.page.widgets import SCRIPT
from kandinsky_jax.serve.server_settings import ServerSettings
from kandinsky_jax.serve.service import Service

T = TypeVar("T")
PREFIX = "/ui"
FILES = {"page.js": "text/javascript; charset=utf-8", "page.css": "text/css; charset=utf-8"}
_folders: list[str] = []
_PRIVATE = {"Cache-Control": "private, max-age=3600", "X-Content-Type-Options": "nosniff"}


def mount_page(app: FastAPI, service: Service, settings: ServerSettings) -> FastAPI:
    """Add the page to an app at `/ui`, and a redirect from `/`.

    Args:
        app: with the routes of the API, which keep precedence.
        service: takes the requests.
        settings: limits of what a client sends.
    Returns:
        the same app.
    """
    context = PageContext(service)
    _add_routes(app, context)
    _set_environment()
    page = _within_loop(lambda: _mount(app, build_page(context), settings))
    app.add_middleware(
        PageGate, prefix=PREFIX, max_body=settings.max_body, rules=EventRules(page), visitors=Visitors(page)
    )
    app.state.page, app.state.blocks = context, page
    return app


def _mount(app: FastAPI, page: gr.Blocks, settings: ServerSettings) -> gr.Blocks:
    gr.mount_gradio_app(
        app,
        page,
        PREFIX,
        server_name=settings.host,
        server_port=settings.port,
        footer_links=[],
        run_history=False,
        allowed_paths=[],
        show_error=False,
        max_file_size=1,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=page_theme(),
        css=_file("page.css").decode(),
        head=SCRIPT,
    )
    return page


def _within_loop(make: Callable[[], T]) -> T:
    """Run a function within an event loop: without one, Gradio makes one for each of its locks and leaves it open."""

    async def made() -> T:
        return make()

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(made())
    return make()


def remove_folders() -> None:
    """Remove what was made for Gradio: at a program's exit by itself, but not where it ends by `os._exit`."""
    while _folders:
        shutil.rmtree(_folders.pop(), ignore_errors=True)


def _set_environment() -> None:
    """Give Gradio a folder that only this user can read, though the page sends it no files, and few events to count.

    With each event it computes statistics of all those that it has counted, which nobody asks for.
    """
    if "GRADIO_TEMP_DIR" not in os.environ:
        folder = os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="kandinsky-jax-page-")
        _folders.append(folder)
        atexit.register(remove_folders)
    os.environ.setdefault("GRADIO_ANALYTICS_MAX_EVENTS", "16")


def _add_routes(app: FastAPI, context: PageContext) -> None:
    """Add the routes of the page's own files, of the server's state, and of the sessions' pictures, all in memory."""
    sessions, started = context.sessions, secrets.token_urlsafe(8)

    @app.get("/", include_in_schema=False)
    def to_page() -> Response:
        return RedirectResponse(PREFIX.lstrip("/") + "/", 307)

    @app.get("/favicon.ico", include_in_schema=False)
    def icon() -> Response:
        return Response(_file("icon.svg"), media_type="image/svg+xml")

    @app.get(PREFIX + "/own/state", include_in_schema=False)
    def state() -> JSONResponse:
        """Say which server this is, and whether it stops; an open page asks again and again."""
        facts = {"started": started, "stopping": context.service.state.stopping}
        return JSONResponse(facts, headers={"Cache-Control": "no-store"})

    @app.get(PREFIX + "/own/{name}", include_in_schema=False)
    def own_file(name: str) -> Response:
        if name not in FILES:
            raise HTTPException(404, "there is no such file")
        return Response(_file(name), media_type=FILES[name], headers={"Cache-Control": "no-cache"})

    @app.get(PREFIX + "/session/{key}/{name}", include_in_schema=False)
    def session_file(key: str, name: str) -> Response:
        session = sessions.with_key(key)
        stem, _, ending = name.partition(".")
        if session is None:
            raise HTTPException(404, "there is no such session")
        if name == "all.zip":
            return Response(
                session.zipped(), media_type="application/zip", headers=_PRIVATE | {"Cache-Control": "no-store"}
            )
        kept = session.pictures.get(int(stem)) if stem.isascii() and stem.isdigit() and len(stem) < 10 else None
        if kept is None or ending not in ("png", "webp"):
            raise HTTPException(404, "there is no such picture")
        return Response(kept.png if ending == "png" else kept.thumbnail, media_type=f"image/{ending}", headers=_PRIVATE)


def _file(name: str) -> bytes:
    return resources.files("kandinsky_jax.serve.page").joinpath(name).read_bytes()
