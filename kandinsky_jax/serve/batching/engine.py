"""The engine: gives images their slots, runs the steps of all batches in turn, and hands finished pictures over.

One thread calls `turn` again and again. A turn takes in new requests, starts steps of each batch that has images, and
moves the images whose loop is done to their next stage. A request that is cancelled, or too old, leaves at the next
turn.
"""

from __future__ import annotations

import enum
import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import numpy as np

from kandinsky_jax.pipelines.decoder import PendingImages
from kandinsky_jax.serve.batching.image_task import ImageTask
from kandinsky_jax.serve.batching.plan import RequestPlan
from kandinsky_jax.serve.batching.slots import SlotBatch, SlotJob
from kandinsky_jax.serve.batching.warmup import BatchSizes
from kandinsky_jax.serve.batching.weights import AdapterWeights, WeightsKey
from kandinsky_jax.serve.tickets import Cancelled, GeneratedImage, Ticket, TimedOut

PEAK_SECONDS = 2.0  # how long a number of images counts for the choice of batch sizes
HOLD_SECONDS = 0.1  # that a prompt waits for others while other images are generated
DELIVERING_SECONDS = 0.5  # the same while images are on their way to clients, who may ask for more
ANSWER_SECONDS = 0.02  # in which a program that has its picture asks for the next one
MOST_BATCHES = 8  # that are kept with their arrays; those without images leave first


class Stage(enum.Enum):
    """Where an image is."""

    WAITING = "waiting"
    PRIOR = "prior"
    DECODER = "decoder"
    DECODING = "decoding"  # by MoVQ, and on the way to its client


@dataclass(eq=False)
class ImageRun:
    """An image in the engine.

    Args:
        work: its request.
        task: what it does.
        jobs: of the current stage.
        sizes: padded batch sizes that it has run at, by stage.
    """

    work: RequestWork
    task: ImageTask
    stage: Stage = Stage.WAITING
    jobs: list[SlotJob] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)

    @property
    def is_done(self) -> bool:
        """Whether all jobs of the stage are done."""
        return all(job.result is not None for job in self.jobs)


@dataclass(eq=False)
class RequestWork:
    """A request in the engine.

    Args:
        ticket: of its client.
        plan: what its images do.
        key: the weights that it needs.
        began: when its first image started, by `time.monotonic`; None before.
    """

    ticket: Ticket
    plan: RequestPlan
    key: WeightsKey
    runs: list[ImageRun] = field(default_factory=list)
    began: float | None = None
    shown: tuple[float, float] = (0.0, 0.0)  # when progress and previews were last sent
    first_step: tuple[float, float] | None = None  # when the decoder's first step was seen, and the share then
    images: dict[int, GeneratedImage] = field(default_factory=dict)  # those that are done

    def __post_init__(self) -> None:
        self.runs = [ImageRun(self, ImageTask(self.plan, i)) for i in range(self.plan.request.num_images)]


