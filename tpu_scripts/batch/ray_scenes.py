"""Jobs on a Ray cluster of this machine whose processes are stopped, added, removed or started again.

Each function is one scene: it starts a cluster and the real command as its driver, disturbs them, checks that the
output is that of an uninterrupted static job, and returns what happened. See ray_kill.py, which runs them all.
"""

from __future__ import annotations

import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from tpu_scripts.batch.batch_kill import ROOT, SHAPES_MODEL, contents, ids
from tpu_scripts.batch.ray_cluster import RayCluster

SECONDS = 300  # that a job may take
COMMIT = "0" * 40  # of a model in the Hub's cache


class Job(NamedTuple):
    """A job that has been done without interruption.

    Args:
        folder: holds `rows.jsonl` and the output `whole`.
        rows: how many.
        options: of `kandinsky-jax batch`.
        cache: folder of compiled programs.
    """

    folder: Path
    rows: int
    options: list[str]
    cache: str

    def cluster(self, nodes: int = 0, environment: dict[str, str] | None = None) -> RayCluster:
        """Return a cluster to enter, whose nodes share compiled programs."""
        common = {"JAX_COMPILATION_CACHE_DIR": self.cache, "HF_HUB_OFFLINE": "1"}
        return RayCluster(nodes, common | (environment or {}))

    def check(self, output: Path, whole: str = "whole") -> None:
        """Raise AssertionError unless every id is there once, with the same bytes, and no scratch file."""
        if not (output / "manifest").exists():
            assert ids(output) == [f"picture-{i}" for i in range(self.rows)], "an id is missing, or there twice"
        found, wanted = contents(output), contents(self.folder / whole)
        assert found.keys() == wanted.keys(), sorted(found.keys() ^ wanted.keys())
        assert found == wanted, "bytes differ"
        assert not list(output.rglob(".*")), "a temporary file is left"


def static(job: Job, output: Path, options: list[str], environment: dict[str, str] | None = None) -> None:
    """Run a variant of the job in one process, without Ray and faults."""
    command = [sys.executable, "-m", "kandinsky_jax.cli", "batch", "rows.jsonl", "-o", str(output), "--quiet"]
    variables = os.environ | {"PYTHONPATH": str(ROOT)} | (environment or {})
    done = subprocess.run(
        [*command, *job.options, *options], cwd=job.folder, env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


class Driver:
    """`kandinsky-jax batch --engine ray` in a process of its own.

    Args:
        output: a folder below the job's, or a URL.
        options: beside the job's.
        resources: of one worker.
    """

    def __init__(
        self,
        job: Job,
        cluster: RayCluster,
        output: Path | str,
        options: list[str] | None = None,
        resources: str = "CPU=1",
        environment: dict[str, str] | None = None,
    ):
        self.output = output
        self._log = job.folder / f"log-{time.monotonic_ns()}.txt"
        command = [sys.executable, "-m", "kandinsky_jax.cli", "batch", "rows.jsonl", "-o", str(output), "--quiet"]
        command += [*job.options, *(options or []), "--engine", "ray", "--address", cluster.address]
        command += ["--resources", resources]
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=job.folder, stdout=log, stderr=log, env=cluster.environment() | (environment or {})
            )
        self._began = time.monotonic()

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self.process.poll() is None

    @property
    def text(self) -> str:
        """What it has printed."""
        return self._log.read_text()

    @property
    def shards(self) -> int:
        """How many shards are complete."""
        return len(list(Path(self.output).glob("*.tar"))) + len(list(Path(self.output).glob("manifest/*.parquet")))

    @property
    def workers(self) -> tuple[int, int]:
        """Return how many workers its report counts, and how many were lost."""
        found = re.search(r"(\d+) workers?, (\d+) lost", self.text)
        assert found, self.text[-2000:]
        return int(found[1]), int(found[2])

    def until(self, shards: int) -> None:
        """Wait until so many shards are complete, or the end."""
        deadline = time.monotonic() + SECONDS
        while self.running and self.shards < shards:
            assert time.monotonic() < deadline, self.text[-2000:]
            time.sleep(0.02)

    def end(self, code: int = 0, seconds: float = SECONDS) -> float:
        """Wait for the end with this exit code; return the seconds since the start."""
        try:
            found = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"the driver has not ended after {seconds} s: {self.text[-2000:]}") from None
        assert found == code, (found, self.text[-2000:])
        return round(time.monotonic() - self._began, 1)

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()


def quiet_job(job: Job, nodes: int = 2) -> dict[str, Any]:
    """Run the job without faults."""
    with job.cluster(nodes) as cluster:
        driver = Driver(job, cluster, job.folder / "quiet")
        seconds = driver.end()
        job.check(job.folder / "quiet")
        return {"seconds": seconds, "workers": driver.workers[0]}


