"""The service behind the API and the page: takes requests, runs them in a thread, and passes their events on."""

from __future__ import annotations

import atexit
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from PIL import Image

from kandinsky_jax.common.errors import shorten
from kandinsky_jax.common.malloc import return_freed_memory, share_arenas
from kandinsky_jax.serve.batching.engine import Engine, ImageRun, RequestWork, Stage
from kandinsky_jax.serve.batching.plan import RequestPlan
from kandinsky_jax.serve.batching.warmup import BatchSizes, Warmup
from kandinsky_jax.serve.batching.weights import PLAIN, AdapterWeights, key_of
from kandinsky_jax.serve.requests import ImageRequest, RequestError
from kandinsky_jax.serve.served_model import ServedModel
from kandinsky_jax.serve.server_settings import ServerSettings
from kandinsky_jax.serve.tickets import (
    Failed,
    Finished,
    GeneratedImage,
    ImageDone,
    Progress,
    QueueFull,
    Ticket,
    Waiting,
)

PROGRESS_SECONDS = 0.1  # between two events of a request's progress
PREVIEW_SECONDS = 0.3  # between two with previews
BUSY_SECONDS = 0.01  # between two looks whether what a request waits for is there
TRIM_SECONDS = 2.0  # of an idle engine, after which freed memory goes back to the kernel
STEP_SECONDS = 10.0  # that a cancelled request's step may take
IDLE_SECONDS = 1.0  # after which an idle engine looks whether a request is too old


@dataclass(frozen=True)
class ServiceState:
    """What a service is doing.

    Args:
        ready: whether all programs are compiled, but for those that cannot be.
        compiled, programs: kinds of requests whose programs are compiled, and all.
        failures: of kinds whose programs cannot be compiled.
        waiting, running: requests.
        images: that are generated now.
        evaluations: of a network for an image, since the start.
        stopping: whether it takes no more requests.
    """

    ready: bool
    compiled: int
    programs: int
    failures: tuple[str, ...]
    waiting: int
    running: int
    images: int
    evaluations: int
    stopping: bool


