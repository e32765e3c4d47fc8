"""Runs a job shard by shard; reading, generating, encoding and writing overlap.

    rows -> requests     one thread: read, check, open the rows' pictures
    requests -> calls    groups of equal shape; always the same number of pictures on every device
    calls -> pixels      the main thread and the devices: text tower, prior, decoder, MoVQ
    pixels -> bytes      threads: wait for the device, encode
    bytes -> shard       one thread: write, rename

The pictures of a shard are grouped independently of the number of devices, and a device runs one group per call. So a
picture always has the same neighbours in the same program, and a shard has the same bytes wherever it is generated.
"""

from __future__ import annotations

import numbers
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax
import numpy as np
from tqdm.auto import tqdm

from kandinsky_jax import images
from kandinsky_jax.batch.job import SCALES, Job, OpenJob
from kandinsky_jax.batch.requests import Checker, ErrorRecord, RowError, RowRequest, Shape
from kandinsky_jax.batch.shards import GeneratedImage, json_line
from kandinsky_jax.common.errors import RunError, quote, shorten, summarize
from kandinsky_jax.compilation import only_good_programs
from kandinsky_jax.diffusion import Network
from kandinsky_jax.diffusion.rng import image_keys
from kandinsky_jax.parallel.process import Process
from kandinsky_jax.pipelines import CombinedPipeline
from kandinsky_jax.pipelines.decoder import PendingImages
from kandinsky_jax.preemption import Stop
from kandinsky_jax.schedulers import scheduler_named

P = ParamSpec("P")
T = TypeVar("T")

ENCODERS = 4  # threads; Pillow releases the GIL while compressing
AHEAD = 2  # shards that are read or written while one is generated
RECHECK_SECONDS = 15.0  # after which a shard is looked up again, which another process may have completed


@dataclass
class Report:
    """Result of one process."""

    shards: int = 0  # written by this run
    skipped: int = 0  # complete before
    images: int = 0
    errors: int = 0  # rows that could not be generated
    seconds: float = 0.0
    generating: float = 0.0  # seconds in which a device was busy
    complete: bool = False  # whether all shards of the job, by all processes, are complete
    failed: int = 0  # rows of the complete job, over all processes and runs, that could not be generated
    failed_shards: list[str] = field(default_factory=list)  # files of their shards; removed ones are made again
    stopped: bool = False  # by a signal before the end

    def add(self, result: ShardResult) -> None:
        """Count a shard."""
        if result.written:
            self.shards += 1
        else:
            self.skipped += 1
        self.images += result.images
        self.errors += result.errors
        self.generating += result.generating

    @property
    def waited(self) -> float:
        """Fraction of the time in which the devices were idle."""
        return max(0.0, 1 - self.generating / self.seconds) if self.seconds else 0.0


class ShardResult(NamedTuple):
    """What became of one shard in this process."""

    shard: int
    written: bool  # False if it was complete before, or another process was first
    images: int = 0
    errors: int = 0  # rows that could not be generated
    generating: float = 0.0  # seconds in which a device was busy with it


class Unit(NamedTuple):
    """One picture to generate."""

    request: RowRequest
    image: int  # index among the row's pictures

    @property
    def key(self) -> str:
        """Name of the picture in the output."""
        return self.request.id if self.request.num_images == 1 else f"{self.request.id}+{self.image}"


@dataclass
class Shard:
    """A unit of work, after its rows were read and checked."""

    number: int
    units: list[Unit]
    errors: list[ErrorRecord]
    calls: list[list[Unit]]
    images: list[Future[list[GeneratedImage]]] = field(default_factory=list)
    complete: bool = False  # whether another process has completed it
    generating: float = 0.0  # seconds in which a device was busy with it
    checked: float = field(default_factory=time.perf_counter)  # when it was last seen to be incomplete


