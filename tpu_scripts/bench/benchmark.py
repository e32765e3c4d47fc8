"""Ours beside diffusers, in turns, in one run: the prior, the UNet's guided step, MoVQ's decoder, text to picture.

    python tpu_scripts/bench/benchmark.py                     # official sizes, random weights; half an hour
    python tpu_scripts/bench/benchmark.py --models tiny --size 64  # the small model, minutes
    python tpu_scripts/bench/benchmark.py --sides ours openvino    # on a CPU; needs `pip install openvino`
    python tpu_scripts/bench/benchmark.py --run 1 --minutes 9.5 --scratch /tmp/models  # on a GPU, at most 9.5 minutes

Each side has a process of its own, and works while the others wait; what is timed are the pipelines that users call.
On a CPU a loop of a few steps is timed step by step, and a call with the usual number of steps is that call plus the
median step as often as steps are missing ("computed"); on a GPU whole calls are timed.

Further stages, for --stages: `first` is a process's first picture, with nothing compiled and then with programs kept;
`parity` compares pictures of the same random numbers in float32 and bfloat16; `profile` lists our UNet's kernels.
On a GPU three runs measure all of it: 1 is diffusers as it comes, 2 is diffusers compiled, 3 is the rest.

Results go to tpu_scripts/results/benchmark-DATE.json as soon as they are measured, and to .md and .png at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # a machine without our package installed

import benchmark_table  # noqa: E402
import random_models  # noqa: E402
from benchmark_worker import COMPILED, OPENVINO, OURS, PROMPTS, THEIRS, Job  # noqa: E402
from tqdm.auto import tqdm  # noqa: E402
from worker_process import WorkerFailed, WorkerProcess, WorkerTimeout  # noqa: E402

RESULTS = ROOT / "tpu_scripts" / "results"
WORKER = Path(__file__).with_name("benchmark_worker.py")
SIDES = (OURS, THEIRS, *COMPILED, OPENVINO)
STAGES = ("prior", "unet", "movq", "text2img")
FURTHER = ("first", "parity", "profile")
# What --run stands for; whatever else is given counts instead.
RUNS: dict[int, dict[str, Any]] = {
    1: {"sides": [OURS, THEIRS], "stages": ["first", "text2img", "unet"], "batch": [1, 16]},
    2: {"sides": [OURS, *COMPILED], "stages": ["text2img", "unet", "movq"], "batch": [1, 16]},
    3: {
        "sides": [OURS, THEIRS],
        "stages": ["profile", "parity", "prior", "movq", "unet", "text2img"],
        "batch": [1, 4, 16],
        "size": [512, 768],
    },
}
SMALL_MODELS = {"tiny": ("tiny", 64), "shapes": (str(ROOT / "tests" / "shapes_model"), 64)}  # trained, for parity


class Bench:
    """The processes of a run, its time, and what it has measured so far, which is on disk at any moment.

    Args:
        output: where results go, without its ending.
        about: versions and the device.
        scratch: a folder for compiled programs and arrays.
        resident: processes stay for further jobs; otherwise each job has a fresh one.
        minutes: after which nothing more is measured.
        job_minutes: after which one job is given up.
        worker: the script of the processes.
    """

    def __init__(
        self,
        output: Path,
        about: dict[str, Any],
        scratch: Path,
        *,
        resident: bool,
        minutes: float,
        job_minutes: float,
        worker: Path = WORKER,
    ):
        self.output, self.scratch, self.resident, self._worker = output, scratch, resident, worker
        self.found: dict[str, Any] = {**about, "rows": [], "first": [], "parity": [], "kernels": [], "missed": []}
        self.found["measured"] = []
        self._deadline = time.monotonic() + 60 * minutes
        self._job_seconds = 60 * job_minutes
        self._workers: dict[str, WorkerProcess] = {}
        self.environment: dict[str, str | None] = {
            "KANDINSKY_JAX_CACHE": str(scratch / "programs"),
            "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
            "OPENVINO_PROGRAMS": str(scratch / "openvino"),
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # the sides share the device
        }

    def ask(self, job: Job, fresh: bool = False) -> dict[str, Any] | None:
        """What a job has measured; None, and a line in "missed", where it failed or there was no time for it."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            return self._missed(job, "no time was left")
        if fresh:
            self.close(job.side)
        began = time.monotonic()
        if job.side not in self._workers:
            log = self.output.with_suffix(".log")
            self._workers[job.side] = WorkerProcess(job.side, self._worker, self.environment, log)
        try:
            found = self._workers[job.side].ask(job._asdict(), min(left, self._job_seconds))
        except WorkerTimeout:
            self.close(job.side)
            return self._missed(job, f"it took more than {min(left, self._job_seconds):.0f} s")
        except WorkerFailed as error:
            self.close(job.side)
            return self._missed(job, str(error))
        if fresh or not self.resident:
            self.close(job.side)
        if "error" in found:
            return self._missed(job, found["error"])
        return {**found, "wall_s": time.monotonic() - began}

    def _missed(self, job: Job, why: str) -> None:
        line = {"what": f"{job.stage}, {job.dtype}", "batch": job.batch, "size": job.size, "side": job.side, "why": why}
        if line not in self.found["missed"]:
            self.found["missed"].append(line)
            tqdm.write(f"not measured: {job.side}, {line['what']}, batch {job.batch}, {job.size}: {why}")
        self.keep()

    def keep(self) -> None:
        """Write everything measured so far."""
        partial = self.output.with_suffix(".partial")
        partial.write_text(json.dumps(self.found, indent=1) + "\n")
        partial.replace(self.output.with_suffix(".json"))

    def close(self, *sides: str) -> None:
        """End processes, by default all."""
        for side in sides or tuple(self._workers):
            worker = self._workers.pop(side, None)
            if worker is not None:
                worker.close()

    # Stages -------------------------------------------------------------------------------------------------------

    def steady(self, jobs: list[Job], rounds: int, bar: tqdm) -> None:
        """Times of one stage, batch and size, of several sides in turns; a row is kept after each turn."""
        found: dict[str, list[dict[str, Any]]] = {job.side: [] for job in jobs}
        for _ in range(rounds):
            for job in jobs:
                bar.set_description(f"{job.side}, {job.stage}, batch {job.batch}, {job.size}")
                answer = self.ask(job)
                bar.update()
                if answer is None:
                    continue
                found[job.side].append(answer)
                self._replace_measured(job, found[job.side])
                self.keep()
        measured = {(job.side, job.stage, job.batch, job.size) for job in jobs}
        for row in self.found["rows"]:
            if (row["side"], row["stage"], row["batch"], row["size"]) in measured:
                tqdm.write(benchmark_table.sentence(row))

    def _replace_measured(self, job: Job, processes: list[dict[str, Any]]) -> None:
        """Put a job's measurements in place of its earlier, fewer ones, and the rows that follow from them."""
        raw, key = self.found["measured"], job._asdict()
        old = next((each for each in raw if all(each[name] == value for name, value in key.items())), None)
        if old is None:
            raw.append({**key, "processes": list(processes)})
        else:  # ours stands beside several others, one after the other
            old["processes"] = [*(p for p in old["processes"] if p not in processes), *processes]
        self.found["rows"] = [
            row._asdict() for each in raw for row in benchmark_table.rows(_job(each), each["processes"])
        ]
        for each in raw:
            each["share_of_matmul_peak"] = benchmark_table.share_of_peak(_job(each), each["processes"])

    def first(self, jobs: list[Job], bar: tqdm) -> None:
        """Seconds from a process's start to its first picture: with nothing compiled, and with programs kept."""
        programs = self.scratch / "programs"
        for kept in (False, True):
            if not kept and programs.exists() and any(programs.iterdir()):
                self._missed(jobs[0], f"first picture with nothing compiled: programs lie in {programs} already")
                continue
            for job in jobs:
                bar.set_description(f"{job.side}, first picture")
                answer = self.ask(job, fresh=True)
                bar.update()
                if answer is not None:
                    seconds = answer["wall_s"]
                    line = {"side": job.side, "kept": kept, "batch": job.batch, "size": job.size, "seconds": seconds}
                    self.found["first"].append(line)
                    tqdm.write(f"first picture, {job.side}, {'programs kept' if kept else 'cold'}: {seconds:.1f} s")
                    self.keep()

    def parity(self, models: str, name: str, size: int, fixed: Job, bar: tqdm) -> None:
        """How far ours is from the reference in float32, and either in bfloat16 from it."""
        folder = self.scratch / "parity" / name
        folder.mkdir(parents=True, exist_ok=True)
        arrays: dict[tuple[str, str], Path] = {}
        for dtype in ("float32", "bfloat16"):
            for side in (OURS, THEIRS):
                bar.set_description(f"{side}, parity of {name}, {dtype}")
                job = fixed._replace(models=models, size=size, side=side, dtype=dtype, folder=str(folder))
                answer = self.ask(job, fresh=True)
                bar.update()
                if answer is not None:
                    arrays[side, dtype] = Path(answer["arrays"])
            for side in (OURS, THEIRS):
                if (side, dtype) != (THEIRS, "float32") and {(side, dtype), (THEIRS, "float32")} <= arrays.keys():
                    differences = benchmark_table.differences(arrays[side, dtype], arrays[THEIRS, "float32"])
                    line = {"models": name, "side": side, "dtype": dtype, "size": size, **differences}
                    self.found["parity"].append(line)
                    tqdm.write(f"parity: {line}")
                    self.keep()

    def profile(self, job: Job, bar: tqdm) -> None:
        """Our UNet's kernels; the trace stays beside the results."""
        bar.set_description(f"profile, batch {job.batch}")
        folder = self.output.parent / f"{self.output.name}-profile-{job.batch}-{job.size}"
        answer = self.ask(job._replace(folder=str(folder)))
        bar.update()
        if answer is not None:
            line = {"batch": job.batch, "size": job.size, "kernels": answer["kernels"][:60]}
            self.found["kernels"].append(line)
            self.keep()


