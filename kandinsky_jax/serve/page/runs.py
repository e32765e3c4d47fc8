"""Running a job: its events, and its pictures in the session's gallery."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from PIL import Image

from kandinsky_jax.serve.api.errors import CLIENT_LEFT, from_failure
from kandinsky_jax.serve.api.log_lines import Facts, log_request
from kandinsky_jax.serve.page import views
from kandinsky_jax.serve.page.context import Job, PageContext
from kandinsky_jax.serve.page.encoding import duration
from kandinsky_jax.serve.page.sessions import KeptPicture, Session
from kandinsky_jax.serve.page.settings_panel import NUMBERS
from kandinsky_jax.serve.records import encode_image, parameters_text
from kandinsky_jax.serve.requests import MIX, ImageRequest, RequestError
from kandinsky_jax.serve.service import ServiceState
from kandinsky_jax.serve.tickets import (
    Cancelled,
    Event,
    Failed,
    Finished,
    GeneratedImage,
    Progress,
    QueueFull,
    Ticket,
    TimedOut,
    Waiting,
)

BETWEEN_VIEWS = 0.15  # seconds
BETWEEN_LOOKS = 1.0  # seconds, at why a request waits
ROUTE = "page/generation"  # of a run in the log
FIELD_LABELS = NUMBERS | {
    "negative_prompt": "Negative prompt",
    "num_images": "Pictures",
    "mask_image": "the mask",
}
log = logging.getLogger(__name__)


class AlreadyRunning(Exception):
    """The tab has a request that runs."""


@dataclass(frozen=True)
class Done:
    """A job's pictures.

    Args:
        kept: in the session's gallery.
        request: as it was run.
        note: about the request.
    """

    kept: tuple[KeptPicture, ...]
    request: ImageRequest
    note: str = ""


@dataclass(frozen=True)
class Step:
    """What is known of a job that runs.

    Args:
        progress: with the newest previews.
        alt: what the pictures show.
        note: about the request.
    """

    progress: Progress
    alt: str
    note: str


@contextmanager
def run_of(session: Session) -> Iterator[None]:
    """Mark a session as busy; what still runs at the end is cancelled.

    Raises:
        AlreadyRunning: where it is busy.
    """
    if session.busy:
        raise AlreadyRunning
    session.busy, session.cancelled, session.failed = True, False, False
    try:
        yield
    finally:
        session.busy = False
        for ticket in session.tickets:
            ticket.cancel()
        session.tickets.clear()


async def events(ticket: Ticket) -> AsyncIterator[Event | None]:
    """Yield a ticket's events until the last one; of progress, the newest. Before it, None each second without one."""
    loop = asyncio.get_running_loop()
    inbox: asyncio.Queue[Event] = asyncio.Queue()

    def pass_on(event: Event) -> None:
        with suppress(RuntimeError):  # of a server that has ended
            loop.call_soon_threadsafe(inbox.put_nowait, event)

    ticket.listen(pass_on)
    begun = False
    while True:
        try:
            event = await asyncio.wait_for(inbox.get(), None if begun else BETWEEN_LOOKS)
        except TimeoutError:
            yield None
            continue
        while isinstance(event, Progress) and not inbox.empty():
            event = inbox.get_nowait()
        yield event
        if isinstance(event, Finished | Failed):
            return
        if isinstance(event, Progress):
            begun = True
            await asyncio.sleep(BETWEEN_VIEWS)


async def run(
    job: Job, session: Session, context: PageContext, number: int | None = None
) -> AsyncIterator[str | Step | Done]:
    """Run a job; yield views of its waiting, its steps, and what became of it.

    Args:
        job: what to generate.
        session: keeps its pictures.
        context: of the page.
        number: of its picture in the gallery, that was reserved; None gives its pictures the next ones.
    Raises:
        Exception: that of the service, or of the ticket.
    """
    ticket = await asyncio.to_thread(context.service.submit, job.request, True)
    session.tickets.add(ticket)
    if session.cancelled:
        ticket.cancel()
    previews: tuple[Image.Image | None, ...] = ()
    ahead, said = 0, ""
    note = ". ".join(one for one in (job.note, *ticket.notes) if one)
    facts = Facts("POST", ticket.id, ROUTE, status=CLIENT_LEFT, request=ticket.request)
    try:
        async for event in events(ticket):
            note_event(facts, event, ticket, session)
            if isinstance(event, Waiting | None):
                state = context.service.state
                ahead = event.ahead if event else min(ahead, max(0, state.waiting + state.running - 1))
                status = waiting(state, ahead, new=event is not None)
                if status != said:
                    yield views.working(status, note)
                said = status
            elif isinstance(event, Progress):
                previews = latest(previews, event.previews)
                yield Step(dataclasses.replace(event, previews=previews), alt_text(ticket.request), note)
            elif isinstance(event, Failed):
                raise event.error
            elif isinstance(event, Finished):
                kept = [await asyncio.to_thread(keep, image, job, session, number) for image in event.images]
                yield Done(tuple(kept), ticket.request, note)
    finally:
        session.tickets.discard(ticket)
        if ticket.end is None:
            ticket.cancel()
        log_request(facts, time.monotonic() - ticket.created, context.settings.log_prompts)


