"""Ours beside diffusers, in turns, in one run: the prior, the UNet's guided step, MoVQ's decoder, text to picture.

    python tpu_scripts/benchmark.py                              # official sizes, random weights; half an hour on a CPU
    python tpu_scripts/benchmark.py --models tiny --size 64      # a look at the small model, minutes
    python tpu_scripts/benchmark.py --models FOLDER --batch 1 16 --size 768 --dtype bfloat16 --compiled   # on a GPU

Each side runs in a process of its own, one after the other, as often as --rounds says; what is timed are the pipelines
that users call. On a CPU a loop of a few steps is timed step by step, and a call with the usual number of steps is that
call plus the median step as often as steps are missing ("computed"); on a GPU whole calls are timed. Results go to
tpu_scripts/results/benchmark-DATE.json, .md and .png.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import random_models
from benchmark_worker import COMPILED, Job
from tqdm.auto import tqdm

RESULTS = Path(__file__).parent / "results"
STAGES = ("prior", "unet", "movq", "text2img")
OURS, THEIRS = "ours", "diffusers"
# The calls that a stage stands for on a CPU: (name, steps of the timed loop, steps of the prior before it).
WHOLE = {
    "prior": [("prior, 25 steps", 25, 0)],
    "unet": [],
    "movq": [("MoVQ decode", 0, 0)],
    "text2img": [("text2img, 25 + 10 steps", 10, 25), ("text2img, 25 + 50 steps", 50, 25)],
}
STEP = {"prior": "prior, one guided step", "unet": "UNet, one guided step"}


# TFLOP of one evaluation of the official UNet on one row, by the plain sums (2 per multiply-add).
UNET_TFLOP = {512: 0.856, 768: 1.993, 1024: 3.714}


class Row(NamedTuple):
    """One line of the table."""

    what: str
    batch: int
    size: int
    side: str
    seconds: float  # the median
    spread: tuple[float, float]  # least and most
    samples: int
    computed: bool  # from a shorter call and its steps
    peak_gb: float


def rows(job: Job, found: list[dict[str, Any]]) -> list[Row]:
    """What the processes of one side have measured of one stage."""
    calls = [call for process in found for call in process["calls"]]
    peak = max(process["peak_gb"] for process in found)
    steps, prior_steps = ([s for call in calls for s in call[loop]] for loop in ("steps", "prior_steps"))
    lines = []

    def line(what: str, samples: list[float], computed: bool = False) -> None:
        middle, spread = statistics.median(samples), (min(samples), max(samples))
        lines.append(Row(what, job.batch, job.size, job.side, middle, spread, len(samples), computed, peak))

    if job.stage in STEP and steps:
        line(STEP[job.stage], steps)
    if not job.each_step and job.stage != "movq":
        before = f"{job.prior_steps} + " if job.stage == "text2img" else ""
        line(f"{job.stage}, {before}{job.steps} steps", [call["seconds"] for call in calls])
        return lines
    for what, n, m in WHOLE[job.stage]:
        missing = 0.0
        if steps:
            missing += (n - job.steps) * statistics.median(steps)
        if prior_steps:
            missing += (m - job.prior_steps) * statistics.median(prior_steps)
        line(what, [call["seconds"] + missing for call in calls], computed=missing != 0)
    return lines


def share_of_peak(job: Job, found: list[dict[str, Any]]) -> float | None:
    """What our UNet's guided step reaches of what a matrix product reaches; None where either is not known.

    Above 1 is possible: Winograd's convolutions do fewer products than are counted here.
    """
    peaks = [process["matmul_tflops"] for process in found if "matmul_tflops" in process]
    if not peaks or job.models == "tiny" or job.size not in UNET_TFLOP:
        return None
    calls = [call for process in found for call in process["calls"]]
    steps = [s for call in calls for s in call["steps"]] or [call["seconds"] / job.steps for call in calls]
    return 2 * job.batch * UNET_TFLOP[job.size] / statistics.median(steps) / statistics.median(peaks)


def run(job: Job) -> dict[str, Any]:
    """One process."""
    worker = Path(__file__).with_name("benchmark_worker.py")
    done = subprocess.run(
        [sys.executable, str(worker)],
        input=json.dumps(job._asdict()),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{job.side}, {job.stage}, batch {job.batch} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def table(lines: list[Row]) -> str:
    """Markdown: each of our figures beside the other sides'."""
    sides = [side for side in dict.fromkeys(line.side for line in lines) if side != OURS]
    text = f"| what | batch | size | ours, s | peak GB |{''.join(f' {s}, s | peak GB | ratio |' for s in sides)}\n"
    text += f"|---|---|---|---|---|{'---|---|---|' * len(sides)}\n"
    by_side = {(line.what, line.batch, line.size, line.side): line for line in lines}
    for line in lines:
        if line.side != OURS:
            continue
        cells = [line.what, line.batch, line.size, *_cells(line)]
        for side in sides:
            other = by_side.get((line.what, line.batch, line.size, side))
            cells += [*_cells(other), f"{other.seconds / line.seconds:.2f}x"] if other else ["", "", ""]
        text += "| " + " | ".join(map(str, cells)) + " |\n"
    return text


