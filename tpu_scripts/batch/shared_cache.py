"""Cold processes of a batch job that share compiled programs at a URL, beside processes that do not.

Real `kandinsky-jax batch` processes on this machine, each with a cache folder of its own, stand for hosts; a local
object store stands for the bucket, and answers each request after `--latency`. In turns: all with one URL, and all
without. Then a single process: without a cache, with the filled URL, with the filled local folder. At last all with a
URL, of which one is killed (SIGKILL) while it compiles the largest program. What is compiled is counted by JAX's log.

Writes tpu_scripts/results/shared-cache-DATE.json.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import datetime
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.batch.store import FaultyStore, object_store  # noqa: E402

WORKER = Path(__file__).with_name("shared_cache_worker.py")
SHAPES_MODEL = ROOT / "tests" / "shapes_model"
LARGEST = "denoise_steps"  # part of the name of the program that takes longest to compile
EXAMPLE = """example:
  python tpu_scripts/batch/shared_cache.py --processes 4 --rounds 3

On two cores that takes about five minutes."""


@dataclasses.dataclass
class Host:
    """A process that stands for a host."""

    process: subprocess.Popen[str]
    began: float
    seconds: float = 0.0
    report: dict[str, Any] = dataclasses.field(default_factory=dict)
    errors: str = ""


@dataclasses.dataclass
class Hosts:
    """Processes of one job.

    Args:
        folder: for their outputs and caches.
        cache: the value of KANDINSKY_JAX_CACHE; None leaves each to its own folder.
        wait: the value of KANDINSKY_JAX_CACHE_WAIT.
    """

    folder: Path
    cache: str | None
    wait: float = 900.0

    def start(self, index: int, count: int, home: str | None = None) -> Host:
        """Start a process of the job, with an empty cache unless `home` names one that was used."""
        self.folder.mkdir(parents=True, exist_ok=True)
        prompts = self.folder / "prompts.txt"
        prompts.write_text("".join(f"a red circle number {i}\n" for i in range(2 * count)))
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("JAX_COMPILATION_CACHE")
        }
        environment |= {"XDG_CACHE_HOME": str(self.folder / (home or f"home-{index}")), "JAX_PLATFORMS": "cpu"}
        environment |= {"PYTHONPATH": str(ROOT), "KANDINSKY_JAX_CACHE_WAIT": str(self.wait)}
        environment |= {"PYTHONUNBUFFERED": "1"}
        environment.pop("KANDINSKY_JAX_CACHE", None)
        environment.pop("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", None)
        if self.cache is not None:
            environment["KANDINSKY_JAX_CACHE"] = self.cache
        options = f"--batch 1 --rows-per-shard 1 --steps 2 --prior-steps 2 -q --process {index} --processes {count}"
        command = [sys.executable, str(WORKER), "batch", str(prompts), "-o", str(self.folder / "output")]
        command += ["--model", str(SHAPES_MODEL), *options.split()]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return Host(subprocess.Popen(command, env=environment, **pipes), time.monotonic())


def finish(hosts: list[Host]) -> None:
    """Wait for processes, and fill in what they report."""

    def one(host: Host) -> None:
        output, host.errors = host.process.communicate()
        host.seconds = time.monotonic() - host.began
        if host.process.returncode == 0:
            host.report = json.loads(output.splitlines()[-1])

    threads = [threading.Thread(target=one, args=(host,)) for host in hosts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def compiled(hosts: list[Host]) -> collections.Counter[str]:
    """Return how often each program was compiled, over all processes that ended well."""
    return collections.Counter(key for host in hosts if host.report for key in host.report["missed"])


def figures(hosts: list[Host]) -> dict[str, Any]:
    """Summarise processes that have ended: time, CPU, programs."""
    for host in hosts:
        if host.process.returncode:
            sys.exit(f"a process has failed:\n{host.errors}")
    counts = compiled(hosts)
    return {
        "wall_seconds": round(max(host.seconds for host in hosts), 1),
        "cpu_seconds": round(sum(host.report["cpu_seconds"] for host in hosts), 1),
        "programs": len(counts | collections.Counter(key for host in hosts for key in host.report["hit"])),
        "compiled": sum(counts.values()),
        "compiled_more_than_once": sum(times > 1 for times in counts.values()),
        "asked_for": sum(host.report["requests"] for host in hosts),
    }


@contextlib.contextmanager
def counted(store: FaultyStore, latency: float) -> Iterator[collections.Counter[str]]:
    """Delay the requests to a store while the block runs, and count them."""
    requests: collections.Counter[str] = collections.Counter()

    def fault(method: str, path: str) -> None:
        requests[method] += 1
        time.sleep(latency)

    store.fault = fault
    yield requests
    store.heal()


def kill_while_compiling(bucket: str, prefix: str, host: Host) -> float:
    """Kill a process once it has claimed the largest program; return the moment, by `time.monotonic()`."""
    import fsspec

    fs = fsspec.filesystem("gs")
    while host.process.poll() is None:
        fs.invalidate_cache()
        if any("/claims/" in path and LARGEST in path for path in fs.find(f"{bucket}/{prefix}")):
            host.process.send_signal(signal.SIGKILL)
            return time.monotonic()
        time.sleep(0.02)
    sys.exit("the process was not seen to compile")


def dead_holder(folder: Path, url: str, count: int, wait: float) -> dict[str, Any]:
    """Kill a process while it compiles the largest program, and start the others, which find its claims."""
    job = Hosts(folder, url, wait)
    killed = job.start(0, count)
    bucket, _, prefix = url.removeprefix("gs://").partition("/")
    moment = kill_while_compiling(bucket, prefix, killed)
    others = [job.start(index, count) for index in range(1, count)]
    finish([killed, *others])
    found = figures(others)
    del found["wall_seconds"]
    after = max(host.began + host.seconds for host in others) - moment
    return {**found, "seconds_after_the_kill": round(after, 1), "bound": wait}


def measure(processes: int, rounds: int, latency: float, wait: float, say: Callable[[str], None]) -> dict[str, Any]:
    """Run all of it."""
    found: dict[str, Any] = {"shared": [], "alone": [], "warm": {}}
    with tempfile.TemporaryDirectory() as scratch, object_store("bucket") as store:
        folder = Path(scratch)
        for number in range(rounds):
            for name in ("shared", "alone") if number % 2 == 0 else ("alone", "shared"):
                url = f"gs://bucket/round-{number}" if name == "shared" else None
                job = Hosts(folder / f"{name}-{number}", url)
                with counted(store, latency) as requests:
                    hosts = [job.start(index, processes) for index in range(processes)]
                    finish(hosts)
                    found[name].append(figures(hosts) | ({"requests": sum(requests.values())} if url else {}))
                say(f"{name}: {found[name][-1]}")
        url = "gs://bucket/round-0"
        for name, cache, home in (
            ("no cache", "off", "none"),
            ("filled URL", url, "fresh"),
            ("filled folder", url, "fresh"),
            ("empty URL", "gs://bucket/alone", "alone"),
            ("empty folder", None, "folder"),
        ):
            with counted(store, latency) as requests:
                host = Hosts(folder / f"warm-{len(found['warm'])}", cache).start(0, 1, str(folder / home))
                finish([host])
                found["warm"][name] = figures([host]) | {"requests": sum(requests.values())}
            say(f"{name}: {found['warm'][name]}")
        found["dead_holder"] = dead_holder(folder / "dead", "gs://bucket/dead", processes, wait)
        say(f"dead holder: {found['dead_holder']}")
    for name in ("shared", "alone"):
        for figure in ("wall_seconds", "cpu_seconds"):
            found[f"{name}_{figure}"] = statistics.median(one[figure] for one in found[name])
    return found


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--latency", type=float, default=0.03, help="seconds before the store answers; default: 0.03")
    parser.add_argument("--wait", type=float, default=120.0, help="the bound after a kill, in seconds; default: 120")
    parser.add_argument("--print", action="store_true", help="print what was found instead of writing it")
    arguments = parser.parse_args()
    found = measure(arguments.processes, arguments.rounds, arguments.latency, arguments.wait, print)
    options = {name: value for name, value in vars(arguments).items() if name != "print"}
    found = {**options, "cores": os.cpu_count(), "jax": jax.__version__, "python": platform.python_version(), **found}
    if not arguments.print:
        path = ROOT / "tpu_scripts" / "results" / f"shared-cache-{datetime.date.today().isoformat()}.json"
        path.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
