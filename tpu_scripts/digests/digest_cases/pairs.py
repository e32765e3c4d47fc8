"""Times of calls, of an older checkout and of this one in turns: ratios of pairs, each of two neighbours in time.

Each checkout has a process that stays warm, and answers the name of a call with how long it took. Training steps and
batch jobs run through the command line, where only what comes after the first step or shard counts.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from digest_cases import batch_jobs, inputs, training
from digest_cases.interrupted import START

LEAST_ROUNDS = 7
WARM = ("text2img", "text2img, four images", "img2img", "inpaint decoder", "prior", "prior, four images")
Times = tuple[float, float]  # seconds: on the clock, of the processor


def main(options: argparse.Namespace, environment: Callable[[Path], dict[str, str]]) -> int:
    """Print medians and ratios; the exit status."""
    rounds = max(options.rounds, LEAST_ROUNDS)
    calls = [name for name in (*WARM, *COMMANDS) if options.only in name]
    sides = {"old": options.old.resolve(), "new": options.checkout}
    variables = {side: environment(path) for side, path in sides.items()}
    for given in variables.values():
        given["XLA_FLAGS"] = ""  # as users run it
    workers = {side: _worker(given) for side, given in variables.items() if any(name in WARM for name in calls)}
    slow = []
    try:
        for name in tqdm(calls, unit="call"):
            pairs: dict[str, list[Times]] = {"old": [], "new": []}
            for i in range(rounds + 1):
                for side in ("old", "new") if i % 2 else ("new", "old"):
                    taken = _asked(workers[side], name) if name in WARM else COMMANDS[name](variables[side])
                    if i or name not in WARM:  # the first call of a worker compiles
                        pairs[side].append(taken)
            ratio = _report(name, pairs, int(options.cpu))
            if ratio > options.limit:
                slow.append(name)
    finally:
        for worker in workers.values():
            worker.terminate()
    print(f"slower by more than {options.limit - 1:.0%}: {', '.join(slow)}" if slow else "no call is slower")
    return int(bool(slow))


def _report(name: str, pairs: dict[str, list[Times]], kind: int) -> float:
    """Print a line; the median ratio of one kind of time."""
    ratios = [
        statistics.median(new[k] / old[k] for old, new in zip(pairs["old"], pairs["new"], strict=True)) for k in (0, 1)
    ]
    old, new = (statistics.median(times[kind] for times in pairs[side]) for side in ("old", "new"))
    tqdm.write(
        f"{name}: old {old:.4f} s, new {new:.4f} s; median ratio of {len(pairs['old'])} pairs: "
        f"clock {ratios[0]:.3f}, processor {ratios[1]:.3f}"
    )
    return ratios[kind]


def _worker(environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "digest_cases.pairs_worker"],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def _asked(worker: subprocess.Popen[str], name: str) -> Times:
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write(name + "\n")
    worker.stdin.flush()
    answer = worker.stdout.readline()
    if not answer:
        raise RuntimeError(f"the process that times calls ended at {name!r}")
    clock, processor = json.loads(answer)
    return clock, processor


def _command(folder: Path, arguments: list[str], environment: dict[str, str]) -> float:
    """Run the command line; seconds of the processor."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", START, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{arguments[0]} ended with {done.returncode}: {done.stderr[-500:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _training_step(kind: str) -> Callable[[dict[str, str]], Times]:
    def run(environment: dict[str, str]) -> Times:
        with tempfile.TemporaryDirectory(prefix="digests-") as scratch:
            folder = Path(scratch)
            (folder / "models").symlink_to(inputs.SHAPES_MODEL, target_is_directory=True)
            inputs.training_data(folder / "data")
            training.write_config(folder, training.DECODER, {}, {"max_train_steps": 40})
            processor = _command(folder, ["train", kind, "run.toml", "--quiet"], environment)
            lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
            rates: list[Any] = [json.loads(line)["images_per_second"] for line in lines[2:]]
            return training.SAME["train_batch_size"] / statistics.median(rates), processor

    return run


def _batch_row(environment: dict[str, str]) -> Times:
    with tempfile.TemporaryDirectory(prefix="digests-") as scratch:
        folder = Path(scratch)
        (folder / "models").symlink_to(inputs.SHAPES_MODEL, target_is_directory=True)
        batch_jobs.write_job(folder, "text2img", 60)
        arguments = batch_jobs.command("text2img", ["--batch", "2", "--rows-per-shard", "6"])
        processor = _command(folder, arguments, environment)
        times = sorted(path.stat().st_mtime_ns for path in (folder / "out").glob("*.tar"))
        return (times[-1] - times[0]) / 1e9 / (len(times) - 1) / 6, processor


COMMANDS: dict[str, Callable[[dict[str, str]], Times]] = {
    "training step, prior": _training_step("prior"),
    "training step, lora-decoder": _training_step("lora-decoder"),
    "row of a batch job": _batch_row,
}