def _job(measured: dict[str, Any]) -> Job:
    return Job(**{name: measured[name] for name in Job._fields})


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; a --run's settings are defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=int, choices=tuple(RUNS), help="one of the three runs on a GPU")
    parser.add_argument("--models", help='"tiny", or a folder with both repositories; default: random weights')
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=[OURS, THEIRS])
    parser.add_argument("--stages", nargs="+", choices=(*STAGES, *FURTHER), default=list(STAGES))
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--size", nargs="+", type=int, default=[512])
    parser.add_argument("--steps", type=int, help="of the timed loop; default: 4 on a CPU, 50 on a GPU")
    parser.add_argument("--prior-steps", type=int, help="before it; default: 4 on a CPU, 25 on a GPU")
    parser.add_argument("--repeats", type=int, default=3, help="calls of each process in a turn")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each side")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--fresh", action="store_true", help="a process for each turn, on a GPU too: for peak memory")
    parser.add_argument("--resident", action="store_true", help="one process a side, on a CPU too: needs their memory")
    parser.add_argument("--minutes", type=float, default=1e6, help="after which nothing more is measured")
    parser.add_argument("--job-minutes", type=float, default=1e6, help="after which one measurement is given up")
    parser.add_argument("--xla-flags", help="added to XLA_FLAGS of our side, to try variants")
    parser.add_argument("--scratch", type=Path, help="keeps random weights and programs for the next run")
    parser.add_argument("--output", type=Path, help="without its ending; default: results/benchmark-DATE")
    run = parser.parse_known_args(argv)[0].run
    if run is not None:
        parser.set_defaults(**RUNS[run])
    arguments = parser.parse_args(argv)
    if min(arguments.repeats, arguments.rounds, *arguments.batch) < 1 or (arguments.steps or 2) < 2:
        parser.error("--repeats, --rounds and --batch are at least 1, --steps at least 2")
    if OPENVINO in arguments.sides and importlib.util.find_spec("openvino") is None:
        parser.error("--sides openvino needs its package: pip install openvino")
    if arguments.fresh and arguments.resident:
        parser.error("--fresh and --resident exclude each other")
    return arguments


