"""A request while the service runs it: its events, its time limit, and a client that leaves."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import traceback
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

import anyio
from starlette.requests import Request

from kandinsky_jax.serve.api.errors import ApiError, ClientLeft, from_failure
from kandinsky_jax.serve.api.log_lines import Facts
from kandinsky_jax.serve.requests import ImageRequest, RequestError
from kandinsky_jax.serve.service import Service
from kandinsky_jax.serve.tickets import Cancelled, Event, Failed, Finished, Progress, QueueFull, Ticket, TimedOut

T = TypeVar("T")
MARGIN = 2.0  # seconds that the service has to notice its own time limit
logger = logging.getLogger("kandinsky_jax.serve")


class Workers:
    """Threads for what takes long: decoding and encoding pictures.

    Args:
        threads: that run at once; others wait for them.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._limiter: anyio.CapacityLimiter | None = None

    async def run(self, function: Callable[[], T]) -> T:
        """Run a function in a thread."""
        outcome = await self.attempt(function)
        if isinstance(outcome, Refused):
            raise outcome.error
        return outcome

    async def attempt(self, function: Callable[[], T]) -> T | Refused:
        """Run a function in a thread; errors of requests are returned, without frames, which hold pictures."""
        if self._limiter is None:  # needs a running loop
            self._limiter = anyio.CapacityLimiter(self.threads)
        return await anyio.to_thread.run_sync(lambda: _outcome(function), limiter=self._limiter)


@dataclass(frozen=True)
class Refused:
    """A function's error, as a result: an exception of a future is in a cycle with its frames.

    Args:
        error: without traceback.
    """

    error: Exception


def _outcome(function: Callable[[], T]) -> T | Refused:
    try:
        return function()
    except (ApiError, RequestError, QueueFull) as error:
        traceback.clear_frames(error.__traceback__)
        error.__context__ = None
        return Refused(error.with_traceback(None))


class Running:
    """An asynchronous context with a request's events; leaving it early cancels the request.

    Args:
        service: that runs it.
        request: what is asked for.
        previews: whether previews are wanted.
        http: the request, whose client may leave.
        workers: for submitting, which checks much.
    """

    def __init__(self, service: Service, request: ImageRequest, previews: bool, http: Request, workers: Workers):
        self._service, self._request, self._previews = service, request, previews
        self._http, self._workers = http, workers
        self._facts: Facts = http.state.facts
        self._inbox: asyncio.Queue[Event | None] = asyncio.Queue()
        self._watch: asyncio.Task[None] | None = None
        self.ticket: Ticket | None = None

    async def __aenter__(self) -> Running:
        """Submit the request; ApiError where the service does not take it."""
        submitted = asyncio.ensure_future(
            self._workers.attempt(lambda: self._service.submit(self._request, self._previews))
        )
        try:
            outcome = await asyncio.shield(submitted)
        except asyncio.CancelledError:
            submitted.add_done_callback(_cancel_submitted)
            raise
        if isinstance(outcome, Refused):
            raise from_failure(outcome.error)
        self.ticket = outcome
        self._facts.request = self.ticket.request
        loop = asyncio.get_running_loop()

        def pass_on(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._inbox.put_nowait, event)

        self.ticket.listen(pass_on)
        self._watch = asyncio.create_task(self._wait_for_disconnect())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Cancel what still runs."""
        assert self.ticket is not None
        if self.ticket.end is None:
            self.ticket.cancel()
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None  # its frame holds this, see `Ticket.send`

    async def events(self, every: float | None = None) -> AsyncIterator[Event | None]:
        """Yield events until `Finished`; ApiError for a request that fails, ClientLeft where nobody waits.

        Args:
            every: seconds after which None is yielded where there is no event.
        """
        assert self.ticket is not None
        deadline = self.ticket.created + self._service.settings.time_limit + MARGIN
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise from_failure(TimedOut(f"not done after {self._service.settings.time_limit:g} seconds"))
            try:
                event = await asyncio.wait_for(self._inbox.get(), left if every is None else min(left, every))
            except TimeoutError:
                yield None
                continue
            if event is None:
                raise ClientLeft
            self._note(event)
            if isinstance(event, Failed):
                raise self._failure(event.error)
            yield event
            if isinstance(event, Finished):
                return

    def _note(self, event: Event) -> None:
        assert self.ticket is not None
        if isinstance(event, Progress | Finished) and self._facts.queue_seconds is None:
            self._facts.queue_seconds = time.monotonic() - self.ticket.created
        if isinstance(event, Finished):
            self._facts.images = len(event.images)

    def _failure(self, error: Exception) -> ApiError:
        if not isinstance(error, Cancelled | TimedOut | RequestError | QueueFull):
            logger.error("%s failed", self._facts.id, exc_info=error)
        return from_failure(error)

    async def _wait_for_disconnect(self) -> None:
        while (await self._http.receive())["type"] != "http.disconnect":
            pass
        self._inbox.put_nowait(None)


def _cancel_submitted(submitted: asyncio.Future[Ticket | Refused]) -> None:
    """Cancel a request whose client left while it was submitted."""
    if not submitted.cancelled() and submitted.exception() is None:
        outcome = submitted.result()
        if not isinstance(outcome, Refused):
            outcome.cancel()