class Engine:
    """Runs requests, batched image by image.

    Args:
        weights: switches LoRA and the fast adapter.
        sizes: padded batch sizes of prior and decoder.
        deliver: called with each decoded image, which may still be computed; must not wait.
        fail: called for each request that ends early, with the error.
        is_compiled: whether the programs of a stage of a plan are ready at a padded size; until then its images wait.
    """

    def __init__(
        self,
        weights: AdapterWeights,
        sizes: BatchSizes,
        deliver: Callable[[ImageRun, PendingImages], None],
        fail: Callable[[RequestWork, Exception], None],
        is_compiled: Callable[[RequestPlan, str, int], bool],
    ):
        self.weights = weights
        self.sizes = sizes
        self.deliver, self.fail, self.is_compiled = deliver, fail, is_compiled
        self.waiting: deque[RequestWork] = deque()
        self.active: list[RequestWork] = []
        self.batches: dict[Hashable, SlotBatch] = {}
        self.evaluations = 0
        self._queues: dict[str, deque[tuple[ImageRun, SlotJob]]] = {"prior": deque(), "decoder": deque()}
        self._of_job: dict[int, ImageRun] = {}
        self._decoding: set[ImageRun] = set()
        self._last_delivered = 0.0
        self._held_since: float | None = None
        self._peaks: deque[tuple[float, int]] = deque()  # when there were how many images

    @property
    def images(self) -> int:
        """Images that are generated now."""
        return sum(run.stage in (Stage.PRIOR, Stage.DECODER) for work in self.active for run in work.runs)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.waiting and not self.active

    def turn(self) -> bool:
        """Do one turn; return whether anything was run."""
        self._drop_ended()
        self._admit()
        self._note_peak()
        if not self._hold_prior():
            self._fill("prior")
        self._fill("decoder")
        chosen = self._next_batches()
        for batch in chosen:
            began, before, images = time.perf_counter(), batch.steps_done, len(batch.jobs)
            finished = batch.advance()
            batch.wait(began, batch.steps_done - before)
            self.evaluations += images * (batch.steps_done - before)
            for job in finished:
                self._job_done(self._of_job.pop(id(job)))
        self._forget_batches()
        return bool(chosen)

    def _next_batches(self) -> list[SlotBatch]:
        """Return the batches to advance in this turn.

        While the decoder has free slots, the prior comes first: its images fill them, and a step takes as long with
        free slots as without.
        """
        running = [batch for batch in self.batches.values() if batch.jobs]
        prior = [batch for batch in running if batch.is_prior]
        full = any(not batch.is_prior and not batch.free for batch in running)
        return prior if prior and not full else running

    # Requests -----------------------------------------------------------------------------------------------------

    def _drop_ended(self) -> None:
        """End the requests that are cancelled or too old."""
        for work in [*self.waiting, *self.active]:
            error: Exception | None = None
            if work.ticket.cancelled.is_set():
                error = Cancelled("the request was cancelled")
            elif time.monotonic() > work.ticket.deadline:
                error = TimedOut(f"the request was not done after {work.ticket.time_limit:g} seconds")
            if error is not None:
                self.end(work, error)

    def end(self, work: RequestWork, error: Exception) -> None:
        """Take a request out, with an error."""
        if work in self.waiting:
            self.waiting.remove(work)
        if work in self.active:
            self.active.remove(work)
        self._decoding.difference_update(work.runs)
        for queue in self._queues.values():
            for entry in [entry for entry in queue if entry[0].work is work]:
                queue.remove(entry)
        for batch in self.batches.values():
            for job in list(batch.jobs.values()):
                if self._of_job[id(job)].work is work:
                    batch.remove(job)
                    del self._of_job[id(job)]
        work.runs = []  # which have this as their work: arrays and pictures would wait for Python's cyclic collector
        self.fail(work, error)

    def _admit(self) -> None:
        """Start images of waiting requests, in their order, as far as there is room."""
        room = 2 * self.sizes.decoder[-1] - self.images
        # Those that have begun come first: others may wait for them, for other weights.
        for work in sorted(self.waiting, key=lambda work: work not in self.active):
            if room <= 0:
                return
            if not self._ready(work.plan):
                continue
            if work.key != self.weights.current:
                if self.active:
                    return  # others run with other weights
                self.batches.clear()
                try:
                    self.weights.use(work.key)
                except Exception as error:
                    self.end(work, error)
                    continue
            if work not in self.active:
                self.active.append(work)
                work.began = time.monotonic()
            for run in [run for run in work.runs if run.stage is Stage.WAITING][:room]:
                room -= 1
                try:
                    self._start(run)
                except Exception as error:
                    self.end(work, error)
                    break
            if work in self.waiting and all(run.stage is not Stage.WAITING for run in work.runs):
                self.waiting.remove(work)

    def _ready(self, plan: RequestPlan) -> bool:
        """Whether a plan can run at some padded size."""
        return all(
            any(self.is_compiled(plan, stage, size) for size in getattr(self.sizes, stage))
            for stage in ("prior", "decoder")
        )

    def _start(self, run: ImageRun) -> None:
        run.stage = Stage.PRIOR
        run.jobs = run.task.start_prior()
        self._queues["prior"].extend((run, job) for job in run.jobs)
        if not run.jobs:
            self._to_decoder(run)

    def _to_decoder(self, run: ImageRun) -> None:
        run.stage = Stage.DECODER
        run.jobs = [run.task.start_decoder()]
        self._queues["decoder"].append((run, run.jobs[0]))

    def _job_done(self, run: ImageRun) -> None:
        """Move an image on whose stage may be done."""
        if not run.is_done or run.work not in self.active:
            return
        try:
            if run.stage is Stage.PRIOR:
                self._to_decoder(run)
                return
            run.stage = Stage.DECODING
            self._decoding.add(run)
            self.deliver(run, run.task.decode(run.jobs[0]))
        except Exception as error:
            self.end(run.work, error)
            return
        if all(run.stage is Stage.DECODING for run in run.work.runs):
            self.active.remove(run.work)

    def delivered(self, run: ImageRun) -> None:
        """Note that an image is on its way to its client; from any thread."""
        self._decoding.discard(run)
        self._last_delivered = time.monotonic()

    def predicted(self, run: ImageRun) -> np.ndarray | None:
        """Return the predicted clean latents of an image, float32 `[h, w, 4]`; None before the decoder's first step."""
        if run.stage is not Stage.DECODER or not run.jobs[0].done:
            return None
        for batch in self.batches.values():
            for slot, job in batch.jobs.items():
                if job is run.jobs[0]:
                    return batch.predicted(slot)
        return None

    # Batches ------------------------------------------------------------------------------------------------------

    def _note_peak(self) -> None:
        """Note how many images there are, for the choice of batch sizes."""
        now, images = time.monotonic(), self.images + len(self._decoding)
        while self._peaks and (self._peaks[0][0] < now - PEAK_SECONDS):
            self._peaks.popleft()
        while self._peaks and self._peaks[-1][1] <= images:
            self._peaks.pop()
        self._peaks.append((now, images))

    @property
    def _peak(self) -> int:
        """The most images that there have been at once of late."""
        return self._peaks[0][1] if self._peaks else 0

    def _hold_prior(self) -> bool:
        """Whether prompts wait a moment for others, to share the prior's steps: never where nothing else runs."""
        queue = self._queues["prior"]
        now, running = time.monotonic(), any(batch.jobs for batch in self.batches.values())
        delivering = bool(self._decoding) or now - self._last_delivered < ANSWER_SECONDS
        enough = len(queue) >= min(self._peak, self.sizes.prior[-1])
        if not queue or enough or not (running or delivering) or self._joins_prior(queue[0][1]):
            self._held_since = None
            return False
        self._held_since = self._held_since or now
        if now - self._held_since < (DELIVERING_SECONDS if delivering else HOLD_SECONDS):
            return True
        self._held_since = None
        return False

    def _joins_prior(self, job: SlotJob) -> bool:
        """Whether a job has place in a batch of the prior that is running."""
        guided = job.inputs.uncond is not None
        return any(
            batch.jobs and batch.free and batch.guided == guided for batch in self.batches.values() if batch.is_prior
        )

    def _fill(self, stage: str) -> None:
        """Give waiting jobs of a stage their slots."""
        queue = self._queues[stage]
        for _ in range(len(queue)):
            run, job = queue.popleft()
            batch = self._batch_for(run, job, stage, 1 + len(queue))
            if batch is None:
                queue.append((run, job))
                continue
            batch.add(job)
            self._of_job[id(job)] = run
            run.sizes[stage] = batch.size

    def _batch_for(self, run: ImageRun, job: SlotJob, stage: str, demand: int) -> SlotBatch | None:
        """Return a batch with a free slot for a job, None where all are taken.

        Args:
            demand: jobs of this stage that wait.
        """
        plan = run.work.plan
        module = plan.pipe.prior_pipe.prior if stage == "prior" else plan.decoder.unet
        network, params = self.weights.model.network(module)
        guided = job.inputs.uncond is not None
        base = (network, guided, job.start.shape[1:])
        running = [batch for key, batch in self.batches.items() if key[:3] == base and batch.jobs]  # type: ignore[index]
        chosen = run.sizes.get(stage, 0)  # all jobs of an image's stage run at one size
        if not chosen:
            for batch in sorted(running, key=lambda batch: -batch.size):
                if batch.free >= len(run.jobs):
                    return batch
            demand += sum(len(batch.jobs) for batch in running)
            if stage == "decoder" and self.images + len(self._decoding) > 1:
                demand = max(demand, self._peak)
            sizes = [size for size in getattr(self.sizes, stage) if self.is_compiled(plan, stage, size)]
            chosen = next((size for size in sizes if size >= demand), sizes[-1])
        key = (*base, chosen)
        if key not in self.batches:
            self.batches[key] = SlotBatch(network, params, chosen, guided, is_prior=stage == "prior")
        batch = self.batches[key]
        return batch if batch.free else None

    def _forget_batches(self) -> None:
        """Let go of the arrays of batches without images, beyond a few."""
        empty = [key for key, batch in self.batches.items() if not batch.jobs]
        for key in empty[: max(0, len(self.batches) - MOST_BATCHES)]:
            del self.batches[key]