@contextlib.contextmanager
def folder_of(path: Path | None) -> Iterator[Path]:
    """`path`, made where it is missing, or a temporary folder."""
    if path is None:
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)
    else:
        path.mkdir(parents=True, exist_ok=True)
        yield path


def random_weights(folder: Path) -> Path:
    """A folder with random weights of the official sizes, written unless an earlier run has left them."""
    complete = folder / "random-weights" / "complete"
    if not complete.exists():
        with ProcessPoolExecutor() as pool:
            jobs = [
                pool.submit(random_models.write, complete.parent / name, name, PROMPTS) for name in random_models.PARTS
            ]
            for job in jobs:
                job.result()
        complete.touch()
    return complete.parent


def plan(arguments: argparse.Namespace, job: Job) -> list[list[list[Job]]]:
    """What is measured in turns: for each other side, for each stage, batch and size, ours and the other side's job.

    Sizes and batches rise, for peak memory. The prior has no size.
    """
    kinds = [
        {"stage": stage, "batch": batch, "size": size}
        for size in sorted(arguments.size)
        for stage in arguments.stages
        for batch in sorted(arguments.batch)
        if stage in STAGES and (stage != "prior" or size == min(arguments.size))
    ]
    others = [side for side in arguments.sides if side != OURS]
    ours = [OURS] if OURS in arguments.sides else []
    pairs = [[*ours, other] for other in others] or [ours]
    return [[[job._replace(side=side, **kind) for side in pair] for kind in kinds] for pair in pairs]


