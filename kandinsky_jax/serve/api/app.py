"""The application of API and page."""

from __future__ import annotations

import importlib.metadata
import threading
from collections.abc import Callable

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import HTMLResponse, RedirectResponse, Response

from kandinsky_jax.serve.api.errors import ApiError, answer_api_error, answer_http_error
from kandinsky_jax.serve.api.guard import Guard
from kandinsky_jax.serve.api.html import describe
from kandinsky_jax.serve.api.image_routes import ImageRoutes
from kandinsky_jax.serve.api.metrics import Metrics
from kandinsky_jax.serve.api.models import model_router
from kandinsky_jax.serve.api.responses import state_facts, state_response
from kandinsky_jax.serve.server_settings import ServerSettings
from kandinsky_jax.serve.service import Service

_ABOUT = "Pictures by Kandinsky 2.2, as OpenAI's clients ask for them, with further options as extra fields."


def make_app(
    service: Service,
    settings: ServerSettings,
    add_page: Callable[[FastAPI, Service, ServerSettings], object] | None = None,
) -> FastAPI:
    """Make the application.

    Args:
        service: that generates.
        settings: of the server.
        add_page: adds the web page and the route `/`, as `kandinsky_jax.serve.page.mount_page`; None for the API alone.
    Returns:
        the application. Its `state.stopping` is an event; once set, new requests are refused.
    """
    app = FastAPI(
        title="kandinsky-jax",
        description=_ABOUT,
        version=importlib.metadata.version("kandinsky-jax"),
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.stopping = threading.Event()
    metrics = Metrics(service)
    app.add_exception_handler(ApiError, answer_api_error)
    app.add_exception_handler(HTTPException, answer_http_error)
    app.include_router(ImageRoutes(service).router())
    app.include_router(model_router(service))
    _add_operation(app, service, metrics)
    if add_page is not None:
        add_page(app, service, settings)
    else:
        app.add_api_route("/", _to_docs, include_in_schema=False)
    app.add_middleware(Guard, settings=settings, metrics=metrics, stopping=app.state.stopping)
    if settings.origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(settings.origins), allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    return app


def _to_docs() -> Response:
    return RedirectResponse("/docs", 307)


def _add_operation(app: FastAPI, service: Service, metrics: Metrics) -> None:
    """Add the routes that a server is operated by."""

    @app.get("/health", tags=["operation"])
    def health() -> Response:
        """Say whether the server is ready: 200 once all programs are compiled, else 503."""
        state, stopping = service.state, app.state.stopping.is_set()
        return state_response(state_facts(state, stopping), state.ready and not stopping)

    @app.get("/metrics", tags=["operation"])
    def show_metrics() -> Response:
        """Return metrics for Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=1.0.0")

    @app.get("/manifest.json", include_in_schema=False)
    def manifest() -> dict[str, str]:
        """Answer browsers, which ask for it because of Gradio's page."""
        return {"name": "kandinsky-jax", "start_url": "/"}

    @app.get("/docs", include_in_schema=False)
    def docs() -> HTMLResponse:
        policy = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'self'"}
        return HTMLResponse(describe(app.openapi()), headers=policy)
