"""Overhead of a batch job: overlap on and off, one process and two, memory and open files over many rows.

Pictures of the small model are quick to generate, so that the rest weighs more than it ever will with a large one. All
runs generate the same job; they take turns, and medians are reported. "waited" is the share of the time in which the
main thread was not generating, so that the device was idle.

Writes tpu_scripts/results/batch-throughput-DATE.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tpu_scripts.batch.batch_kill import SHAPES_MODEL, write_rows  # noqa: E402

EXAMPLE = """example:
  python tpu_scripts/batch/batch_throughput.py --rows 400 --rounds 5 --long 10000

On two cores that takes about 20 minutes, the last 10,000 rows half of it. Nothing else should run meanwhile."""


def run(folder: Path, output: str, options: list[str], watch: list[tuple[int, int]] | None = None) -> dict[str, float]:
    """Run one process; return the images, seconds and idle fraction that it reports."""
    command = [sys.executable, "-m", "kandinsky_jax.cli", "batch", "rows.jsonl", "-o", output, "--quiet"]
    command += ["-m", str(SHAPES_MODEL)]
    process = subprocess.Popen(
        [*command, *options],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    if watch is not None:
        threading.Thread(target=_watch, args=(process, watch), daemon=True).start()
    text, _ = process.communicate()
    found = re.search(r"(\d+) images in \d+ shards, ([\d.]+) s.*waited ([\d.]+)%", text)
    if process.returncode or found is None:
        sys.exit(text[-3000:])
    return {"images": int(found[1]), "seconds": float(found[2]), "waited": float(found[3]) / 100}


def _watch(process: subprocess.Popen[str], watch: list[tuple[int, int]]) -> None:
    """Record resident bytes and open files of a process, every second (Linux)."""
    proc = Path(f"/proc/{process.pid}")
    while process.poll() is None:
        try:
            pages = int((proc / "statm").read_text().split()[1])
            watch.append((pages * os.sysconf("SC_PAGE_SIZE"), len(list((proc / "fd").iterdir()))))
        except OSError:
            return
        time.sleep(1)


def pair(folder: Path, name: str, options: list[str]) -> float:
    """Run two processes at once; return the images per second of both, from the first start to the last end."""
    results: list[dict[str, float]] = []
    threads = [
        threading.Thread(
            target=lambda i=i: results.append(run(folder, name, [*options, "--process", str(i), "--processes", "2"]))
        )
        for i in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(result["images"] for result in results) / max(result["seconds"] for result in results)


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--long", type=int, default=10000, help="rows of the run whose memory is watched; 0 for none")
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_args()
    options = ["--batch", "8", "--rows-per-shard", "40", "--dtype", "float32", "--prior-steps", "5"]
    options += ["--steps", str(arguments.steps)]
    kinds = {
        "overlap": ["--overlap"],
        "no overlap": ["--no-overlap"],
        "overlap, webp": ["--overlap", "--pictures", "webp"],
        "no overlap, webp": ["--no-overlap", "--pictures", "webp"],
    }
    found: dict[str, Any] = {"rows": arguments.rows, "cores": len(os.sched_getaffinity(0)), "options": options}
    rates: dict[str, list[float]] = {name: [] for name in [*kinds, "two processes"]}
    waits: dict[str, list[float]] = {name: [] for name in kinds}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_rows(folder, arguments.rows)
        run(folder, "warm", options)
        for i in range(arguments.rounds):
            for name, extra in kinds.items():
                result = run(folder, f"{name}-{i}", [*options, *extra])
                rates[name].append(result["images"] / result["seconds"])
                waits[name].append(result["waited"])
            rates["two processes"].append(pair(folder, f"two-{i}", options))
            print({name: [round(x, 2) for x in values] for name, values in rates.items()}, flush=True)
        found["images_per_second"] = {name: statistics.median(values) for name, values in rates.items()}
        found["waited"] = {name: statistics.median(values) for name, values in waits.items()}
        found["all"] = {"images_per_second": rates, "waited": waits}
        if arguments.long:
            write_rows(folder, arguments.long)
            watch: list[tuple[int, int]] = []
            quick = [
                "--batch",
                "8",
                "--rows-per-shard",
                "100",
                "--dtype",
                "float32",
                "--steps",
                "2",
                "--prior-steps",
                "2",
            ]
            found["long"] = {"rows": arguments.long, **run(folder, "long", quick, watch)} | _flat(watch)
    print(json.dumps({k: v for k, v in found.items() if k != "all"}, indent=2))
    path = ROOT / "tpu_scripts" / "results" / f"batch-throughput-{datetime.date.today().isoformat()}.json"
    path.write_text(json.dumps(found, indent=2) + "\n")


def _flat(watch: list[tuple[int, int]]) -> dict[str, Any]:
    """Return memory and open files in tenths of the run, the first of which is loading and compiling."""
    size = max(1, len(watch) // 10)
    parts = [watch[i : i + size] for i in range(0, len(watch), size)]
    return {
        "peak_megabytes": [round(max(memory for memory, _ in part) / 2**20) for part in parts],
        "most_open_files": [max(files for _, files in part) for part in parts],
    }


if __name__ == "__main__":
    main()