def stopped(job: Job, what: str, seconds: float = SECONDS) -> dict[str, Any]:
    """Stop one of two nodes by SIGSTOP for the rest of the job.

    Args:
        what: "node" for all its processes; "worker" for the worker alone, whose raylet lives; "loading" for the same
            before its pipeline is loaded.
        seconds: that the driver may take from then on.
    """
    output = job.folder / f"stopped-{what}"
    with job.cluster(2) as cluster:
        driver, node = Driver(job, cluster, output), cluster.nodes[0]
        if what == "loading":
            while not node.workers():
                time.sleep(0.02)
        else:
            driver.until(4)
        before, which = driver.shards, node.workers()
        assert which, "the worker has ended before it was stopped"
        node.send(signal.SIGSTOP, None if what == "node" else which)
        began = time.monotonic()
        driver.end(seconds=seconds)
        after = time.monotonic() - began
        job.check(output)
        found = {"shards_before": before, "seconds_after": round(after, 1), "repeated": _repeated(driver)}
        while what != "node" and node.workers() and time.monotonic() - began < after + 30:
            time.sleep(0.1)
        return found | {
            "workers_left": len(node.workers()),
            "seconds_until_gone": round(time.monotonic() - began - after, 1),
        }


def joining(job: Job) -> dict[str, Any]:
    """Start with one node, add two midway, and let the first one leave gracefully.

    The first worker is stopped until the others have completed a shard: it might be done before they are loaded.
    """
    output = job.folder / "joining"
    with job.cluster(1) as cluster:
        driver, first = Driver(job, cluster, output), cluster.nodes[0]
        driver.until(3)
        first.send(signal.SIGSTOP, first.workers())
        for _ in range(2):
            cluster.add()
        added = driver.shards
        driver.until(added + 1)
        first.send(signal.SIGCONT, first.workers())
        driver.until(added + 3)
        left = driver.shards
        assert driver.running, "the job has ended before the first node left"
        first.leave()
        driver.end()
        job.check(output)
        workers, lost = driver.workers
        assert workers == 3, driver.text
        total = len(list(output.glob("*.tar")))
        return {"shards": total, "when_added": added, "when_the_first_left": left, "workers": workers, "lost": lost}


def driver_killed(job: Job, kills: int, rng: random.Random, nodes: int = 2) -> dict[str, Any]:
    """Kill the driver by SIGKILL again and again, and start it again at once."""
    output, found = job.folder / "driver-killed", {"kills": 0, "jobs": 0}
    at: list[int] = []
    with job.cluster(nodes) as cluster:
        while found["kills"] < kills:
            driver = Driver(job, cluster, output)
            while found["kills"] < kills:
                if rng.random() < 0.25:
                    time.sleep(rng.uniform(1, 6))  # while it connects, or workers load
                else:
                    driver.until(driver.shards + rng.randint(1, 12))
                if not driver.running:
                    break
                at.append(driver.shards)
                driver.kill()
                found["kills"] += 1
                driver = Driver(job, cluster, output)
            driver.end()
            job.check(output)
            found["jobs"] += 1
            shutil.rmtree(output)
    return found | {"shards_when_killed": at}


def twin_drivers(job: Job) -> dict[str, Any]:
    """Start two drivers for one output; then two of which one is stopped until the other is done."""
    output = job.folder / "twins"
    with job.cluster(2) as cluster:
        both = [Driver(job, cluster, output, resources="CPU=0.5") for _ in range(2)]
        seconds = [driver.end() for driver in both]
        job.check(output)
        workers = [driver.workers for driver in both]
        output = job.folder / "twins-stopped"
        first = Driver(job, cluster, output, resources="CPU=0.5")
        first.until(4)
        first.process.send_signal(signal.SIGSTOP)
        second = Driver(job, cluster, output, resources="CPU=0.5")
        second.end()
        job.check(output)
        first.process.send_signal(signal.SIGCONT)
        began = time.monotonic()
        first.end(seconds=60)
        job.check(output)
        after = round(time.monotonic() - began, 1)
        return {"seconds": seconds, "workers_and_lost": workers, "seconds_after_continuing": after}


def terminated(job: Job, grace: float = 10.0) -> dict[str, Any]:
    """Send SIGTERM to the driver while shards are generated, then while workers load, and start it again."""
    output, seconds = job.folder / "terminated", {}
    with job.cluster(2) as cluster:
        for moment in ("generating", "loading"):
            driver = Driver(job, cluster, output, ["--grace", str(grace)])
            if moment == "generating":
                driver.until(4)
            else:
                while not any(node.workers() for node in cluster.nodes):
                    time.sleep(0.02)
            began = time.monotonic()
            driver.process.terminate()
            driver.end(143, grace)
            seconds[moment] = round(time.monotonic() - began, 1)
            assert "start it again to continue" in driver.text
        done = driver.shards
        Driver(job, cluster, output).end()
        job.check(output)
        return {"grace": grace, "seconds_until_the_end": seconds, "shards_when_started_again": done}