class Service:
    """Runs requests by continuous batching in a thread of its own.

    Args:
        model: what is served.
        settings: limits.
    Raises:
        ValueError: for a mesh or a size that cannot be served.
    """

    def __init__(self, model: ServedModel, settings: ServerSettings):
        self.model, self.settings = model, settings
        _check_sizes(model, settings)
        weights = AdapterWeights(model)
        sizes = BatchSizes.of(settings, weights.devices)
        self._changed = threading.Condition()
        self.warmup = Warmup(model, settings, sizes, self._wake)
        self._engine = Engine(weights, sizes, self._deliver, self._fail, self.warmup.is_compiled)
        self._incoming: list[RequestWork] = []
        self._tickets: set[Ticket] = set()
        self._stopping = False
        self._deliverers = ThreadPoolExecutor(2, "kandinsky-jax deliver")
        self._thread = threading.Thread(target=self._loop, name="kandinsky-jax serve", daemon=True)
        self._seconds_per_image = 0.0

    def start(self) -> None:
        """Start compiling, and the thread that generates; ValueError where another service has the networks."""
        self._engine.weights.claim()
        atexit.register(self.stop, grace=0)
        share_arenas()
        self.warmup.start()
        self._thread.start()

    def stop(self, grace: float = 30.0) -> None:
        """Take no more requests, finish those that run, cancel those that wait, and end the threads.

        Args:
            grace: seconds for the requests that run; then they are cancelled.
        """
        grace = min(grace, threading.TIMEOUT_MAX)
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self.warmup.stop()
        if not self._thread.is_alive():
            return
        self._thread.join(grace)
        for ticket in list(self._tickets):
            ticket.cancel()
        self._wake()
        self._thread.join(max(grace, STEP_SECONDS))
        self._deliverers.shutdown(wait=True)
        atexit.unregister(self.stop)

    def shares_networks(self, other: Service) -> bool:
        """Whether another service has networks of this one, so that only one of them can run."""
        return self._engine.weights.shares_networks(other._engine.weights)

    @property
    def state(self) -> ServiceState:
        """What the service is doing now."""
        with self._changed:
            running = sum(work.began is not None for work in self._engine.active)
            return ServiceState(
                ready=self.warmup.is_ready,
                compiled=self.warmup.compiled,
                programs=len(self.warmup.kinds),
                failures=self.warmup.failures,
                waiting=max(0, len(self._tickets) - running),  # one that is done leaves both, one after the other
                running=running,
                images=self._engine.images,
                evaluations=self._engine.evaluations,
                stopping=self._stopping,
            )

    def submit(self, request: ImageRequest, previews: bool = False) -> Ticket:
        """Accept a request.

        Raises:
            RequestError: for a request that cannot be served.
            QueueFull: where there are too many, or the server stops.
        """
        self._check_room()
        complete = self.model.complete(request, self.settings)
        try:
            plan = RequestPlan(self.model, complete)
        except RequestError:
            raise
        except (ValueError, TypeError, ArithmeticError) as error:
            raise RequestError(shorten(str(error), 400)) from None
        ticket = Ticket(complete, previews, self.settings.time_limit, plan.notes)
        with self._changed:
            self._check_room()
            ticket.send(Waiting(len(self._tickets)))
            self._tickets.add(ticket)
            self._incoming.append(RequestWork(ticket, plan, key_of(complete)))
            self._changed.notify_all()
        return ticket

    def _check_room(self) -> None:
        """Raise QueueFull where no request can be taken."""
        with self._changed:
            if self._stopping:
                raise QueueFull("the server is stopping", 10.0)
            if len(self._tickets) >= self.settings.max_queue:
                seconds = max(1.0, self._seconds_per_image * len(self._tickets) / 2)
                raise QueueFull(f"{self.settings.max_queue} requests are waiting or running already", seconds)

    # The engine's thread ------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _loop(self) -> None:
        engine, trimmed, active = self._engine, 0, time.monotonic()
        while True:
            with self._changed:
                engine.waiting.extend(self._incoming)
                self._incoming = []
                if self._stopping:
                    for work in [work for work in engine.waiting if work.began is None]:
                        work.ticket.cancel()
                    if engine.is_idle:
                        engine.weights.use(PLAIN)  # the pipelines may be a notebook's
                        engine.weights.release()
                        return
            ran = False
            try:
                ran = engine.turn()
            except Exception as error:  # of the device: the requests that run are lost, others may not be
                traceback.print_exc()
                for work in [*engine.active, *(work for work in engine.waiting if work.began is not None)]:
                    engine.end(work, error)
                engine.batches.clear()
            for work in engine.active:
                self._show_progress(work)
            if not engine.is_idle:
                active = time.monotonic()
            elif engine.evaluations > trimmed and time.monotonic() - active > TRIM_SECONDS:
                trimmed = engine.evaluations
                return_freed_memory()
            with self._changed:
                if not ran and not self._incoming and not (self._stopping and engine.is_idle):
                    self._changed.wait(IDLE_SECONDS if engine.is_idle else BUSY_SECONDS)

    def _show_progress(self, work: RequestWork) -> None:
        """Send a request's progress, if the last time was a while ago."""
        ticket, runs, now = work.ticket, work.runs, time.monotonic()
        shown, previewed = work.shown
        if now - shown < PROGRESS_SECONDS or work.began is None or not runs:
            return
        previews: tuple[Image.Image | None, ...] = (None,) * len(runs)
        if ticket.previews and now - previewed >= PREVIEW_SECONDS:
            previews = self._previews(runs)
            previewed = now if any(previews) else previewed
        work.shown = now, previewed
        prior, decoder = work.plan.evaluations
        done = [self._evaluations_done(run, prior, decoder) for run in runs]
        share = sum(done) / (len(done) * (prior + decoder))
        left = self._seconds_left(work, [max(0, one - prior) / decoder for one in done], now)
        steps = [one - prior for one in done if one > prior]  # of the images that have begun; shown is one that runs
        step = min((one for one in steps if one < decoder), default=decoder if len(steps) == len(done) else 0)
        ticket.send(Progress(share, step, decoder, left, previews))

    def _seconds_left(self, work: RequestWork, shares: list[float], now: float) -> float | None:
        """Estimate a request's time from its decoder's steps; None before the second look at them.

        Images that share their steps count as one: a step takes about as long for two as for eight.

        Args:
            shares: of the decoder's steps that are done, by image.
        """
        most = self._engine.sizes.decoder[-1]
        ordered = sorted(shares, reverse=True)
        groups = [ordered[i : i + most] for i in range(0, len(ordered), most)]
        done = sum(sum(group) / len(group) for group in groups) / len(groups)
        if work.first_step is None and done:
            work.first_step = now, done
        if work.first_step is None or done <= work.first_step[1]:
            return None
        since, before = work.first_step
        return (now - since) / (done - before) * (1 - done)

    def _evaluations_done(self, run: ImageRun, prior: int, decoder: int) -> int:
        """Return the evaluations of an image that are done."""
        own = sum(job.done for job in run.jobs)
        before = {Stage.WAITING: 0, Stage.PRIOR: 0, Stage.DECODER: prior, Stage.DECODING: prior}[run.stage]
        return before + own

    def _previews(self, runs: list[ImageRun]) -> tuple[Image.Image | None, ...]:
        """Return small pictures of what is predicted for a request's images; None before the decoder's first step."""
        preview = self.warmup.preview
        latents = [None if preview is None else self._engine.predicted(run) for run in runs]
        return tuple(None if clean is None or preview is None else preview(clean)[0] for clean in latents)

    # Results ------------------------------------------------------------------------------------------------------

    def _deliver(self, run: ImageRun, pending: Any) -> None:
        self._deliverers.submit(self._finish, run, pending)

    def _finish(self, run: ImageRun, pending: Any) -> None:
        """Wait for a decoded image, and send it; in a thread of its own."""
        work, ticket = run.work, run.work.ticket
        try:
            [picture] = pending.result().images
            record = ticket.request.record(self.model.name, run.task.index)
            record["batch_sizes"] = [run.sizes.get(stage, 0) for stage in ("prior", "decoder")]
            image = GeneratedImage(picture, record)
        except Exception as error:
            self._fail(work, error)
            return
        finally:
            self._engine.delivered(run)
        with self._changed:
            work.images[run.task.index] = image
            complete = len(work.images) == ticket.request.num_images
        ticket.send(ImageDone(run.task.index, image))
        if complete:
            self._forget(ticket)
            work.runs = []  # see `Engine.end`
            ticket.send(Finished(tuple(work.images[i] for i in range(len(work.images)))))
            if work.began is not None:
                seconds = (time.monotonic() - work.began) / len(work.images)
                self._seconds_per_image = 0.8 * self._seconds_per_image + 0.2 * seconds

    def _fail(self, work: RequestWork, error: Exception) -> None:
        self._forget(work.ticket)
        work.ticket.cancelled.set()
        work.ticket.send(Failed(error))

    def _forget(self, ticket: Ticket) -> None:
        with self._changed:
            self._tickets.discard(ticket)
            self._changed.notify_all()


def _check_sizes(model: ServedModel, settings: ServerSettings) -> None:
    """Raise ValueError for sizes that are announced but exceed the limit of pixels."""
    for mode in model.modes:
        for height, width in settings.sizes or (model.native_size(mode),):
            if height * width > settings.max_pixels:
                raise ValueError(
                    f"pictures of {width}x{height} have {height * width:,} pixels, and max_pixels is "
                    f"{settings.max_pixels:,}; give a larger limit (--max-pixels) or another size (--size)"
                )
