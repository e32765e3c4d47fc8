"""Ray deals out a job's shards: fast hosts do more of them, and hosts may join, leave, die or be slow.

One actor on each host holds the pipeline (`RayWorker`). The driver, here, keeps the queue of shards that are not
complete (`ShardQueue`). It has no state but the output folder: started again, it goes on with what is missing there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from tqdm.auto import tqdm

from kandinsky_jax.batch.engines.ray_connection import (
    StoppedBefore,
    ask_for,
    check_connected,
    connected,
    import_ray,
    is_alone,
    reach,
)
from kandinsky_jax.batch.engines.ray_worker import Fault, RayWorker
from kandinsky_jax.batch.engines.shard_queue import ShardQueue
from kandinsky_jax.batch.job import OpenJob
from kandinsky_jax.batch.runner import Report, ShardResult, expected_images, finish, missing_shards, progress_bar
from kandinsky_jax.common.errors import RunError, counted, shorten, summarize
from kandinsky_jax.preemption import Stop

TRIES = 5  # of a shard, and of a host in succession: a worker that dies, a shard that fails there
LOOK_SECONDS = 1.0  # between looks for new hosts
PATIENCE_SECONDS = 60.0  # between messages that no host fits; without any answer, after which more hosts are used
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@dataclasses.dataclass
class EngineReport(Report):
    """Result of all workers of an engine.

    `seconds` are those of the driver, from the first worker that was ready; `waited` is the fraction of all workers'
    time in which their devices were idle, loading included.
    """

    workers: int = 0  # that were started
    lost: int = 0  # workers that died or were given up
    repeated: int = 0  # shards dealt out while another worker held them
    worker_seconds: float = 0.0  # of all workers, from their start
    resource_seconds: dict[str, float] = dataclasses.field(default_factory=dict)  # the same times their resources

    @property
    def waited(self) -> float:
        return max(0.0, 1 - self.generating / self.worker_seconds) if self.worker_seconds else 0.0


def run_on_ray(
    job: OpenJob,
    *,
    address: str | None = None,
    resources: Mapping[str, float] | None = None,
    hosts: int | None = None,
    cache: str | None = None,
    quiet: bool = False,
    stop: Stop | None = None,
) -> EngineReport:
    """Generate the incomplete shards of a job on all hosts of a Ray cluster, one worker on each.

    Args:
        address: of the cluster, such as `auto`, `10.0.0.1:6379` or `ray://...`; None is the one that this process is
            connected to, else that of RAY_ADDRESS, else `local`: a cluster of this machine alone, on loopback.
        resources: of one worker, such as `{"TPU": 4}`; hosts without them have none. None is all TPUs and GPUs of the
            host, or one CPU where it has neither.
        hosts: how many an autoscaling cluster is asked for while the job runs, each with `resources`, or one CPU; all
            hosts that there are work in any case.
        cache: folder or URL of compiled programs for the workers; "off" turns it off, None leaves it to them.
        quiet: no progress bar; what goes wrong is printed to stderr all the same.
        stop: asks to end early.
    Raises:
        JobError: where the output belongs to another job, or Ray is not installed.
        ValueError: for an `address` of no known form, for `hosts` without a cluster that could have more, or where
            this process is connected to another cluster than `address`.
        ConnectionError: where no cluster answers.
        FileNotFoundError: where the output is removed meanwhile.
        RunError: for shards that failed `TRIES` times, after all others; if no host can work; or for shards that hosts
            have written elsewhere.
    """
    ray = import_ray(address)
    here = is_alone(address) and not ray.is_initialized()
    if here and hosts:
        raise ValueError(f"hosts={hosts} are asked of a cluster: give its --address, or leave out --hosts")
    if ray.is_initialized():
        check_connected(ray, address)
    elif not here:
        reach(address)
    job.begin()
    left = job.incomplete()
    job.output.sweep()
    report = EngineReport(skipped=job.shards - len(left))
    stop = stop or Stop()
    if left:
        stop.work_in_hand = True
        with (
            contextlib.suppress(StoppedBefore),
            connected(ray, address, quiet, stop),
            progress_bar(job, "batch", left, quiet) as bar,
        ):
            driver = _Driver(ray, job, resources, cache, left, report, bar, here)
            try:
                if hosts:
                    ask_for(hosts, resources)
                driver.run(stop)
            finally:
                driver.close()
                if hosts:
                    ask_for(0, resources)
    finish(job, report)
    report.stopped = stop.asked and not report.complete
    if not report.complete and not stop.asked:
        raise missing_shards(job)
    return report


@dataclasses.dataclass
class _Worker:
    """An actor of a host."""

    node: str  # its number in the cluster
    host: str
    actor: Any
    resources: Mapping[str, float]
    began: float
    ready: bool = False
    rests_until: float = 0.0  # after a shard has failed there


class _Driver:
    """Workers, and what they were asked for."""

    def __init__(
        self,
        ray: Any,
        job: OpenJob,
        resources: Mapping[str, float] | None,
        cache: str | None,
        left: list[int],
        report: EngineReport,
        bar: tqdm,
        here: bool,
    ):
        self._ray, self._job, self._resources, self._cache = ray, job, resources, cache
        self._report, self._bar = report, bar
        self._here = here  # in a cluster of this machine alone, which no host will join
        self._stopping = False
        self._queue = ShardQueue(left)
        self._workers: dict[str, _Worker] = {}  # by node
        self._asked: dict[Any, tuple[_Worker, int | None]] = {}  # by reference: the shard, or None for loading
        self._faults: defaultdict[int, list[str]] = defaultdict(list)  # of a shard: the nodes
        self._hopeless: dict[int, str] = {}  # shards that failed too often, and why
        self._orphans: set[int] = set()  # shards that a lost worker may have completed without an answer
        self._misses: Counter[str] = Counter()  # of a node in succession
        self._resting: dict[str, float] = {}  # nodes, until when no worker is started there
        self._given_up: dict[str, str] = {}  # nodes, and why
        self._looked = 0.0
        self._answered = time.monotonic()  # when a worker last said anything
        self._said: float | None = None  # when it was last said that no host fits
        self._began: float | None = None  # when the first worker was ready

    def run(self, stop: Stop) -> None:
        """Deal out shards until all are complete, or there is no more time."""
        while self._queue.left and not (stop.asked and (stop.seconds_left <= 0 or not self._asked)):
            if not stop.asked:
                self._look_for_hosts()
                self._deal_out()
            elif not self._stopping:
                self._finish_shards_in_hand(stop)
                continue
            if not self._asked:
                time.sleep(LOOK_SECONDS)
                continue
            answered, _ = self._ray.wait([*self._asked], num_returns=1, timeout=LOOK_SECONDS)
            for reference in answered:
                self._collect(reference)
            self._bar.set_postfix(workers=sum(worker.ready for worker in self._workers.values()), refresh=False)
        if self._hopeless and not stop.asked:
            numbers = summarize([f"{number}" for number in sorted(self._hopeless)], 100, ", ")
            failed = f"{counted(len(self._hopeless), 'shard')} failed {TRIES} times: {numbers}"
            raise RunError(f"{failed}; at last {[*self._hopeless.values()][-1]}")

    def _finish_shards_in_hand(self, stop: Stop) -> None:
        """Let workers finish their shards, or leave them where there is no time; nobody waits for one that loads."""
        self._stopping = True
        self._asked = {reference: asked for reference, asked in self._asked.items() if asked[1] is not None}
        for worker in self._workers.values():
            if worker.ready:
                worker.actor.stop.remote(stop.seconds_left)

    def close(self) -> None:
        """End all workers."""
        for worker in list(self._workers.values()):
            self._remove(worker)
        self._report.repeated = self._queue.repeated
        if self._began is not None:
            self._report.seconds = time.monotonic() - self._began

    # Hosts --------------------------------------------------------------------------------------------------------

    def _look_for_hosts(self) -> None:
        """Start a worker on each host without one, and forget those of hosts that are gone."""
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        nodes = {node["NodeID"]: node for node in self._ray.nodes() if node["Alive"]}
        for worker in [worker for node, worker in self._workers.items() if node not in nodes]:
            self._lose(worker, "its node left the cluster")
        fitting = {name: found for name, node in nodes.items() if (found := self._share_of(node)) is not None}
        for name, resources in fitting.items():
            idle = name not in self._workers and name not in self._given_up and self._resting.get(name, 0.0) <= now
            hang = now - self._answered > PATIENCE_SECONDS  # perhaps; others take over their shards
            if idle and (len(self._workers) < self._queue.left or hang):
                self._start(name, nodes[name], resources)
        if fitting and fitting.keys() <= self._given_up.keys() and not self._workers:
            why = next(iter(self._given_up.values()))
            raise RunError(f"no host of the cluster can generate: {why}")
        wanted = ", ".join(f"{name}={amount:g}" for name, amount in (self._resources or {"CPU": 1}).items())
        if not fitting and self._here:
            raise RunError(f"this machine does not have {wanted}; Ray finds {_described(nodes.values())}")
        if not fitting and (self._said is None or now - self._said > PATIENCE_SECONDS):
            self._said = now
            has = f"{counted(len(nodes), 'host')}, {_described(nodes.values())}"
            self._say(f"waiting for a host with {wanted}; the cluster has {has}")

    def _share_of(self, node: dict[str, Any]) -> Mapping[str, float] | None:
        """Return the resources of a node's worker; None if it does not have them."""
        has = node["Resources"]
        wanted = self._resources
        if wanted is None:
            wanted = {name: has[name] for name in ("TPU", "GPU") if has.get(name)} or {"CPU": 1.0}
        return wanted if all(has.get(name, 0.0) >= amount for name, amount in wanted.items()) else None

    def _start(self, name: str, node: dict[str, Any], resources: Mapping[str, float]) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        own = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}  # which have arguments of their own
        options: dict[str, Any] = {"num_cpus": 0} | {own[x]: y for x, y in resources.items() if x in own}
        options["resources"] = {x: y for x, y in resources.items() if x not in own}
        actor = (
            self._ray.remote(RayWorker)
            .options(
                **options,
                scheduling_strategy=NodeAffinitySchedulingStrategy(name, soft=False),
                max_concurrency=8,  # each shard that it holds is a call that waits
            )
            .remote(self._job.job, os.getcwd(), self._cache)
        )
        host = node.get("NodeManagerHostname") or node["NodeManagerAddress"]
        self._workers[name] = worker = _Worker(name, host, actor, resources, time.monotonic())
        actor.end_with_node.remote()
        self._asked[actor.load.remote()] = worker, None
        self._report.workers += 1

    def _lose(self, worker: _Worker, why: str, permanent: bool = False) -> None:
        """Give up a worker; its host gets another one, unless that has failed too often."""
        if self._workers.get(worker.node) is not worker:
            return
        if self._stopping:  # so may be the workers, by a signal to all processes
            self._remove(worker)
            return
        self._report.lost += 1
        self._misses[worker.node] += 1
        if permanent or self._misses[worker.node] >= TRIES:
            self._given_up[worker.node] = f"{worker.host}: {why}"
            self._say(f"{worker.host} is given up: {why}")
        else:
            self._resting[worker.node] = time.monotonic() + 2.0 ** (self._misses[worker.node] - 1)
            self._say(f"{worker.host} lost its worker: {why}; others do its shards")
        self._remove(worker)

    def _remove(self, worker: _Worker) -> None:
        del self._workers[worker.node]
        self._orphans.update(shard for its, shard in self._asked.values() if its is worker and shard is not None)
        self._queue.leave(worker.node)
        self._asked = {reference: asked for reference, asked in self._asked.items() if asked[0] is not worker}
        seconds = time.monotonic() - worker.began
        self._report.worker_seconds += seconds
        for name, amount in worker.resources.items():
            self._report.resource_seconds[name] = self._report.resource_seconds.get(name, 0.0) + amount * seconds
        with contextlib.suppress(Exception):  # it is gone
            self._ray.kill(worker.actor)

    # Shards -------------------------------------------------------------------------------------------------------

    def _deal_out(self) -> None:
        now = time.monotonic()
        for worker in self._workers.values():
            able = worker.ready and worker.rests_until <= now
            while able and (shard := self._queue.take(worker.node)) is not None:
                self._asked[worker.actor.generate.remote(shard)] = worker, shard

    def _collect(self, reference: Any) -> None:
        """Take a worker's answer."""
        self._answered = time.monotonic()
        worker, shard = self._asked.pop(reference)
        try:
            answer = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            self._lose(worker, _reason(error))
            return
        if isinstance(answer, Fault):
            if shard is None:
                self._lose(worker, answer.message, answer.permanent)
            else:
                self._retry(worker, shard, answer.message)
        elif shard is None:
            self._welcome(worker)
        elif answer is None:  # left, since it was asked to stop
            self._queue.failed(shard, worker.node)
        else:
            self._count(worker, answer)

    def _welcome(self, worker: _Worker) -> None:
        worker.ready = True
        self._queue.join(worker.node)
        if self._began is None:
            self._began = time.monotonic()

    def _retry(self, worker: _Worker, shard: int, why: str) -> None:
        """Deal out a shard again, or give up: the shard if several hosts failed, the host if it does nothing else."""
        self._job.output.check_begun()
        failed = self._faults[shard]
        failed.append(worker.node)
        self._misses[worker.node] += 1
        worker.rests_until = time.monotonic() + 2.0 ** min(self._misses[worker.node] - 1, TRIES)
        if len(failed) >= TRIES and (len(set(failed)) > 1 or len(self._workers) == 1):
            self._hopeless[shard] = f"on {worker.host}: {why}"
            self._say(f"shard {shard} is left out: it failed {len(failed)} times, at last on {worker.host}: {why}")
            self._queue.failed(shard, worker.node)
            self._queue.drop(shard)
            return
        if self._misses[worker.node] >= (TRIES if len(self._workers) > 1 else 2 * TRIES):
            self._lose(worker, why)
            return
        self._say(f"{worker.host}: shard {shard} failed and is tried again: {why}")
        self._queue.failed(shard, worker.node)

    def _count(self, worker: _Worker, result: ShardResult) -> None:
        """Count a shard that is complete."""
        self._misses[worker.node] = 0
        self._hopeless.pop(result.shard, None)
        first = self._queue.complete(result.shard, worker.node)
        if first and not result.written and result.shard in self._orphans:
            result = result._replace(written=True, images=expected_images(self._job, result.shard))
        if result.written or first:
            self._report.add(result)
        else:
            self._report.generating += result.generating
        if first:
            expected = expected_images(self._job, result.shard)
            found = result.images if result.written else expected
            if self._bar.total is not None:
                self._bar.total += found - expected
            self._bar.update(found)

    def _say(self, text: str) -> None:
        self._bar.write(text, file=sys.stderr)


def _described(nodes: Iterable[dict[str, Any]]) -> str:
    """Return the most that a node has of each resource; not the names of nodes that Ray counts as resources."""
    most: dict[str, float] = {}
    for node in nodes:
        for name, amount in node["Resources"].items():
            if not name.startswith("node:") and not name.endswith("memory"):
                most[name] = max(amount, most.get(name, 0.0))
    return "at most " + ", ".join(f"{name}={amount:g}" for name, amount in most.items())


def _reason(error: Exception) -> str:
    """Return the line of Ray's many that says why: the last one of a traceback, else the first."""
    lines = _COLOUR.sub("", str(error)).strip().splitlines() or [type(error).__name__]
    return shorten(lines[-1 if "ray::" in lines[0] else 0], 200)
