"""Cost of planning a batch job: memory above the idle process, and time compared with the format's library.

Each file is planned (`open_job`: rows counted, ids compared, SHA-256) and read to its end by json, csv or pyarrow, in
turns, each in a process of its own. Then all of its rows are read slice by slice, as a job does. "memory" is the peak
of the resident memory above that of the process which has only imported kandinsky_jax.batch; importing pyarrow counts
there, and in no time. "cpu_ratio" compares the processors' time, which a busy machine stretches less.

Writes tpu_scripts/results/batch-planning-DATE.json.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WORDS = "red blue green cat dog house forest oil painting of a in the style old photo bright night rain café “quoted”"
# By name: the ending, and rows of a row group where it is Parquet.
LAYOUTS: dict[str, tuple[str, int | None]] = {
    "jsonl": ("jsonl", None),
    "jsonl without ids": ("jsonl", None),
    "csv": ("csv", None),
    "csv with line breaks": ("csv", None),
    "parquet, groups of 520": ("parquet", 520),
    "parquet, groups of 65536": ("parquet", 65536),
    "parquet, one group": ("parquet", 2**40),
    "parquet without ids": ("parquet", 2**20),
}
EXAMPLE = """example:
  python tpu_scripts/batch/batch_planning.py --rows 1000000 --rounds 3

On two cores that takes about 5 minutes."""

# What one process measures: idle memory, its work, peak memory.
PROGRAM = """
import importlib.util, json, resource, sys, time
from kandinsky_jax.batch import Job, open_job
what, path = sys.argv[1:]
if importlib.util.find_spec("pandas"):
    import pandas  # by pyarrow's compute functions, where it is installed; not a part of planning
idle = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
if path.endswith("parquet"):
    import pyarrow.parquet
began, used = time.perf_counter(), time.process_time()
if what == "plan":
    count = open_job(Job(path, path + ".out", model="tiny", mode="generate")).rows.count
elif what == "slices":
    rows = open_job(Job(path, path + ".out", model="tiny", mode="generate")).rows
    began, used = time.perf_counter(), time.process_time()
    count = sum(1 for first in range(0, rows.count, 256) for row in rows.read(first, 256) if not row.fault)
elif path.endswith("jsonl"):
    with open(path, encoding="utf-8") as file:
        count = sum(1 for line in file if json.loads(line))
elif path.endswith("csv"):
    import csv
    with open(path, encoding="utf-8", newline="") as file:
        count = sum(1 for cells in csv.reader(file)) - 1
else:
    with open(path, "rb") as file:
        count = sum(len(batch) for batch in pyarrow.parquet.ParquetFile(file).iter_batches())
seconds, cpu = time.perf_counter() - began, time.process_time() - used
status = open("/proc/self/status").read()  # getrusage's maximum is inherited from the process that started this one
peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
print(json.dumps({"count": count, "seconds": seconds, "cpu": cpu, "memory": max(0, peak - idle)}))
"""


def rows_of(name: str, count: int) -> Iterator[dict[str, Any]]:
    """Return rows of a layout, the same in every run."""
    rng, words = random.Random(0), WORDS.split()
    for i in range(count):
        prompt = ("\n" if "breaks" in name and i % 3 == 0 else " ").join(rng.choices(words, k=12))
        row = {"prompt": prompt, "seed": i}
        yield row if "without" in name else {"id": f"row-{i:07d}"} | row


def write(folder: Path, name: str, count: int) -> Path:
    """Write a file of `count` rows in one of `LAYOUTS`."""
    ending, group = LAYOUTS[name]
    path = folder / f"rows.{ending}"
    if ending == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(list(rows_of(name, count))), path, row_group_size=group)
        return path
    with path.open("w", encoding="utf-8", newline="") as file:
        if ending == "jsonl":
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows_of(name, count))
        else:
            writer = csv.DictWriter(file, ["id", "prompt", "seed"])
            writer.writeheader()
            writer.writerows(rows_of(name, count))
    return path


def measure(what: str, path: Path) -> dict[str, float]:
    """Count, seconds, processor seconds and bytes of a process that plans, reads slices, or reads by the library."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", PROGRAM, what, str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return json.loads(done.stdout)


def compare(name: str, count: int, rounds: int) -> dict[str, float]:
    """One layout's figures: medians of the times, the largest memory."""
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), name, count)
        found: dict[str, list[dict[str, float]]] = {"library": [], "plan": [], "slices": []}
        for what in ("library", "plan") * rounds + ("slices",):
            found[what].append(measure(what, path))
            assert found[what][-1]["count"] == count, (name, what, found[what])
        size = path.stat().st_size
    times = {what: [run["seconds"] for run in runs] for what, runs in found.items()}
    ratios = [ours / theirs for ours, theirs in zip(times["plan"], times["library"], strict=True)]
    return {
        "rows": count,
        "file_mb": size / 1e6,
        "plan_seconds": statistics.median(times["plan"]),
        "library_seconds": statistics.median(times["library"]),
        "ratio": statistics.median(ratios),
        "cpu_ratio": min(run["cpu"] for run in found["plan"]) / min(run["cpu"] for run in found["library"]),
        "plan_memory_mb": max(run["memory"] for run in found["plan"]) / 1e6,
        "slices_seconds": times["slices"][0],
        "slices_memory_mb": found["slices"][0]["memory"] / 1e6,
    }


def main() -> None:
    """Measure every layout and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    found = {}
    for name in LAYOUTS:
        found[name] = compare(name, arguments.rows, arguments.rounds)
        print(name, json.dumps({key: round(value, 3) for key, value in found[name].items()}), flush=True)
    date = datetime.date.today().isoformat()
    result = {"date": date, "cores": os.cpu_count(), "rounds": arguments.rounds, "layouts": found}
    target = ROOT / "tpu_scripts" / "results" / f"batch-planning-{date}.json"
    target.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
