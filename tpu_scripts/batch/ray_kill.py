"""Kills, stops and adds processes of batch jobs on Ray, and checks that the pictures are those of a static job.

A cluster of several nodes on this machine, on loopback (ray_cluster.py); the driver is the real command. Kills, at
random moments and in equal numbers, of

    worker TERM, worker KILL   the process that generates
    helper                     another process of a node: an agent, an idle worker
    raylet                     which takes its node with it
    node                       all processes of a node at once; another one is added a little later

and then the scenes of ray_scenes.py: nodes that are stopped, added or removed, drivers that are killed or started
twice, hosts that do not fit. In the end every id is there once, with the same bytes, and no temporary file.

Writes tpu_scripts/results/ray-kill-DATE.json, after each scene; scenes of the same day, job and seed stay in it.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tpu_scripts.batch import batch_kill, ray_scenes  # noqa: E402
from tpu_scripts.batch.ray_cluster import RayCluster, RayNode  # noqa: E402
from tpu_scripts.batch.ray_scenes import Driver, Job  # noqa: E402

KINDS = ("worker TERM", "worker KILL", "helper", "raylet", "node")
MOMENTS = ("loading", "writing", "generating", "in succession")
EXAMPLE = """example:
  python tpu_scripts/batch/ray_kill.py --kills 40
  python tpu_scripts/batch/ray_kill.py --only driver_killed stopped_node --print