def _cells(line: Row) -> list[str]:
    low, high = line.spread
    how = f"{line.samples} samples" + (", computed" if line.computed else "")
    return [f"{line.seconds:.3g} ({low:.3g} to {high:.3g}, {how})", f"{line.peak_gb:.1f}"]


def plot(lines: list[Row], path: Path) -> None:
    """How many times faster than the other sides, as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ours = {line[:3]: line.seconds for line in lines if line.side == OURS}
    others = [line for line in lines if line.side != OURS and line[:3] in ours]
    figure, axes = pyplot.subplots(figsize=(8, 0.5 * len(others) + 1.2), layout="constrained")
    names = [f"{line.what}, batch {line.batch}, {line.size}\nbeside {line.side}" for line in others]
    bars = axes.barh(names, [line.seconds / ours[line[:3]] for line in others], color="#4477aa")
    axes.bar_label(bars, fmt=" %.1fx")
    axes.axvline(1, color="black", linewidth=1)
    axes.set(xscale="log", xlabel="times as fast as the reference (logarithmic)")
    axes.margins(x=0.15)  # for the labels
    axes.invert_yaxis()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", help='"tiny", or a folder with both repositories; default: random weights')
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--size", nargs="+", type=int, default=[512])
    parser.add_argument("--steps", type=int, help="of the timed loop; default: 4 on a CPU, 50 on a GPU")
    parser.add_argument("--prior-steps", type=int, help="before it; default: 4 on a CPU, 25 on a GPU")
    parser.add_argument("--repeats", type=int, default=3, help="calls of each process")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each side, in turns")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--compiled", action="store_true", help="also diffusers with torch.compile")
    parser.add_argument("--output", type=Path, help="without its ending; default: results/benchmark-DATE")
    arguments = parser.parse_args()
    if min(arguments.repeats, arguments.rounds, *arguments.batch) < 1 or (arguments.steps or 2) < 2:
        parser.error("--repeats, --rounds and --batch are at least 1, --steps at least 2")
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    sides = [OURS, THEIRS, *([COMPILED] if arguments.compiled else [])]
    output = arguments.output or RESULTS / f"benchmark-{datetime.date.today().isoformat()}"
    output.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()} CPU cores",
        "python": platform.python_version(),
        **{name: version(name) for name in ("jax", "flax", "torch", "diffusers", "transformers")},
        "models": arguments.models or "official sizes, random weights",
    }
    lines: list[Row] = []
    raw: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        models = arguments.models
        if models is None:
            models = scratch
            for repository in random_models.PARTS:
                random_models.write(Path(scratch) / repository, repository)
        fixed = {
            "models": models,
            "steps": arguments.steps or (4 if device == "cpu" else 50),
            "prior_steps": arguments.prior_steps or (4 if device == "cpu" else 25),
            "repeats": arguments.repeats,
            "dtype": arguments.dtype or ("float32" if device == "cpu" else "bfloat16"),
            "device": device,
            "each_step": device == "cpu",
        }
        # The prior has no size.
        plan = [
            (stage, batch, size)
            for stage in arguments.stages
            for batch in arguments.batch
            for size in (arguments.size if stage != "prior" else arguments.size[:1])
        ]
        with tqdm(total=len(plan) * len(sides) * arguments.rounds, unit="process") as bar:
            for stage, batch, size in plan:
                jobs = [Job(side=side, stage=stage, batch=batch, size=size, **fixed) for side in sides]
                found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
                for _ in range(arguments.rounds):
                    for job in jobs:
                        bar.set_description(f"{job.side}, {stage}, batch {batch}")
                        found[job.side].append(run(job))
                        bar.update()
                for job in jobs:
                    lines += rows(job, found[job.side])
                    share = share_of_peak(job, found[job.side])
                    measured = {"processes": found[job.side], "share_of_matmul_peak": share}
                    raw.append({**job._asdict(), "models": about["models"], **measured})
                # After each stage, so that nothing measured is lost.
                kept = {**about, "rows": [line._asdict() for line in lines], "measured": raw}
                output.with_suffix(".json").write_text(json.dumps(kept, indent=1) + "\n")
    heading = ", ".join(f"{name} {value}" for name, value in about.items())
    output.with_suffix(".md").write_text(f"{heading}\n\n{table(lines)}")
    plot(lines, output.with_suffix(".png"))
    print(table(lines))


if __name__ == "__main__":
    main()
