"""A request on its way through the server: its events, its result, and its cancellation."""

from __future__ import annotations

import itertools
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from PIL import Image

from kandinsky_jax.serve.requests import ImageRequest


class QueueFull(Exception):
    """The server has as many requests as it takes.

    Args:
        retry_after: seconds after which a place is likely to be free.
    """

    def __init__(self, message: str, retry_after: float):
        super().__init__(message)
        self.retry_after = retry_after


class Cancelled(Exception):
    """The request was cancelled, by its client or because the server stops."""


class TimedOut(Exception):
    """The request took longer than the server's time limit."""


@dataclass(frozen=True)
class GeneratedImage:
    """A finished picture.

    Args:
        picture: RGB.
        record: the settings that reproduce it, see `ImageRequest.record`.
    """

    picture: Image.Image
    record: dict[str, Any]


@dataclass(frozen=True)
class Waiting:
    """The request is in the queue.

    Args:
        ahead: requests before it.
    """

    ahead: int


@dataclass(frozen=True)
class Progress:
    """The request's pictures are being generated.

    Args:
        done: share of all evaluations that are done, 0..1.
        step, steps: in the decoder's loop, of the picture that is least far among those begun and not done; 0 before.
        seconds_left: estimate, None where there is none yet.
        previews: of each picture: a small RGB picture of what is predicted now, None before the decoder's first step.
    """

    done: float
    step: int
    steps: int
    seconds_left: float | None
    previews: tuple[Image.Image | None, ...]


@dataclass(frozen=True)
class ImageDone:
    """One of the request's pictures is finished.

    Args:
        index: which one.
        image: the picture.
    """

    index: int
    image: GeneratedImage


@dataclass(frozen=True)
class Finished:
    """All pictures are there.

    Args:
        images: in the order of the request.
    """

    images: tuple[GeneratedImage, ...]


@dataclass(frozen=True)
class Failed:
    """The request ended without its pictures.

    Args:
        error: `Cancelled`, `TimedOut`, or a fault of the server.
    """

    error: Exception


Event: TypeAlias = Waiting | Progress | ImageDone | Finished | Failed
_numbers = itertools.count(1)


class Ticket:
    """A request that the server has accepted.

    Events are kept until somebody listens: the first listener gets them all. The last one is `Finished` or `Failed`.

    Args:
        request: complete, as it is run.
        previews: whether `Progress` has previews.
        time_limit: seconds until it must be done, waiting included.
        notes: what its client should know, such as that the end of the prompt is not used.
    """

    def __init__(
        self,
        request: ImageRequest,
        previews: bool = False,
        time_limit: float = math.inf,
        notes: tuple[str, ...] = (),
    ):
        self.id = f"req-{next(_numbers)}"
        self.request = request
        self.previews = previews
        self.created = time.monotonic()
        self.time_limit = time_limit
        self.notes = notes
        self.deadline = self.created + time_limit
        self.cancelled = threading.Event()
        self.end: Finished | Failed | None = None
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._kept: list[Event] = []
        self._listener: Callable[[Event], None] | None = None

    def cancel(self) -> None:
        """Stop generating: the loop leaves the request's pictures at the next step, and their places become free."""
        self.cancelled.set()

    def listen(self, listener: Callable[[Event], None]) -> None:
        """Call a function for each event, those before this call too; in the server's thread, so it must not wait."""
        with self._lock:
            for event in self._kept:
                listener(event)
            self._kept, self._listener = [], listener

    def events(self) -> Iterator[Event]:
        """Yield the events until the last one; for threads."""
        inbox: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.listen(inbox.put)
        while True:
            event = inbox.get()
            yield event
            if isinstance(event, Finished | Failed):
                return

    def result(self, timeout: float | None = None) -> tuple[GeneratedImage, ...]:
        """Wait for the pictures.

        Raises:
            TimeoutError: where they are not there in time; the request goes on.
            Exception: the error of `Failed`.
        """
        if not self._ended.wait(timeout):
            raise TimeoutError(f"{self.id} is not done after {timeout:g} seconds")
        assert self.end is not None
        if isinstance(self.end, Failed):
            raise self.end.error
        return self.end.images

    def send(self, event: Event) -> None:
        """Pass an event on; for the server. Nothing comes after the last one."""
        with self._lock:
            if self.end is not None:
                return
            if isinstance(event, Finished | Failed):
                self.end = event
            if self._listener is not None:
                self._listener(event)
            elif isinstance(event, Progress) and self._kept and isinstance(self._kept[-1], Progress):
                self._kept[-1] = event  # of progress, only the newest is of interest
            else:
                self._kept.append(event)
        if self.end is not None:
            self._listener = None  # which holds this, and its pictures would wait for Python's cyclic collector
            self._ended.set()
