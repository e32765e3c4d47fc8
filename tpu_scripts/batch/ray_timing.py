"""What the Ray engine brings and costs, beside static processes.

    makespan    four workers, one of which takes ten times as long for each shard (a seeded delay, which outweighs the
                generating): the time to the last shard against the ideal, all shards' delays / the sum of the rates
    overhead    two workers on the two nodes of a cluster against two static processes, in turns: the time from the
                first shard's file to the last one's, the time in which they generate, as they say themselves (static
                processes count from when each of them is ready, Ray from when the first worker is), and the whole
                time of the commands with start-up. On a machine of two cores it includes what Ray's own processes take
                from the workers, which is measured too. Ray gathers no statistics about itself, as in the cluster that
                `--engine ray` starts by itself; with --ray-statistics it does

Writes tpu_scripts/results/ray-timing-DATE.json.
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
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tpu_scripts.batch.batch_kill import SHAPES_MODEL, contents, write_rows  # noqa: E402
from tpu_scripts.batch.ray_cluster import RayCluster  # noqa: E402
from tpu_scripts.batch.slow_worker import delay_of  # noqa: E402

EXAMPLE = """examples:
  python tpu_scripts/batch/ray_timing.py makespan --shards 60 --delay 2
  python tpu_scripts/batch/ray_timing.py overhead --pairs 9 --rows 2400