def measure(bench: Bench, arguments: argparse.Namespace, device: str, models: str) -> None:
    """Everything that is asked for: single measurements, then ours beside each other side."""
    job = Job(
        side=OURS,
        stage="first",
        models=models,
        batch=min(arguments.batch),
        size=arguments.size[0],
        steps=arguments.steps or (4 if device == "cpu" else 50),
        repeats=arguments.repeats,
        dtype=arguments.dtype or ("float32" if device == "cpu" else "bfloat16"),
        device=device,
        prior_steps=arguments.prior_steps or (4 if device == "cpu" else 25),
        each_step=device == "cpu",
        resident=bench.resident,
    )
    jobs = plan(arguments, job)
    small = {**SMALL_MODELS, **({} if models == "tiny" else {"official sizes": (models, min(arguments.size))})}
    single = {"first": 2 * len(arguments.sides), "profile": len(arguments.batch), "parity": 4 * len(small)}
    total = sum(len(turn) for turns in jobs for turn in turns) * arguments.rounds
    total += sum(count for stage, count in single.items() if stage in arguments.stages)
    with tqdm(total=total, unit="job") as bar:
        if "first" in arguments.stages:
            bench.first([job._replace(side=side) for side in arguments.sides], bar)
        if "profile" in arguments.stages:
            for batch in sorted(arguments.batch):
                bench.profile(job._replace(stage="profile", batch=batch, steps=4), bar)
        if "parity" in arguments.stages:
            bench.close()
            for name, (folder, size) in small.items():
                trained = name in SMALL_MODELS
                fixed = job._replace(stage="parity", each_step=False, batch=len(PROMPTS))
                fixed = fixed if trained else fixed._replace(batch=1, steps=4, prior_steps=4)
                bench.parity(folder, name, size, fixed, bar)
        for turns in jobs:
            for turn in turns:
                bench.steady(turn, arguments.rounds, bar)
            bench.close(*(job.side for turn in turns for job in turn if job.side != OURS))


def main(argv: list[str] | None = None) -> None:
    """Measure, print and write."""
    arguments = parse(argv)
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    output = arguments.output or RESULTS / f"benchmark-{datetime.date.today().isoformat()}"
    output.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()} CPU cores",
        "python": platform.python_version(),
        **{name: version(name) for name in ("jax", "flax", "torch", "diffusers", "transformers")},
        **({"openvino": version("openvino")} if OPENVINO in arguments.sides else {}),
        "models": arguments.models or "official sizes, random weights",
        **({"xla_flags": arguments.xla_flags} if arguments.xla_flags else {}),
    }
    began = time.monotonic()
    with folder_of(arguments.scratch) as scratch:
        models = arguments.models or str(random_weights(scratch))
        minutes = arguments.minutes - (time.monotonic() - began) / 60
        resident = arguments.resident or (device != "cpu" and not arguments.fresh)
        limits = {"minutes": minutes, "job_minutes": arguments.job_minutes}
        bench = Bench(output, about, scratch, resident=resident, **limits)
        if "first" in arguments.stages:
            bench.environment["JAX_COMPILATION_CACHE_DIR"] = None
        if arguments.xla_flags:
            bench.environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {arguments.xla_flags}".strip()
        try:
            measure(bench, arguments, device, models)
        finally:
            bench.close()
            bench.keep()
            text = benchmark_table.report(bench.found)
            output.with_suffix(".md").write_text(text)
    print(text)
    benchmark_table.plot(bench.found["rows"], output.with_suffix(".png"))


if __name__ == "__main__":
    main()
