"""The worker of a host on Ray: holds the pipeline, and generates the shards that it is given."""

from __future__ import annotations

import itertools
import os
import queue
import threading
import time
from concurrent.futures import Future
from typing import NamedTuple

from kandinsky_jax.batch.job import Job, OpenJob, open_job
from kandinsky_jax.batch.runner import ShardResult, load_pipeline, run
from kandinsky_jax.common.errors import shorten
from kandinsky_jax.compilation import OFF, set_compilation_cache
from kandinsky_jax.pipelines import CombinedPipeline
from kandinsky_jax.preemption import Stop


class Fault(NamedTuple):
    """An error of a worker, as a value: an exception might not survive being pickled."""

    message: str
    permanent: bool  # would be the same next time: a missing model, another job's output


class RayWorker:
    """Generates shards in the order in which they are given, reading the next one meanwhile.

    Its methods are called from several threads, one of which waits for each shard.

    Args:
        job: whose paths and URLs lead to the same files on all hosts.
        folder: that relative paths start from, where the host has it.
        cache: folder or URL of compiled programs; "off" turns the cache off, None leaves it as it is configured.
    """

    def __init__(self, job: Job, folder: str, cache: str | None = None):
        self._job, self._folder, self._cache = job, folder, cache
        self._stop = Stop()
        self._lock = threading.Lock()  # of the next three
        self._ended = False
        self._shards: queue.SimpleQueue[int | None] = queue.SimpleQueue()  # of one `run`; None ends it
        self._results: dict[int, Future[ShardResult | Fault | None]] = {}

    def end_with_node(self) -> None:
        """End this process when its parent, the node's raylet, is gone.

        Ray would let the interpreter end, which waits for the thread that waits for the next shard.
        """
        threading.Thread(target=_end_with, args=(os.getppid(),), name="end-with-node", daemon=True).start()

    def load(self) -> Fault | None:
        """Load the pipeline, and be ready for shards; return what went wrong."""
        try:
            if os.path.isdir(self._folder):
                os.chdir(self._folder)
            if self._cache is not None:
                set_compilation_cache(None if self._cache == OFF else self._cache)
            job = open_job(self._job)
            if not job.output.has_begun():  # the driver has begun it, so this is another folder
                where = shorten(self._job.output, 200)
                return Fault(f"{where} has no job.json here: does it lead to the same folder on all hosts?", False)
            job.begin()  # the same model and versions here?
            pipe = load_pipeline(job)
        except BaseException as error:
            return _fault(error, loading=True)
        threading.Thread(target=self._generate_all, args=(job, pipe), name="generate", daemon=True).start()
        return None

    def generate(self, shard: int) -> ShardResult | Fault | None:
        """Return when a shard is complete, has failed, or None when it is left after `stop`."""
        future: Future[ShardResult | Fault | None] = Future()
        with self._lock:
            if self._ended:
                return None
            self._results[shard] = future
            self._shards.put(shard)
        return future.result()

    def stop(self, seconds: float) -> None:
        """Finish the shard in hand, if `seconds` are enough for it, and leave all others; see `Stop`."""
        self._stop.grace = max(0.0, seconds)
        self._stop.ask()

    def close(self) -> None:
        """End the threads once the shards in hand are complete; Ray ends the process instead."""
        with self._lock:
            self._shards.put(None)

    def _generate_all(self, job: OpenJob, pipe: CombinedPipeline) -> None:
        """Generate shards until `close` or `stop`; after an error, begin again with the same pipeline, once there is a
        shard: an output that cannot be reached would fail again and again for nobody."""
        while not self._ended and (first := self._shards.get()) is not None:
            shards = itertools.chain([first], iter(self._shards.get, None))
            fault = None
            try:
                job.output.check_begun()  # `run` would begin the job in a new folder
                run(job, pipe, shards=shards, on_shard=self._answer, quiet=True, stop=self._stop)
            except BaseException as error:  # the answer of a thread that is waited for
                fault = _fault(error)
            with self._lock:
                self._ended = fault is None or self._stop.asked
                self._shards.put(None)  # for the thread that waits for the next shard
                self._shards = queue.SimpleQueue()
                left, self._results = self._results, {}
            for future in left.values():
                future.set_result(fault)

    def _answer(self, result: ShardResult) -> None:
        with self._lock:
            future = self._results.pop(result.shard)
        future.set_result(result)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _fault(error: BaseException, loading: bool = False) -> Fault:
    """Describe an error; one of loading is permanent if it is of a kind that a job cannot be rid of: JobError,
    CheckpointError. While a shard is generated the same kinds may pass: a damaged answer of a store is a ValueError."""
    try:
        lines = "; ".join(line.strip() for line in str(error).splitlines()).replace(":; ", ": ")
    except Exception:  # any kind
        lines = ""
    permanent = loading and isinstance(error, (ValueError, TypeError, ImportError))
    return Fault(shorten(lines or type(error).__name__, 400), permanent)
