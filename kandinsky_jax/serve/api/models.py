"""/v1/models: the served model, and what its requests may ask for."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter

from kandinsky_jax.common.errors import quote
from kandinsky_jax.serve.api.errors import ApiError
from kandinsky_jax.serve.service import Service

_STARTED = int(time.time())


def model_id(service: Service) -> str:
    """Return the name by which clients call the model."""
    return service.model.name


def model_facts(service: Service) -> dict[str, Any]:
    """Return what /v1/models says of the model."""
    model, settings = service.model, service.settings
    modes = {}
    for mode in model.modes:
        sizes = model.sizes(mode, settings)
        modes[mode] = {
            "sizes": None if sizes is None else [f"{width}x{height}" for height, width in sizes],
            "fast": model.has_fast(mode),
        }
    return {
        "id": model_id(service),
        "object": "model",
        "created": _STARTED,
        "owned_by": "kandinsky-jax",
        "modes": modes,
        "schedulers": list(model.schedulers),
        "scheduler_suffixes": list(model.scheduler_suffixes),
        "loras": list(model.loras),
    }


def model_router(service: Service) -> APIRouter:
    """Return the routes."""
    router = APIRouter(prefix="/v1/models", tags=["models"])

    @router.get("")
    def list_models() -> dict[str, Any]:
        """List the one model that is served, with its modes, sizes, schedulers and LoRA files."""
        return {"object": "list", "data": [model_facts(service)]}

    @router.get("/{name:path}")
    def retrieve_model(name: str) -> dict[str, Any]:
        """Describe the model."""
        if name != model_id(service):
            raise ApiError(
                404, f"there is no model {quote(name, 60)}; there is {model_id(service)}", "model", "model_not_found"
            )
        return model_facts(service)

    return router
