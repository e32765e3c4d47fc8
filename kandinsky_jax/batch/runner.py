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

import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple, ParamSpec, TypeVar

import jax
import numpy as np
from tqdm.auto import tqdm

from kandinsky_jax import images
from kandinsky_jax.batch.job import OpenJob
from kandinsky_jax.batch.requests import Checker, ErrorRecord, RowError, RowRequest, Shape
from kandinsky_jax.batch.shards import GeneratedImage, json_line
from kandinsky_jax.common.errors import shorten
from kandinsky_jax.diffusion import Network
from kandinsky_jax.diffusion.rng import image_keys
from kandinsky_jax.parallel.process import Process
from kandinsky_jax.pipelines import CombinedPipeline
from kandinsky_jax.pipelines.decoder import PendingImages
from kandinsky_jax.preemption import Stop

P = ParamSpec("P")
T = TypeVar("T")

ENCODERS = 4  # threads; Pillow releases the GIL while compressing
AHEAD = 2  # shards that are read or written while one is generated


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

    @property
    def waited(self) -> float:
        """Fraction of the time in which the devices were idle."""
        return max(0.0, 1 - self.generating / self.seconds) if self.seconds else 0.0


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


def run(
    job: OpenJob, pipe: CombinedPipeline, process: Process, *, overlap: bool = True, quiet: bool = False, stop: Stop
) -> Report:
    """Generate this process's incomplete shards of a job: every `process.count`-th, from `process.index` on.

    Args:
        pipe: of the class `job.pipeline`.
        overlap: False runs the stages one after the other, to measure the effect of overlapping.
        quiet: no progress bar.
        stop: asks to end early.
    Raises:
        JobError: where the output belongs to another job.
        OSError: where the output cannot be written to; complete shards stay.
    """
    job.begin()
    done, mine = job.output.complete(job.shards), range(process.index, job.shards, process.count)
    left = [number for number in mine if number not in done]
    job.output.sweep()
    report = Report(skipped=len(mine) - len(left))
    began = time.perf_counter()
    with _Stages(job, pipe, report, overlap) as stages, _bar(job, process, left, quiet) as bar:
        stages.generate(left, stop, bar)
    report.seconds = time.perf_counter() - began
    report.stopped = stop.asked and report.shards + report.skipped < len(mine)
    report.complete = len(job.output.complete(job.shards)) == job.shards
    if report.complete:
        report.failed, report.failed_shards = job.output.finish(job.shards)
    return report


def rehearsal(job: OpenJob) -> Callable[[CombinedPipeline], None]:
    """Return a function that calls a pipeline as the job will, with its first valid row, for `warmup`."""

    def call(pipe: CombinedPipeline) -> None:
        checker = _checker(job, pipe)
        for raw in job.rows.read(0, 100):
            try:
                units = [Unit(checker.check(raw), 0)]
            except RowError:
                continue
            pipe.generate(**arguments(units, job.job.batch, Network.split(pipe.unet)[0].devices))
            return

    return call


def _checker(job: OpenJob, pipe: CombinedPipeline) -> Checker:
    return Checker(pipe, job.mode, job.job.folder, job.settings, job.job.seed, job.rows.taken, job.recommended)


def _bar(job: OpenJob, process: Process, left: list[int], quiet: bool) -> tqdm:
    name = "batch" if process.count == 1 else f"process {process.index} of {process.count}"
    total = sum(_expected(job, number) for number in left)
    return tqdm(total=total, desc=name, unit="image", disable=quiet, smoothing=0.1)


def _expected(job: OpenJob, shard: int) -> int:
    """Estimate the pictures of a shard before it is read."""
    size = job.job.rows_per_shard
    return min(size, job.rows.count - shard * size) * job.settings.get("num_images", 1)


class _Stages:
    """The stages' threads and queues."""

    def __init__(self, job: OpenJob, pipe: CombinedPipeline, report: Report, overlap: bool):
        self._job, self._pipe, self._report = job, pipe, report
        self._checker = _checker(job, pipe)
        self._devices = Network.split(pipe.unet)[0].devices
        self._overlap = overlap
        self._reader, self._writer = _executor(1, overlap), _executor(1, overlap)
        self._encoders = _executor(ENCODERS, overlap)
        self._slots = threading.Semaphore(2 * AHEAD)  # calls that run or wait for encoding

    def __enter__(self) -> _Stages:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        for executor in (self._reader, self._encoders, self._writer):
            executor.shutdown(wait=True, cancel_futures=kind is not None)

    def generate(self, shards: list[int], stop: Stop, bar: tqdm) -> None:
        """Generate and write shards, one after the other."""
        writing: list[Future[None]] = []
        for shard in self._read_ahead(shards, stop):
            if shard.complete:
                self._report.skipped += 1
                bar.total -= _expected(self._job, shard.number)
                continue
            bar.total += len(shard.units) - _expected(self._job, shard.number)
            if not self._generate_shard(shard, stop, bar):
                break
            writing.append(self._writer.submit(self._write, shard))
            while len(writing) > AHEAD or (writing and writing[0].done()):
                writing.pop(0).result()
        for future in writing:
            future.result()

    def _read_ahead(self, shards: list[int], stop: Stop) -> Iterator[Shard]:
        waiting: queue.SimpleQueue[Future[Shard]] = queue.SimpleQueue()
        ahead, left = 0, iter(shards)
        while True:
            while ahead < (AHEAD if self._overlap else 1) and not stop.asked:
                number = next(left, None)
                if number is None:
                    break
                waiting.put(self._reader.submit(self._read, number))
                ahead += 1
            if not ahead or stop.asked:
                return
            yield waiting.get().result()
            ahead -= 1

    # Stages -------------------------------------------------------------------------------------------------------

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
            self._slots.acquire()
            began = time.perf_counter()
            pending = self._pipe.generate(**arguments(call, self._job.job.batch, self._devices))
            if not self._overlap:  # otherwise the device decodes while the host prepares the next call
                jax.block_until_ready(pending.array)
            seconds = time.perf_counter() - began
            stop.took(seconds)
            self._report.generating += seconds
            shard.images.append(self._encoders.submit(self._encode, pending, call))
            bar.update(len(call))
        return True

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
        facts = {"mode": job.mode, "model": job.model, "prior": job.job.prior, "scheduler": job.scheduler}
        return facts | {"dtype": job.job.dtype, "batch": job.job.batch}

    def _write(self, shard: Shard) -> None:
        by_key = {image.key: image for future in shard.images for image in future.result()}
        for unit in shard.units:
            if fault := by_key[unit.key].fault:
                shard.errors.append({"row": unit.request.number, "id": unit.request.id, "error": fault})
        shard.errors.sort(key=lambda error: error["row"])
        good = [by_key[unit.key] for unit in shard.units if by_key[unit.key].fault is None]
        if not self._job.output.write(shard.number, good, shard.errors):
            self._report.skipped += 1  # another process was first
            return
        self._report.shards += 1
        self._report.images += len(good)
        self._report.errors += len({error["row"] for error in shard.errors})


def arguments(call: list[Unit], batch: int, devices: int) -> dict[str, object]:
    """Return the arguments of the pipeline's `generate` for one call, `batch` pictures on every device.

    An incomplete batch of a device is padded with its own last picture, so that it does not depend on other devices.
    """
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
        "prior_num_inference_steps": shape.prior_steps,
        "prior_guidance_scale": shape.prior_guidance_scale,
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