def note_event(facts: Facts, event: Event | None, ticket: Ticket, session: Session) -> None:
    """Note what the log line of a run says of an event."""
    if isinstance(event, Progress | Finished) and facts.queue_seconds is None:
        facts.queue_seconds = time.monotonic() - ticket.created
    if isinstance(event, Finished):
        facts.status, facts.images = 200, len(event.images)
    elif isinstance(event, Failed):
        facts.status = CLIENT_LEFT if session.cancelled else from_failure(event.error).status


def waiting(state: ServiceState, ahead: int, new: bool) -> str:
    """Say why a request has not begun.

    Args:
        state: of the service.
        ahead: requests before it.
        new: whether it has just come, so that an idle service has not yet looked at it.
    """
    if not state.ready:
        return f"Compiling, {state.compiled} of {state.programs}"
    if not (new or state.running or ahead):
        return "Compiling the programs of this request"
    return f"Waiting, {ahead} before it" if ahead else "Waiting"


def latest(
    before: tuple[Image.Image | None, ...], now: tuple[Image.Image | None, ...]
) -> tuple[Image.Image | None, ...]:
    """Return the newest preview of each picture; not each event has them."""
    return tuple(new or old for new, old in itertools.zip_longest(now, before))


async def shown(job: Callable[[], Job], session: Session, context: PageContext) -> AsyncIterator[str | Done]:
    """Run a job, and say in words what went wrong."""
    began = time.monotonic()
    try:
        with run_of(session):
            yield views.working("Starting")
            made = await asyncio.to_thread(job)
            async for event in run(made, session, context):
                if isinstance(event, Step):
                    yield await asyncio.to_thread(views.progress, event.progress, event.alt, event.note)
                    continue
                if isinstance(event, Done):
                    yield views.finished(event.kept, session.key, event.note, time.monotonic() - began)
                yield event
    except Exception as error:
        if view := failure_view(error, session, context):
            yield view


def failure_view(error: Exception, session: Session, context: PageContext, kept: str = "") -> str:
    """Return the view of an error; "" where the view of what already runs is to stay.

    Args:
        error: that a run ended with.
        session, context: of the run.
        kept: what there is of a run that was cancelled.
    """
    if isinstance(error, AlreadyRunning):
        return ""
    if isinstance(error, Cancelled | QueueFull) and context.service.state.stopping and not session.cancelled:
        return views.stopped("The server is stopping.", kept)
    if isinstance(error, Cancelled):
        return views.stopped("Cancelled", kept)
    session.failed = True
    if isinstance(error, QueueFull):
        return views.failed(f"The server is busy: {error}. Try again in {duration(error.retry_after)}.")
    if isinstance(error, RequestError | TimedOut):
        message = in_words(error)
        return views.failed(message[:1].upper() + message[1:] + ".")
    log.error("a request of the page failed", exc_info=error)
    return views.failed("The server failed; its log says why.")


def in_words(error: RequestError | TimedOut) -> str:
    """Return an error's message with the label of the page's field instead of the request's name of it."""
    name = error.param if isinstance(error, RequestError) else None
    return str(error).replace(name, FIELD_LABELS[name], 1) if name in FIELD_LABELS else str(error)


def keep(image: GeneratedImage, job: Job, session: Session, number: int | None = None) -> KeptPicture:
    """Put a picture into the session's gallery, under a number that was reserved or the next one."""
    picture = job.finish(image.picture)
    about = parameters_text(image.record) or ", ".join(f"{name}: {value}" for name, value in image.record.items())
    png = encode_image(picture, image.record, "png")
    return session.add(picture, png, image.record, alt_text(job.request), about, number)


def alt_text(request: ImageRequest) -> str:
    """Return what a request's pictures show, as far as it is known."""
    if request.mode == MIX:
        return "a mix of " + ", ".join(item if isinstance(item, str) else "a picture" for item in request.items)
    return request.prompt.strip() or "a variation of a picture"
