"""Kills a batch job repeatedly, and checks that its pictures are those of an uninterrupted run.

Real processes on this machine, as many as asked for; each kill is SIGKILL at a random moment, of one process or of
all, and what was killed is started again. In the end every id is there once, with the same bytes, and no temporary
file. With --distributed the processes join by jax.distributed over loopback: as on a TPU slice, all of them start
together, so after a kill the others are told to end (SIGTERM) before all are started again. With --twins all of them
have the same index, as a pod that is started again while its twin still runs, and some are stopped (SIGSTOP) for a
while instead of killed.

Writes tpu_scripts/results/batch-kill-DATE.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SHAPES_MODEL = ROOT / "tests" / "shapes_model"
COLOURS, SHAPES = ("red", "green", "blue", "yellow", "purple", "orange"), ("circle", "square", "star", "cross", "ring")
EXAMPLE = """example:
  python tpu_scripts/batch/batch_kill.py --rows 2000 --kills 20 --processes 2 4

The whole takes about ten minutes for each number of processes on two cores."""


class Cluster:
    """The processes of a job.

    Args:
        folder: holds `rows.jsonl`.
        output: the job's folder.
        processes: how many.
        options: of `kandinsky-jax batch`.
        distributed: whether they join by jax.distributed.
        twins: whether all of them are process 0 of 1.
    """

    def __init__(
        self,
        folder: Path,
        output: Path,
        processes: int,
        options: list[str],
        distributed: bool = False,
        twins: bool = False,
    ):
        self.folder, self.output, self.count = folder, output, processes
        self.options, self.distributed, self.twins = options, distributed, twins
        self.running: dict[int, subprocess.Popen[str]] = {}
        self.address = ""

    def start(self, which: list[int] | None = None) -> None:
        """Start processes: some, or all together."""
        if which is None and self.distributed:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                self.address = f"127.0.0.1:{free.getsockname()[1]}"
        for i in range(self.count) if which is None else which:
            command = [
                sys.executable,
                "-m",
                "kandinsky_jax.cli",
                "batch",
                "rows.jsonl",
                "-o",
                str(self.output),
                "--quiet",
            ]
            index, count = (0, 1) if self.twins else (i, self.count)
            command += [*self.options, "--process", str(index), "--processes", str(count)]
            command += ["--coordinator", self.address] if self.distributed else []
            with (self.folder / f"log-{i}.txt").open("a") as log:
                self.running[i] = subprocess.Popen(
                    command,
                    cwd=self.folder,
                    stdout=log,
                    stderr=log,
                    text=True,
                    env=os.environ | {"PYTHONPATH": str(ROOT)},
                )

    def kill(self, which: list[int]) -> None:
        """SIGKILL."""
        for i in which:
            self.running[i].kill()
            self.running[i].wait()

    def again(self, killed: list[int]) -> None:
        """Start killed processes again, or all of them if they have to start together."""
        if not self.distributed:
            self.start(killed)
            return
        for process in self.running.values():
            process.terminate()
        self.wait()
        self.start()

    def wait(self, seconds: float = 1800) -> list[int]:
        """Wait until all have ended; return their exit codes."""
        return [process.wait(seconds) for process in self.running.values()]

    def busy(self) -> list[int]:
        """Return processes that are still running."""
        return [i for i, process in self.running.items() if process.poll() is None]


def write_rows(folder: Path, count: int) -> None:
    """Return rows of colours and shapes."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "rows.jsonl").open("w") as file:
        for i in range(count):
            text = f"a {COLOURS[i % 6]} {SHAPES[i % 5]} on a {COLOURS[(i // 30 + i + 1) % 6]} background"
            file.write(json.dumps({"id": f"picture-{i}", "prompt": text}) + "\n")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def ids(folder: Path) -> list[str]:
    """Return the content of the tar files, in order."""
    found = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            found += [name.removesuffix(".png") for name in tar.getnames() if name.endswith(".png")]
    return found


def undisturbed(folder: Path, options: list[str]) -> float:
    """Run the job uninterrupted in one process; return its seconds."""
    cluster = Cluster(folder, folder / "whole", 1, options)
    began = time.perf_counter()
    cluster.start()
    if cluster.wait() != [0]:
        sys.exit((folder / "log-0.txt").read_text()[-3000:])
    return time.perf_counter() - began