The whole takes about fifteen minutes on two cores."""


def open_job(folder: Path, rows: int, options: list[str]) -> Job:
    """Write rows, and run the job without interruption in one process."""
    batch_kill.write_rows(folder, rows)
    batch_kill.undisturbed(folder, options)
    return Job(folder, rows, options, str(folder / "cache"))


def kills(job: Job, count: int, rng: random.Random, nodes: int = 3, options: list[str] | None = None) -> dict[str, Any]:
    """Kill processes of a cluster, which gets another node for each that is lost; jobs follow each other."""
    plan = [KINDS[i % len(KINDS)] for i in range(count)]
    rng.shuffle(plan)
    kinds: collections.Counter[str] = collections.Counter()
    moments: collections.Counter[str] = collections.Counter()
    found: dict[str, Any] = {"jobs": 0, "writing": 0, "loading": 0, "seconds": [], "shards_when_killed": []}
    whole = "whole" if options is None else "whole-folder"
    with job.cluster(nodes) as cluster:
        nursery = _Nursery(cluster, nodes, rng)
        while plan or not found["jobs"]:
            driver = Driver(job, cluster, job.folder / f"kills-{found['jobs']}", options)
            while plan:
                moment = rng.choice(MOMENTS)
                victim = _wait(driver, nursery, plan[-1], moment, rng)
                if victim is None:
                    break
                found["writing"] += _writing(driver)
                found["loading"] += any(process.seconds < 4 for process in victim.workers())
                found["shards_when_killed"].append(driver.shards)
                _kill(victim, plan[-1], rng)
                kinds[plan.pop()] += 1
                moments[moment] += 1
                print(f"kill {kinds.total()}: {kinds}, {driver.shards} shards", flush=True)
            last = time.monotonic()
            while driver.running and time.monotonic() - last < ray_scenes.SECONDS:
                nursery.tend()
                time.sleep(0.05)
            found["seconds"].append(driver.end(seconds=1))
            job.check(Path(driver.output), whole)
            shutil.rmtree(driver.output)
            found["jobs"] += 1
    return {"kills": kinds.total(), "kinds": kinds, "moments": moments} | found


class _Nursery:
    """Replaces lost nodes, after a while."""

    def __init__(self, cluster: RayCluster, nodes: int, rng: random.Random):
        self.cluster, self._count, self._rng = cluster, nodes, rng
        self._later = 0.0

    def tend(self) -> None:
        """Forget lost nodes, and add one if it is time."""
        for node in [node for node in self.cluster.nodes if not node.alive]:
            node.kill()
            self.cluster.nodes.remove(node)
            self._later = time.monotonic() + self._rng.uniform(0, 5)
        if len(self.cluster.nodes) < self._count and time.monotonic() >= self._later:
            self.cluster.add()


def _writing(driver: Driver) -> bool:
    """Return whether a scratch file is visible."""
    output = Path(driver.output)
    return any(output.glob(".*.partial")) or any(output.glob("images/*/.*.partial"))


def _wait(driver: Driver, nursery: _Nursery, kind: str, moment: str, rng: random.Random) -> RayNode | None:
    """Wait for a moment at which a node has such a process; return the node, None at the end of the job."""
    began, tended, shards = time.monotonic(), 0.0, driver.shards + rng.randint(1, 20)
    while driver.running:
        now = time.monotonic()
        if now - tended > 0.5:
            nursery.tend()
            tended = now
        if moment == "loading":
            ready = any(process.seconds < 4 for node in nursery.cluster.nodes for process in node.workers())
        elif moment == "writing":
            ready = _writing(driver)
        elif moment == "generating":
            ready = driver.shards >= shards
        else:
            ready = now - began > 0.3
        ready = ready or now - began > 40
        if ready:
            fitting = [node for node in nursery.cluster.nodes if _victims(node, kind)]
            if fitting:
                return rng.choice(fitting)
        time.sleep(0.002 if moment == "writing" else 0.05)
    return None


def _victims(node: RayNode, kind: str) -> list[Any]:
    """Return the processes of which one is to be killed, or all for a node."""
    processes = node.processes()
    if not any(process.pid == node.raylet for process in processes):
        return []
    if kind.startswith("worker"):
        return node.workers()
    if kind == "helper":
        return [p for p in processes if p.parent == node.raylet and not p.title.startswith("ray::RayWorker")]
    return [p for p in processes if p.pid == node.raylet] if kind == "raylet" else processes


def _kill(node: RayNode, kind: str, rng: random.Random) -> None:
    victims = _victims(node, kind)
    chosen = victims if kind == "node" or not victims else [rng.choice(victims)]
    node.send(signal.SIGTERM if kind == "worker TERM" else signal.SIGKILL, chosen)


def as_folder(job: Job, count: int, rng: random.Random) -> dict[str, Any]:
    """Kill a job whose output is a folder of pictures."""
    options = ["--format", "folder"]
    ray_scenes.static(job, job.folder / "whole-folder", options)
    return kills(job, count, rng, options=options)


def in_object_store(job: Job, count: int, rng: random.Random) -> dict[str, Any]:
    """Kill workers of a job whose output is in an object store."""
    import fsspec

    from tests.batch.store import object_store

    with object_store("kill") as store:
        variables = {"STORAGE_EMULATOR_HOST": store.url, "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
        with job.cluster(2, variables) as cluster:
            driver = Driver(job, cluster, "gs://kill/out")
            killed = 0
            files = fsspec.filesystem("gs", skip_instance_cache=True, use_listings_cache=False)
            while driver.running:
                time.sleep(rng.uniform(1, 3))
                victims = [node for node in cluster.nodes if node.workers()]
                if killed < count and victims and (killed == 0 or len(files.glob("gs://kill/out/*.tar")) > 3):
                    rng.choice(victims).send(signal.SIGKILL, victims[0].workers())
                    killed += 1
            seconds = driver.end()
        local = job.folder / "from-store"
        files.get("gs://kill/out", str(local), recursive=True)
    job.check(local)
    assert killed == count
    return {"kills": killed, "seconds": seconds, "workers_and_lost": driver.workers}


SCENES: dict[str, Callable[[Job, int, random.Random], dict[str, Any]]] = {  # of a job and a number of kills
    "quiet": lambda job, count, rng: ray_scenes.quiet_job(job),
    "kills": kills,
    "stopped_node": lambda job, count, rng: ray_scenes.stopped(job, "node"),
    "stopped_worker": lambda job, count, rng: ray_scenes.stopped(job, "worker"),
    "stopped_while_loading": lambda job, count, rng: ray_scenes.stopped(job, "loading"),
    "joining": lambda job, count, rng: ray_scenes.joining(job),
    "driver_killed": lambda job, count, rng: ray_scenes.driver_killed(job, 8, rng),
    "twin_drivers": lambda job, count, rng: ray_scenes.twin_drivers(job),
    "terminated": lambda job, count, rng: ray_scenes.terminated(job),
    "unfit_hosts": lambda job, count, rng: ray_scenes.unfit_hosts(job),
    "unwritable": lambda job, count, rng: ray_scenes.unwritable(job),
    "full_disk": lambda job, count, rng: ray_scenes.full_disk(job),
    "vanished": lambda job, count, rng: ray_scenes.vanished(job),
    "folder": lambda job, count, rng: as_folder(job, 3, rng),
    "object_store": lambda job, count, rng: in_object_store(job, 2, rng),
}


def main() -> None:
    """Run the campaign and write its result."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1200)
    parser.add_argument("--rows-per-shard", type=int, default=16)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", nargs="+", choices=SCENES, metavar="SCENE", help=f"default: all of {', '.join(SCENES)}"
    )
    parser.add_argument("--print", action="store_true", help="print the result instead of writing it")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    options = ["-m", str(batch_kill.SHAPES_MODEL), *"--steps 5 --prior-steps 3 --batch 8 --dtype float32".split()]
    options += ["--rows-per-shard", str(arguments.rows_per_shard)]
    told = ["-m", str(batch_kill.SHAPES_MODEL.relative_to(ROOT)), *options[2:]]
    found: dict[str, Any] = {"rows": arguments.rows, "options": told, "seed": arguments.seed}
    path = ROOT / "tpu_scripts" / "results" / f"ray-kill-{datetime.date.today().isoformat()}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    found["scenes"] = known.get("scenes", {}) if known.items() >= found.items() else {}
    with tempfile.TemporaryDirectory() as scratch:
        job = open_job(Path(scratch), arguments.rows, options)
        for name in arguments.only or SCENES:
            result = SCENES[name](job, arguments.kills, random.Random(f"{arguments.seed} {name}"))
            print(name, json.dumps(result), flush=True)
            found["scenes"][name] = result
            if not arguments.print:
                path.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