@only_good_programs()
def run(
    job: OpenJob,
    pipe: CombinedPipeline,
    process: Process | None = None,
    *,
    shards: Iterable[int] | None = None,
    on_shard: Callable[[ShardResult], object] | None = None,
    overlap: bool = True,
    quiet: bool = False,
    stop: Stop | None = None,
) -> Report:
    """Generate shards of a job that are not complete.

    Args:
        pipe: of the class `job.pipeline`, see `load_pipeline`.
        process: generates every `process.count`-th shard, from `process.index` on; None is the only process.
        shards: the numbers of shards to generate instead, from 0 to `job.shards` - 1. An iterator is asked from a
            thread, one shard ahead, and may wait for work to be found; so an engine can deal out shards one by one. It
            has to end before the interpreter does, which waits for that thread.
            Call `finish` once all shards of the job are complete.
        on_shard: called from a thread with each shard that is complete.
        overlap: False runs the stages one after the other, to measure the effect of overlapping.
        quiet: no progress bar.
        stop: asks to end early.
    Returns:
        a report, whose `complete`, `failed` and `failed_shards` are not determined where `shards` are given.
    Raises:
        JobError: where the output belongs to another job.
        TypeError: for a `Job`, which `open_job` opens, or `shards` that are no numbers one after the other.
        ValueError: for `process` and `shards` together, or a shard that the job does not have.
        OSError: where the output cannot be written to, or is removed meanwhile; complete shards stay.
        RunError: where the only process has generated all shards, and some of them are not there afterwards.
    """
    _check_arguments(job, process, shards)
    job.begin()
    report, stop = Report(), stop or Stop()
    stop.work_in_hand = True
    name = "batch"
    left: Iterable[int]
    if shards is not None:
        left = _checked(job, shards)
        left = list(left) if isinstance(shards, Collection) else left
    else:
        process = process or Process()
        name = name if process.count == 1 else f"process {process.index} of {process.count}"
        done, mine = job.output.complete(job.shards), range(process.index, job.shards, process.count)
        left = [number for number in mine if number not in done]
        report.skipped = len(mine) - len(left)
    job.output.sweep()
    began = time.perf_counter()
    with _Stages(job, pipe, report, overlap, on_shard) as stages, progress_bar(job, name, left, quiet) as bar:
        all_done = stages.generate(left, stop, bar)
    report.seconds = time.perf_counter() - began
    if shards is None:
        finish(job, report)
    report.stopped = stop.asked and not all_done and not report.complete
    if process is not None and process.count == 1 and not report.complete and not report.stopped:
        raise missing_shards(job)
    return report


def _check_arguments(job: OpenJob, process: Process | None, shards: Iterable[int] | None) -> None:
    if not isinstance(job, OpenJob):
        raise TypeError(f"needed is the job that open_job(job) returns, got a {type(job).__name__}")
    if shards is not None and not isinstance(shards, Iterable):
        raise TypeError(f"shards should be a list of numbers, or an iterator, got {quote(shards)}")
    if process is not None and shards is not None:
        raise ValueError("give the process or the shards, not both")


def missing_shards(job: OpenJob) -> RunError:
    """Return the error for shards that were generated and cannot be found afterwards."""
    missing = summarize([f"{number}" for number in job.incomplete()], 100, ", ")
    return RunError(
        f"all shards were generated, but {missing} cannot be found in {shorten(job.job.output, 200)}: was the folder "
        "removed or renamed, or does it lead to other folders on other hosts?"
    )


def _checked(job: OpenJob, shards: Iterable[int]) -> Iterator[int]:
    for number in shards:
        if isinstance(number, bool) or not isinstance(number, numbers.Integral) or not 0 <= number < job.shards:
            raise ValueError(f"there is no shard {quote(number)}; the job's are numbered from 0 to {job.shards - 1}")
        yield int(number)


def finish(job: OpenJob, report: Report | None = None) -> Report:
    """Write errors.jsonl if all shards are complete, whoever made them; otherwise do nothing.

    Args:
        report: gets `complete`, `failed` and `failed_shards`; None is a new one.
    Raises:
        OSError: where the output cannot be read or written.
    """
    report = Report() if report is None else report
    report.complete = len(job.output.complete(job.shards)) == job.shards
    if report.complete:
        report.failed, report.failed_shards = job.output.finish(job.shards)
    return report