def disturbed(
    folder: Path,
    rows: int,
    processes: int,
    kills: int,
    options: list[str],
    distributed: bool,
    rng: random.Random,
    twins: bool = False,
) -> dict[str, Any]:
    """Kill the job, start it again, and compare; a job that is complete before the last kill begins anew."""
    whole, wanted = contents(folder / "whole"), [f"picture-{i}" for i in range(rows)]
    found: dict[str, Any] = {"processes": processes, "distributed": distributed, "kills": 0, "of_all": 0, "jobs": 0}
    found |= {"while_writing": 0, "shards_when_killed": []} | ({"twins": True, "stopped": 0} if twins else {})
    while found["kills"] < kills or not found["jobs"]:
        output = folder / f"out-{processes}-{distributed}-{twins}-{found['jobs']}"
        cluster = Cluster(folder, output, processes, options, distributed, twins)
        cluster.start()
        while found["kills"] < kills:
            _pause(cluster, output, rng)
            busy = cluster.busy()
            failed = [i for i, process in cluster.running.items() if process.poll() not in (None, 0)]
            assert not failed, [(folder / f"log-{i}.txt").read_text()[-2000:] for i in failed]
            if not busy:
                break
            if twins and rng.random() < 0.4:
                stopped = cluster.running[rng.choice(busy)]
                stopped.send_signal(signal.SIGSTOP)
                found["stopped"] += 1
                _pause(cluster, output, rng)
                stopped.send_signal(signal.SIGCONT)
                continue
            killed = busy if rng.random() < 0.3 else [rng.choice(busy)]
            cluster.kill(killed)
            found["kills"] += 1
            found["of_all"] += len(killed) == len(busy)
            found["while_writing"] += any(output.glob(".*.partial"))
            found["shards_when_killed"].append(len(list(output.glob("*.tar"))))
            print(
                f"kill {found['kills']}: {len(killed)} of {len(busy)}, {found['shards_when_killed'][-1]} shards",
                flush=True,
            )
            cluster.again(killed)
        codes = cluster.wait()
        assert set(codes) == {0}, (codes, [(folder / f"log-{i}.txt").read_text()[-2000:] for i in range(processes)])
        found["jobs"] += 1
        assert ids(output) == wanted, "an id is missing, or there twice"
        assert contents(output) == whole, "bytes differ"
        assert not list(output.rglob(".*")), "a temporary file is left"
    return found


def _pause(cluster: Cluster, output: Path, rng: random.Random) -> None:
    """Wait until a random moment: while processes start, generate, or write."""
    kind, deadline = rng.random(), time.monotonic() + rng.uniform(1, 25)
    while time.monotonic() < deadline and cluster.busy():
        if kind < 0.3 and any(output.glob(".*.partial")):
            return
        time.sleep(0.002)


def main() -> None:
    """Run the campaign and write its result."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=20, help="for each number of processes")
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rows-per-shard", type=int, default=40)
    parser.add_argument("--distributed", choices=("yes", "no", "both"), default="both", help="join by jax.distributed")
    parser.add_argument("--twins", action="store_true", help="all have the same index; without jax.distributed")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    options = [
        "-m",
        str(SHAPES_MODEL),
        "--steps",
        str(arguments.steps),
        "--prior-steps",
        "3",
        "--batch",
        "8",
        "--dtype",
        "float32",
    ]
    options += ["--rows-per-shard", str(arguments.rows_per_shard)]
    told = ["-m", str(SHAPES_MODEL.relative_to(ROOT)), *options[2:]]
    found: dict[str, Any] = {"rows": arguments.rows, "options": told, "runs": []}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_rows(folder, arguments.rows)
        found["seconds_undisturbed"] = round(undisturbed(folder, options), 1)
        print(f"undisturbed: {found['seconds_undisturbed']} s", flush=True)
        for processes in arguments.processes:
            joined = "no" if arguments.twins else arguments.distributed
            for distributed in {"yes": [True], "no": [False], "both": [False, True]}[joined]:
                rng = random.Random(arguments.seed + processes + 100 * distributed)
                kills = arguments.kills
                result = disturbed(folder, arguments.rows, processes, kills, options, distributed, rng, arguments.twins)
                print(json.dumps(result), flush=True)
                found["runs"].append(result)
    kind = "batch-kill-twins" if arguments.twins else "batch-kill"
    path = ROOT / "tpu_scripts" / "results" / f"{kind}-{datetime.date.today().isoformat()}.json"
    path.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