def unfit_hosts(job: Job) -> dict[str, Any]:
    """Have a host without the model, one with another Pillow, and a good one; then only the first two.

    The model is named as a Hub repository, and each host has a cache of its own.
    """
    models, empty, other = (job.folder / name for name in ("models", "no-models", "other"))
    for part in ("decoder", "prior"):
        place = models / f"models--shapes--{part}"
        shutil.copytree(SHAPES_MODEL / f"kandinsky-2-2-{part}", place / "snapshots" / COMMIT)
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text(COMMIT)
    (other / "pillow-0.1.dist-info").mkdir(parents=True)
    (other / "pillow-0.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: pillow\nVersion: 0.1\n")
    good = {"HF_HUB_CACHE": str(models), "HF_HUB_OFFLINE": "1"}
    without, outdated = {"HF_HUB_CACHE": str(empty)}, good | {"PYTHONPATH": f"{other}{os.pathsep}{ROOT}"}
    options = ["-m", "shapes/decoder", "--prior", "shapes/prior"]
    static(job, job.folder / "whole-hub", options, good)
    found: dict[str, Any] = {}
    for scene, hosts in (("with_a_good_one", [without, outdated, good]), ("without_one", [without, outdated])):
        with job.cluster() as cluster:
            for variables in hosts:
                cluster.add(environment=variables)
            driver = Driver(job, cluster, job.folder / scene, options, environment=good)
            found[scene] = {"seconds": driver.end(0 if good in hosts else 1)}
            given_up = [line for line in driver.text.splitlines() if " is given up: " in line]
            found[scene]["messages"] = [line.replace(str(job.folder), "...") for line in given_up]
            assert len(given_up) == 2, driver.text
            assert given_up[0].startswith(socket.gethostname())
            if good in hosts:
                job.check(job.folder / scene, "whole-hub")
            else:
                assert "no host of the cluster can generate" in driver.text
    return found


def unwritable(job: Job, shard: int = 7) -> dict[str, Any]:
    """Let a folder stand where a shard should be written; remove it, and start the job again."""
    output = job.folder / "unwritable"
    with job.cluster(2) as cluster:
        driver = Driver(job, cluster, output)
        while not (output / "job.json").exists():
            time.sleep(0.01)
        blocked = output / f"{shard:06d}.tar"
        (blocked / "something").mkdir(parents=True)
        seconds = driver.end(1)
        assert f"shard {shard} is left out: it failed 5 times" in driver.text, driver.text
        message = driver.text.strip().splitlines()[-1].replace(str(job.folder), "...")
        shards = driver.shards - 1
        assert shards == len(list((job.folder / "whole").glob("*.tar"))) - 1, shards
        shutil.rmtree(blocked)
        Driver(job, cluster, output).end()
        job.check(output)
        return {"seconds": seconds, "shards_complete": shards, "message": message}


def full_disk(job: Job) -> dict[str, Any]:
    """Let one of two workers write no file of more than 1,000 bytes, as on a host whose disk is full."""
    output = job.folder / "full-disk"
    with job.cluster(2) as cluster:
        driver, node = Driver(job, cluster, output), cluster.nodes[0]
        driver.until(4)
        for process in node.workers():
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1000, 1000))
        seconds = driver.end()
        job.check(output)
        assert driver.workers[1] == 1, driver.text
        [message] = [line for line in driver.text.splitlines() if " is given up: " in line]
        assert "File too large" in message
        failures = driver.text.count(" failed and is tried again")
        return {"seconds": seconds, "failures": failures, "message": message.replace(str(job.folder), "...")}


def vanished(job: Job) -> dict[str, Any]:
    """Remove a shard that is complete, as if a host had written it elsewhere; then start the job again."""
    output = job.folder / "vanished"
    with job.cluster(2) as cluster:
        driver = Driver(job, cluster, output)
        driver.until(4)
        sorted(output.glob("*.tar"))[0].unlink()
        driver.end(1)
        assert "cannot be found in" in driver.text
        Driver(job, cluster, output).end()
        job.check(output)
        return {"message": driver.text.strip().splitlines()[-1].replace(str(job.folder), "...")}


def _repeated(driver: Driver) -> int:
    found = re.search(r"(\d+) slow shards? w\w+ started twice", driver.text)
    assert found, driver.text[-2000:]
    return int(found[1])