On two cores that takes about ten minutes each. Nothing else should run meanwhile, least of all during the second."""
WORKERS, SLOWNESS = 4, 10.0
ROWS_PER_SHARD = 4


def start(folder: Path, output: str, options: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    """Start a process of the job."""
    command = [sys.executable, "-m", "tpu_scripts.batch.slow_worker", "batch", "rows.jsonl", "-o", output, "--quiet"]
    command += ["-m", str(SHAPES_MODEL), "--dtype", "float32", *options]
    environment = environment | {"PYTHONPATH": str(ROOT), "KANDINSKY_JAX_CACHE": str(folder / "compiled")}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def seconds_of(process: subprocess.Popen[str]) -> float:
    """Wait for a process; return the seconds of generating that it reports."""
    text, _ = process.communicate(timeout=3600)
    found = re.search(r"images in \d+ shards, ([\d.]+) s", text)
    if process.returncode or found is None:
        sys.exit(text[-3000:])
    return float(found[1])


def static(folder: Path, output: str, options: list[str], each: list[dict[str, str]]) -> tuple[float, float]:
    """Run one static process for each environment; return their longest time, and that of the commands."""
    began = time.perf_counter()
    count = str(len(each))
    processes = [
        start(folder, output, [*options, "--process", str(i), "--processes", count], os.environ | variables)
        for i, variables in enumerate(each)
    ]
    longest = max([seconds_of(process) for process in processes])
    return longest, time.perf_counter() - began


def on_ray(cluster: RayCluster, folder: Path, output: str, options: list[str]) -> tuple[float, float]:
    """Run the job on a cluster; return the seconds from the first worker that was ready, and those of the command."""
    began = time.perf_counter()
    engine = ["--engine", "ray", "--address", cluster.address]
    seconds = seconds_of(start(folder, output, [*options, *engine], cluster.environment()))
    return seconds, time.perf_counter() - began


def span(output: Path) -> float:
    """Return the seconds from the first shard's file to the last one's."""
    times = [path.stat().st_mtime for path in output.glob("*.tar")]
    return max(times) - min(times)


def makespan(folder: Path, shards: int, mean: float) -> dict[str, Any]:
    """Measure four workers, one of them slow, on Ray and static."""
    options = f"--steps 2 --prior-steps 2 --batch 4 --rows-per-shard {ROWS_PER_SHARD}".split()
    write_rows(folder, shards * ROWS_PER_SHARD)
    paces = [1.0] * (WORKERS - 1) + [SLOWNESS]
    each = [{"KANDINSKY_DELAY": str(mean), "KANDINSKY_SLOWNESS": str(pace)} for pace in paces]
    seconds_of(start(folder, "warm", options, dict(os.environ)))
    with RayCluster() as cluster:
        for variables in each:
            cluster.add(environment={"KANDINSKY_JAX_CACHE": str(folder / "compiled")} | variables)
        stealing, stealing_command = on_ray(cluster, folder, "stolen", options)
    fixed, fixed_command = static(folder, "static", options, each)
    assert contents(folder / "stolen") == contents(folder / "static") == contents(folder / "warm"), "bytes differ"
    ideal = sum(delay_of(shard, mean) for shard in range(shards)) / sum(1 / pace for pace in paces)
    return {
        "shards": shards,
        "mean_delay": mean,
        "slowness": paces,
        "ideal_seconds": ideal,
        "ray": {"seconds": stealing, "of_ideal": stealing / ideal, "command_seconds": stealing_command},
        "static": {"seconds": fixed, "of_ideal": fixed / ideal, "command_seconds": fixed_command},
    }


def overhead(folder: Path, pairs: int, rows: int, steps: int, own_statistics: bool) -> dict[str, Any]:
    """Measure two workers on Ray and two static processes in turns; which is first alternates."""
    environment = {"KANDINSKY_JAX_CACHE": str(folder / "compiled")}
    options = f"--steps {steps} --prior-steps 5 --batch 8 --rows-per-shard 24".split()
    write_rows(folder, rows)
    seconds_of(start(folder, "warm", options, dict(os.environ)))
    times: dict[str, list[tuple[float, float]]] = {"ray": [], "static": []}
    spans: dict[str, list[float]] = {"ray": [], "static": []}
    services: list[float] = []  # cores that Ray's own processes used
    for i in range(pairs):
        for kind in ("ray", "static") if i % 2 else ("static", "ray"):
            output = f"{kind}-{i}"
            if kind == "static":
                times[kind].append(static(folder, output, options, [{}, {}]))
            else:
                with RayCluster(environment=environment, head_cpus=1, statistics=own_statistics) as cluster:
                    cluster.add()
                    before = cluster.seconds_of_services()
                    times[kind].append(on_ray(cluster, folder, output, options))
                    services.append((cluster.seconds_of_services() - before) / times[kind][-1][1])
            spans[kind].append(span(folder / output))
            assert contents(folder / output) == contents(folder / "warm"), "bytes differ"
        print(spans)
        print({kind: [[round(x, 2) for x in pair] for pair in found] for kind, found in times.items()}, flush=True)
    ratios = [ray[0] / static[0] for ray, static in zip(times["ray"], times["static"], strict=True)]
    span_ratios = [ray / static for ray, static in zip(spans["ray"], spans["static"], strict=True)]
    return {
        "rows": rows,
        "options": options,
        "spans": spans,
        "span_ratios": span_ratios,
        "median_span_ratio": statistics.median(span_ratios),
        "seconds": {kind: [found[0] for found in all_found] for kind, all_found in times.items()},
        "command_seconds": {kind: [found[1] for found in all_found] for kind, all_found in times.items()},
        "ratios": ratios,
        "median_ratio": statistics.median(ratios),
        "quartiles": statistics.quantiles(ratios, n=4),
        "cores_of_ray_itself": statistics.median(services),
        "median_seconds_more_of_the_command": statistics.median(
            ray[1] - static[1] for ray, static in zip(times["ray"], times["static"], strict=True)
        ),
    }


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("makespan", "overhead"))
    parser.add_argument("--shards", type=int, default=60, help="of the makespan")
    parser.add_argument("--delay", type=float, default=2.0, help="mean seconds of a shard, for the makespan")
    parser.add_argument("--pairs", type=int, default=9, help="of the overhead")
    parser.add_argument("--rows", type=int, default=2400, help="of the overhead")
    parser.add_argument("--steps", type=int, default=10, help="of the overhead")
    parser.add_argument(
        "--ray-statistics", action="store_true", help="of the overhead: Ray gathers statistics about itself"
    )
    arguments = parser.parse_args()
    if arguments.ray_statistics and arguments.what != "overhead":
        parser.error("--ray-statistics is for the overhead")
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.what == "makespan":
            found = makespan(Path(scratch), arguments.shards, arguments.delay)
        else:
            found = overhead(Path(scratch), arguments.pairs, arguments.rows, arguments.steps, arguments.ray_statistics)
    print(json.dumps(found, indent=2))
    path = ROOT / "tpu_scripts" / "results" / f"ray-timing-{datetime.date.today().isoformat()}.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    name = f"{arguments.what} with Ray's statistics" if arguments.ray_statistics else arguments.what
    path.write_text(json.dumps(before | {"cores": os.cpu_count(), name: found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