@only_good_programs()
def load_pipeline(job: OpenJob) -> CombinedPipeline:
    """Load a job's pipeline, with its scheduler and fast adapter, and compile it meanwhile for the first row.

    Raises:
        CheckpointError: for a model that does not exist or is damaged.
    """
    pipe = job.pipeline.from_pretrained(job.model, prior=job.job.prior, dtype=job.job.dtype, warmup=rehearsal(job))
    pipe.set_progress_bar_config(disable=True)
    if job.job.fast:
        pipe.load_fast()
    if job.scheduler is not None:
        pipe.scheduler = scheduler_named(job.scheduler, pipe.scheduler.config)
    return pipe


def rehearsal(job: OpenJob) -> Callable[[CombinedPipeline], None]:
    """Return a function that calls a pipeline as the job will, with its first valid row, for `warmup`."""

    def call(pipe: CombinedPipeline) -> None:
        checker = _checker(job, pipe)
        for raw in job.rows.read(0, 100):
            try:
                units = [Unit(checker.check(raw), 0)]
            except RowError:
                continue
            pipe.generate(**arguments(units, job.job, Network.split(pipe.unet)[0].devices))
            return

    return call


def _checker(job: OpenJob, pipe: CombinedPipeline) -> Checker:
    guiders = {scale: getattr(job.job, name) for name, scale in SCALES.items()}
    return Checker(pipe, job.mode, job.job.folder, job.settings, job.job.seed, job.rows.taken, job.recommended, guiders)


def progress_bar(job: OpenJob, name: str, left: Iterable[int], quiet: bool) -> tqdm:
    """Return a bar of pictures; how many there will be is only known for a list."""
    total = sum(expected_images(job, number) for number in left) if isinstance(left, list) else None
    return tqdm(total=total, desc=name, unit="image", disable=quiet, smoothing=0.1)


def expected_images(job: OpenJob, shard: int) -> int:
    """Estimate the pictures of a shard before it is read."""
    size = job.job.rows_per_shard
    return min(size, job.rows.count - shard * size) * job.settings["num_images"]


