"""One log line for each request, where the prompt is only if asked for, and one for the server's faults."""

from __future__ import annotations

import logging
import threading
import time
import traceback
from dataclasses import dataclass

from kandinsky_jax.common.errors import quote
from kandinsky_jax.serve.requests import ImageRequest

logger = logging.getLogger("kandinsky_jax.serve")
_QUIET = ("page", "/health", "/metrics")  # logged at DEBUG where they succeed
FAULT_SECONDS = 10.0  # in which a fault is logged once
MAX_FAULTS = 1000  # that are told apart


class FaultLog:
    """Logs faults of the server; one that comes again soon is counted, and the next line says how often."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: dict[tuple[object, ...], tuple[float, int]] = {}  # until when, and how many since

    def log(self, id: str, error: Exception) -> None:
        """Log what a request failed with.

        Args:
            id: of the request.
            error: faults of one kind that are raised at one place are the same.
        """
        frames = traceback.extract_tb(error.__traceback__)
        which = (type(error), *((frames[-1].filename, frames[-1].lineno) if frames else ()))
        now = time.monotonic()
        with self._lock:
            until, more = self._seen.get(which, (0.0, 0))
            if now < until:
                self._seen[which] = (until, more + 1)
                return
            if len(self._seen) >= MAX_FAULTS:
                self._seen.clear()
            self._seen[which] = (now + FAULT_SECONDS, 0)
        again = f", as {more} requests before it" if more else ""
        logger.error("%s failed%s", id, again, exc_info=error)


@dataclass
class Facts:
    """What is known of a request once it is answered.

    Args:
        method: of HTTP.
        id: of the request, which the response has too.
        route: its path, as the API names it; "page", "unknown" or "refused" for others.
        path: that was asked for.
        status: of the response.
        request: for pictures, complete.
        images: that were generated.
        queue_seconds: until the first picture was begun.
        code: of an error.
    """

    method: str
    id: str
    route: str = ""
    path: str = ""
    status: int = 0
    request: ImageRequest | None = None
    images: int = 0
    queue_seconds: float | None = None


def log_request(facts: Facts, seconds: float, prompts: bool) -> None:
    """Write the line of a request.

    Args:
        facts: of the request.
        seconds: that it took.
        prompts: whether the line has the prompt.
    """
    route = quote(facts.path, 80) if facts.route == "unknown" else facts.route
    parts = [
        f"{facts.method} {route} {facts.status} {seconds * 1000:.0f} ms id={facts.id}",
    ]
    if (request := facts.request) is not None:
        parts.append(
            f"mode={request.mode} size={request.width}x{request.height} steps={request.num_inference_steps} "
            f"n={request.num_images} seed={request.seed}"
        )
        if facts.queue_seconds is not None:
            parts.append(f"queue={facts.queue_seconds * 1000:.0f} ms")
        if prompts:
            parts.append(f"prompt={quote(request.prompt, 400)}")
    quiet = facts.route == "/health" or (facts.route in _QUIET and facts.status < 400)
    logger.log(logging.DEBUG if quiet else logging.INFO, "%s", " ".join(parts))
