"""Runs two processes with the same index on the same job, kills and suspends them, and checks every shard.

As a pod that is started again while its twin still runs. The processes are real and share a folder; their pictures are
prepared, so that they write most of the time. Each run is one of these, at a random moment:

    undisturbed    nothing happens to either
    kill           SIGKILL to one, which is started again
    kill both      SIGKILL to both, one is started again
    stop           SIGSTOP to one, often in the middle of a write; its twin finishes the job; SIGCONT
    stop and kill  SIGSTOP to one, its twin finishes the job, SIGKILL

Whatever has a shard's name must be that shard, at every kill and at the end; every process that was not killed must end
with 0; and when the job is started once more, nothing but the job's files is left.

Writes tpu_scripts/results/batch-twins-DATE.json. (Real jobs under the same: batch_kill.py --twins.)
"""

from __future__ import annotations

import argparse
import collections
import datetime
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

from kandinsky_jax.batch.shards import OUTPUT_FORMATS, GeneratedImage, Output

ROOT = Path(__file__).resolve().parents[2]
SHARDS = 6
CASES = ("undisturbed", "kill", "kill", "kill both", "stop", "stop", "stop and kill")
EXAMPLE = """example:
  python tpu_scripts/batch/batch_twins.py --runs 200

The 200 runs take about two minutes on two cores."""


def pictures(shard: int) -> list[GeneratedImage]:
    """Return the pictures of a shard, the same in every process."""
    rng = random.Random(shard)
    return [
        GeneratedImage(f"p{shard}-{i}", rng.randbytes(rng.randrange(1, 100_000)), {"id": f"p{shard}-{i}", "seed": i})
        for i in range(5)
    ]


def errors(shard: int) -> list[dict[str, Any]]:
    """Return the rows of a shard that could not be generated."""
    return [{"row": shard, "id": None, "error": "prompt is missing or empty"}] if shard % 2 else []


def job(folder: Path, form: str, seed: int) -> None:
    """Write a job's folder as `kandinsky_jax.batch.run` does, with a short sleep instead of generating."""
    rng, output = random.Random(seed), Output(str(folder), form, "png")
    output.begin({"seed": 0})
    done = output.complete(SHARDS)
    left = [shard for shard in range(SHARDS) if shard not in done]
    output.sweep()
    for shard in left:
        if not output.is_complete(shard):
            time.sleep(rng.uniform(0, 0.004))
            output.write(shard, pictures(shard), errors(shard))
    assert output.complete(SHARDS) == set(range(SHARDS))
    output.finish(SHARDS)


def start(folder: Path, form: str, seed: int) -> int:
    """Fork a process, before JAX has started any thread, and return its id."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        child = os.fork()
    if child:
        return child
    code = 1
    try:
        warnings.simplefilter("error")  # also a shard that is not whole
        job(folder, form, seed)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def end(process: int) -> int:
    """Wait for a process; return its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def corrupt(folder: Path, whole: dict[str, bytes]) -> list[str]:
    """Return files under their final names with wrong content."""
    found = []
    for path in folder.rglob("*"):
        if path.is_file() and not path.name.startswith("."):
            name = str(path.relative_to(folder))
            if name != "errors.jsonl" and path.read_bytes() != whole.get(name):
                found.append(name)
    return found


def pause(folder: Path, rng: random.Random) -> None:
    """Wait until a random moment, or, half of the time, until one of the next scratch files exists."""
    deadline, writes = time.monotonic() + rng.uniform(0, 0.12), rng.randrange(2 * SHARDS)
    while time.monotonic() < deadline:
        if rng.random() < 0.5 and any(folder.rglob(".*.partial")) and (writes := writes - 1) < 0:
            return
        time.sleep(0.0005)


def one_run(folder: Path, form: str, case: str, whole: dict[str, bytes], rng: random.Random) -> dict[str, Any]:
    """Do one run; return its result."""
    found: dict[str, Any] = {"corrupt": [], "deaths": 0, "scratch_at_signal": 0}
    twins = [start(folder, form, rng.getrandbits(32)) for _ in range(2)]
    alive = list(twins)
    if case != "undisturbed":
        pause(folder, rng)
        found["scratch_at_signal"] = len(list(folder.rglob(".*.partial")))
        hit = twins if case == "kill both" else [rng.choice(twins)]
        for process in hit:
            os.kill(process, signal.SIGSTOP if case.startswith("stop") else signal.SIGKILL)
        found["corrupt"] += corrupt(folder, whole)
        if case.startswith("kill"):
            alive = [process for process in twins if process not in hit]
            for process in hit:
                end(process)
            alive.append(start(folder, form, rng.getrandbits(32)))
        else:
            alive.remove(hit[0])
            found["deaths"] += end(alive.pop()) != 0  # the twin of the stopped one finishes the job
            found["corrupt"] += corrupt(folder, whole)
            os.kill(hit[0], signal.SIGCONT if case == "stop" else signal.SIGKILL)
            if case == "stop":
                alive.append(hit[0])
            else:
                end(hit[0])
    found["deaths"] += sum(end(process) != 0 for process in alive)
    found["corrupt"] += corrupt(folder, whole)
    found["deaths"] += end(start(folder, form, 0)) != 0  # once more, which sweeps
    found["equal"] = contents(folder) == whole
    return found


def campaign(runs: int, seed: int) -> dict[str, Any]:
    """Do several runs; return their results."""
    rng, total = random.Random(seed), collections.Counter[str]()
    cases: dict[str, int] = dict.fromkeys(CASES, 0)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        wholes = {}
        for form in OUTPUT_FORMATS:
            if end(start(Path(scratch, form), form, 0)):
                sys.exit(f"an undisturbed job in the form {form} fails")
            wholes[form] = contents(Path(scratch, form))
        for number in range(runs):
            form, case = OUTPUT_FORMATS[number % 2], rng.choice(CASES)
            found = one_run(Path(scratch, f"run-{number}"), form, case, wholes[form], rng)
            cases[case] += 1
            total["corrupt_shards"] += len(found["corrupt"])
            total["deaths_of_survivors"] += found["deaths"]
            total["signals_during_a_write"] += found["scratch_at_signal"] > 0
            total["runs_with_other_bytes_at_the_end"] += not found["equal"]
    names = ("corrupt_shards", "deaths_of_survivors", "runs_with_other_bytes_at_the_end", "signals_during_a_write")
    return {"runs": runs, "seed": seed, "shards_of_a_run": SHARDS, "cases": cases} | {
        **{name: total[name] for name in names},
        "seconds": round(time.perf_counter() - began, 1),
    }


def main() -> None:
    """Run the campaign and write its result."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--print", action="store_true", help="print what was found instead of writing it")
    arguments = parser.parse_args()
    found = campaign(arguments.runs, arguments.seed)
    print(json.dumps(found))
    if not arguments.print:
        path = ROOT / "tpu_scripts" / "results" / f"batch-twins-{datetime.date.today().isoformat()}.json"
        path.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