class _Stages:
    """The stages' threads and queues."""

    def __init__(
        self,
        job: OpenJob,
        pipe: CombinedPipeline,
        report: Report,
        overlap: bool,
        on_shard: Callable[[ShardResult], object] | None,
    ):
        self._job, self._pipe, self._report, self._on_shard = job, pipe, report, on_shard
        self._checker = _checker(job, pipe)
        self._devices = Network.split(pipe.unet)[0].devices
        self._overlap = overlap
        self._reader, self._writer = _executor(1, overlap), _executor(1, overlap)
        self._encoders = _executor(ENCODERS, overlap)
        self._writing: deque[Future[None]] = deque()
        self._slots = threading.Semaphore(2 * AHEAD)  # calls that run or wait for encoding

    def __enter__(self) -> _Stages:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._reader.shutdown(wait=False, cancel_futures=True)  # it may be waiting for another shard to be found
        for executor in (self._encoders, self._writer):
            executor.shutdown(wait=True, cancel_futures=kind is not None)

    def generate(self, shards: Iterable[int], stop: Stop, bar: tqdm) -> bool:
        """Generate and write shards, one after the other; return False if there was no time for some."""
        all_done = True
        for shard in self._read_ahead(shards, stop):
            if shard is None:
                all_done = False
                break
            _expect(bar, len(shard.units) - expected_images(self._job, shard.number))
            if not shard.complete and not self._generate_shard(shard, stop, bar):
                all_done = False
                break
            self._writing.append(self._writer.submit(self._write, shard))
            self._collect(AHEAD)
        self._collect(0)
        return all_done

    def _collect(self, most: int) -> None:
        """Raise the errors of shards that were written, and wait until at most so many are being written."""
        while len(self._writing) > most or (self._writing and self._writing[0].done()):
            self._writing.popleft().result()

    def _read_ahead(self, shards: Iterable[int], stop: Stop) -> Iterator[Shard | None]:
        """Yield the shards; None at the end if there was no time for all."""
        left = iter(shards)
        waiting: deque[Future[Shard | None]] = deque()
        while True:
            while len(waiting) < (AHEAD if self._overlap else 1):
                waiting.append(self._reader.submit(self._read_next, left))
            self._wait_for(waiting[0], stop)
            shard = waiting[0].result() if waiting[0].done() else None
            if shard is None and waiting[0].done():
                return
            if shard is None or stop.asked:
                yield None
                return
            waiting.popleft()
            yield shard

    def _wait_for(self, reading: Future[Shard | None], stop: Stop) -> None:
        """Wait for the reader, or for a signal to stop; raise the errors of what is written meanwhile."""
        while True:
            pending: list[Future[Any]] = [reading, *self._writing]
            wait(pending, timeout=1.0, return_when=FIRST_COMPLETED)
            self._collect(AHEAD)
            if reading.done() or stop.asked:
                return

    # Stages -------------------------------------------------------------------------------------------------------

    def _read_next(self, left: Iterator[int]) -> Shard | None:
        number = next(left, None)
        return None if number is None else self._read(number)

    def _read(self, number: int) -> Shard:
        if self._job.output.is_complete(number):
            return Shard(number, [], [], [], complete=True)
        size = self._job.job.rows_per_shard
        requests: list[RowRequest] = []
        errors: list[ErrorRecord] = []
        for raw in self._job.rows.read(number * size, size):
            try:
                requests.append(self._checker.check(raw))
            except RowError as error:
                errors.append(error.record(raw))
        units = [Unit(request, image) for request in requests for image in range(request.num_images)]
        groups: dict[Shape, list[Unit]] = {}
        for unit in units:
            groups.setdefault(unit.request.shape, []).append(unit)
        each = self._job.job.batch * self._devices
        calls = [group[i : i + each] for group in groups.values() for i in range(0, len(group), each)]
        return Shard(number, units, errors, calls)

    def _generate_shard(self, shard: Shard, stop: Stop, bar: tqdm) -> bool:
        """Generate a shard; return False if there is no time for it."""
        for i, call in enumerate(shard.calls):
            if stop.asked and not stop.time_for(len(shard.calls) - i):
                return False
            if self._completed_meanwhile(shard):
                _expect(bar, -sum(map(len, shard.calls[i:])))
                return True
            self._slots.acquire()
            began = time.perf_counter()
            pending = self._pipe.generate(**arguments(call, self._job.job, self._devices))
            if not self._overlap:  # otherwise the device decodes while the host prepares the next call
                jax.block_until_ready(pending.array)
            seconds = time.perf_counter() - began
            stop.took(seconds)
            shard.generating += seconds
            shard.images.append(self._encoders.submit(self._encode, pending, call))
            bar.update(len(call))
        return True

    def _completed_meanwhile(self, shard: Shard) -> bool:
        """Return whether another process has completed a shard since it was read; seldom looked up."""
        if time.perf_counter() - shard.checked > RECHECK_SECONDS:
            shard.complete = self._job.output.is_complete(shard.number)
            shard.checked = time.perf_counter()
        return shard.complete

    def _encode(self, pending: PendingImages, call: list[Unit]) -> list[GeneratedImage]:
        try:
            pixels = np.asarray(pending.array)[: len(call)]  # [B, H, W, 3]
        finally:
            self._slots.release()
        constants = self._constants()
        return [
            self._encoded(unit, picture, unit.request.about() | {"image_number": unit.image} | constants)
            for unit, picture in zip(call, pixels, strict=True)
        ]

    def _encoded(self, unit: Unit, picture: np.ndarray, about: dict[str, object]) -> GeneratedImage:
        """Encode a picture, or return the reason why it failed, so that the others are written."""
        if not np.isfinite(picture).all():
            return GeneratedImage(
                unit.key, b"", about, f"the model's picture {unit.image} has numbers that are not finite"
            )
        try:
            json_line(about)
            [image] = images.to_output(images.from_network(picture[None]), "pil")
            return GeneratedImage(unit.key, images.encode(image, self._job.job.pictures), about)
        except (ValueError, TypeError, OSError, MemoryError) as error:
            reason = shorten(str(error) or type(error).__name__, 200)
            return GeneratedImage(unit.key, b"", about, f"picture {unit.image} cannot be written: {reason}")

    def _constants(self) -> dict[str, object]:
        job = self._job
        facts: dict[str, object] = {"mode": job.mode, "model": job.model, "prior": job.job.prior}
        facts |= {"scheduler": job.scheduler, "dtype": job.job.dtype, "batch": job.job.batch}
        return facts | job.job.extensions

    def _write(self, shard: Shard) -> None:
        result = ShardResult(shard.number, False, generating=shard.generating)
        if not shard.complete:
            by_key = {image.key: image for future in shard.images for image in future.result()}
            for unit in shard.units:
                if fault := by_key[unit.key].fault:
                    shard.errors.append({"row": unit.request.number, "id": unit.request.id, "error": fault})
            shard.errors.sort(key=lambda error: error["row"])
            good = [by_key[unit.key] for unit in shard.units if by_key[unit.key].fault is None]
            if self._job.output.write(shard.number, good, shard.errors):
                failed = len({error["row"] for error in shard.errors})
                result = result._replace(written=True, images=len(good), errors=failed)
        self._report.add(result)
        if self._on_shard is not None:
            self._on_shard(result)


