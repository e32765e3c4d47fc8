"""Metrics for Prometheus."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from kandinsky_jax.serve.api.log_lines import Facts
from kandinsky_jax.serve.service import Service

_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)
_PREFIX = "kandinsky_jax"


class Metrics:
    """Counts requests and pictures, and asks the service for its state.

    Args:
        service: whose state is shown.
    """

    def __init__(self, service: Service):
        self._registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self._registry, "namespace": _PREFIX}
        self.requests = Counter("requests", "Requests.", ["method", "route", "status"], **own)
        self.seconds = Histogram("request_seconds", "Time of a request.", ["route"], buckets=_BUCKETS, **own)
        self.queue_seconds = Histogram(
            "queue_seconds", "Time before a request's pictures begin.", buckets=_BUCKETS, **own
        )
        self.images = Counter("images", "Generated pictures.", ["mode"], **own)
        gauges: dict[str, tuple[str, Callable[[], float]]] = {
            "requests_waiting": ("Requests that wait.", lambda: service.state.waiting),
            "requests_running": ("Requests that run.", lambda: service.state.running),
            "images_running": ("Pictures that are generated now.", lambda: service.state.images),
            "ready": ("Whether all programs are compiled.", lambda: service.state.ready),
            "programs": ("Programs in all.", lambda: service.state.programs),
            "programs_compiled": ("Programs that are compiled.", lambda: service.state.compiled),
        }
        evaluations = Counter("evaluations", "Evaluations of a network for a picture.", **own)
        self._evaluations = _Difference(evaluations, lambda: service.state.evaluations)
        for name, (what, value) in gauges.items():
            Gauge(name, what, **own).set_function(value)

    def count_request(self, facts: Facts, seconds: float) -> None:
        """Count an answered request."""
        method = facts.method if facts.method in _METHODS else "other"
        self.requests.labels(method, facts.route, facts.status).inc()
        self.seconds.labels(facts.route).observe(seconds)
        if facts.queue_seconds is not None:
            self.queue_seconds.observe(facts.queue_seconds)
        if facts.images and facts.request is not None:
            self.images.labels(facts.request.mode).inc(facts.images)

    def text(self) -> bytes:
        """Return the metrics as Prometheus reads them."""
        self._evaluations.update()
        return generate_latest(self._registry)


class _Difference:
    """Keeps a counter equal to a number that is counted elsewhere.

    Args:
        counter: that is kept.
        value: the number.
    """

    def __init__(self, counter: Counter, value: Callable[[], float]):
        self._counter, self._value, self._seen = counter, value, 0.0
        self._lock = threading.Lock()

    def update(self) -> None:
        """Add what has been counted since."""
        with self._lock:
            now = self._value()
            self._counter.inc(max(0.0, now - self._seen))
            self._seen = now