def _expect(bar: tqdm, more: int) -> None:
    """Correct the number of pictures that a bar expects, where it knows one."""
    if bar.total is not None:
        bar.total += more


def arguments(call: list[Unit], job: Job, devices: int) -> dict[str, object]:
    """Return the arguments of the pipeline's `generate` for one call, `job.batch` pictures on every device.

    An incomplete batch of a device is padded with its own last picture, so that it does not depend on other devices.
    """
    batch = job.batch
    groups = [call[i : i + batch] for i in range(0, len(call), batch)]
    groups += [groups[-1]] * (devices - len(groups))
    units = [unit for group in groups for unit in group + [group[-1]] * (batch - len(group))]
    requests, shape = [unit.request for unit in units], units[0].request.shape
    keys = image_keys([request.seed for request in requests], [unit.image for unit in units])
    optional: dict[str, object] = {} if shape.strength is None else {"strength": shape.strength}
    for name in requests[0].pictures:
        optional[name] = [request.pictures[name] for request in requests]
    return optional | {
        "prompt": [request.prompt for request in requests],
        "negative_prompt": [request.negative_prompt or "" for request in requests] if shape.negative else None,
        "height": shape.height,
        "width": shape.width,
        "num_inference_steps": shape.steps,
        "guidance_scale": shape.guidance_scale,
        "guider": job.guider,
        "guidance_interval": job.guidance_interval,
        "cache_interval": job.cache_interval,
        "prior_num_inference_steps": shape.prior_steps,
        "prior_guidance_scale": shape.prior_guidance_scale,
        "prior_guider": job.prior_guider,
        "prior_guidance_interval": job.prior_guidance_interval,
        "generator": keys,
        "output_type": "np",
    }


# Threads ----------------------------------------------------------------------------------------------------------


class _Inline:
    """An executor that runs functions immediately in the calling thread."""

    def submit(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        future: Future[T] = Future()
        future.set_result(function(*args, **kwargs))
        return future

    def shutdown(self, **_: object) -> None:
        pass


def _executor(threads: int, overlap: bool) -> ThreadPoolExecutor | _Inline:
    return ThreadPoolExecutor(threads) if overlap else _Inline()
