"""What `benchmark.py` has measured, as rows, tables and a plot."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any, NamedTuple

import kernel_times
import numpy as np
from benchmark_worker import OURS, Job

# The calls that a stage stands for on a CPU: (name, steps of the timed loop, steps of the prior before it).
WHOLE = {
    "prior": [("prior, 25 steps", 25, 0)],
    "unet": [],
    "movq": [("MoVQ decode", 0, 0)],
    "text2img": [("text2img, 25 + 10 steps", 10, 25), ("text2img, 25 + 50 steps", 50, 25)],
}
NAMES = {"prior": "prior", "unet": "UNet", "movq": "MoVQ decode", "text2img": "text2img"}
STEP = {"prior": "prior, one guided step", "unet": "UNet, one guided step"}


# TFLOP of one evaluation of the official UNet on one row, by the plain sums (2 per multiply-add).
UNET_TFLOP = {512: 0.856, 768: 1.993, 1024: 3.714}


class Row(NamedTuple):
    """One line of the table."""

    stage: str
    what: str
    batch: int
    size: int
    side: str
    seconds: float  # the median
    spread: tuple[float, float]  # least and most
    samples: int
    computed: bool  # from a shorter call and its steps
    peak_gb: float | None  # None where an earlier measurement of the process had as much


def rows(job: Job, found: list[dict[str, Any]]) -> list[Row]:
    """What the processes of one side have measured of one stage."""
    calls = [call for process in found for call in process["calls"]]
    peak = max((process["peak_gb"] for process in found if process["peak_gb"] is not None), default=None)
    steps, prior_steps = ([s for call in calls for s in call[loop]] for loop in ("steps", "prior_steps"))
    lines = []

    def line(what: str, samples: list[float], computed: bool = False) -> None:
        middle, spread = statistics.median(samples), (min(samples), max(samples))
        lines.append(Row(job.stage, what, job.batch, job.size, job.side, middle, spread, len(samples), computed, peak))

    if job.stage in STEP and steps:
        line(STEP[job.stage], steps)
    if not job.each_step and job.stage != "movq":
        before = f"{job.prior_steps} + " if job.stage == "text2img" else ""
        line(f"{NAMES[job.stage]}, {before}{job.steps} steps", [call["seconds"] for call in calls])
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


def differences(ours: Path, reference: Path) -> dict[str, float]:
    """How far two results of the stage `parity` are apart: of the reference's spread, and for pictures of 255."""
    found = {}
    with np.load(ours) as a, np.load(reference) as b:
        for name in ("embedding", "latents"):
            found[f"{name}: max difference / std"] = float(np.abs(a[name] - b[name]).max() / b[name].std())
        apart = 255 * np.abs(a["picture"] - b["picture"])
        found |= {"picture: mean, of 255": float(apart.mean()), "picture: max, of 255": float(apart.max())}
    return found


def sentence(row: dict[str, Any]) -> str:
    """One row for the terminal."""
    return f"{row['side']}: {row['what']}, batch {row['batch']}, {row['size']}: {row['seconds']:.4g} s"


def report(found: dict[str, Any]) -> str:
    """Markdown of everything that a run has measured, and of what it has not."""
    tables = ("rows", "first", "parity", "kernels", "missed", "measured")
    text = ", ".join(f"{name} {value}" for name, value in found.items() if name not in tables) + "\n"
    sides = list(dict.fromkeys(row["side"] for row in found["rows"]))
    if found["rows"]:
        text += "\n" + table([Row(**row) for row in found["rows"]], sides)
    if found["first"]:
        text += "\nFirst picture, from the start of the process:\n\n| side | programs | seconds |\n|---|---|---:|\n"
        for line in found["first"]:
            text += f"| {line['side']} | {'kept' if line['kept'] else 'none'} | {line['seconds']:.1f} |\n"
    text += _before_the_first(found["measured"])
    for each in found["measured"]:
        if each.get("share_of_matmul_peak"):
            share, peak = each["share_of_matmul_peak"], each["processes"][0]["matmul_tflops"]
            what = f"Our UNet at {each['size']}, batch {each['batch']}"
            text += f"\n{what}: {share:.0%} of a matrix product's {peak:.4g} TFLOP/s\n"
    if found["parity"]:
        names = list(found["parity"][0])
        text += (
            f"\nBeside diffusers in float32, with the same random numbers:\n\n{_row(names)}{_row(['---'] * len(names))}"
        )
        for line in found["parity"]:
            text += _row([f"{value:.3g}" if isinstance(value, float) else value for value in line.values()])
    for each in found["kernels"]:
        text += f"\nKernels of our UNet's steps, batch {each['batch']}, {each['size']}:\n\n"
        text += kernel_times.table(each["kernels"])
    for line in found["missed"]:
        why = line["why"].strip().splitlines()[-1]
        text += f"\nNot measured: {line['side']}, {line['what']}, batch {line['batch']}, {line['size']}: {why}\n"
    return text


def _row(cells: list[Any]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |\n"


def _before_the_first(measured: list[dict[str, Any]]) -> str:
    text = "\nBefore a stage's first timed call: reading the weights, then a call of two steps, which compiles:\n\n"
    text += "| stage | batch | size | side | read, s | compile, s |\n|---|---|---|---|---:|---:|\n"
    for each in measured:
        process = each["processes"][0]
        cells = [each["stage"], each["batch"], each["size"], each["side"]]
        text += _row([*cells, f"{process['load_s']:.1f}", f"{process['warm_up_s']:.1f}"])
    return text if measured else ""


def table(lines: list[Row], sides: list[str]) -> str:
    """Markdown: each of our figures beside the other sides'."""
    first, *others = [OURS, *(side for side in sides if side != OURS)] if OURS in sides else sides
    text = f"| what | batch | size | {first}, s | peak GB |{''.join(f' {s}, s | peak GB | ratio |' for s in others)}\n"
    text += f"|---|---|---|---|---|{'---|---|---|' * len(others)}\n"
    by_side = {(line.what, line.batch, line.size, line.side): line for line in lines}
    for key in dict.fromkeys((line.what, line.batch, line.size) for line in lines):
        mine = by_side.get((*key, first))
        cells = [*key, *(_cells(mine) if mine else ["", ""])]
        for side in others:
            other = by_side.get((*key, side))
            ratio = f"{other.seconds / mine.seconds:.2f}x" if mine and other else ""
            cells += [*_cells(other), ratio] if other else ["", "", ""]
        text += _row(cells)
    return text


def _cells(line: Row) -> list[str]:
    low, high = line.spread
    how = f"{line.samples} samples" + (", computed" if line.computed else "")
    peak = "" if line.peak_gb is None else f"{line.peak_gb:.1f}"
    return [f"{line.seconds:.3g} ({low:.3g} to {high:.3g}, {how})", peak]


def plot(found: list[dict[str, Any]], path: Path) -> None:
    """How many times faster than the other sides, as bars; nothing where nothing stands side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [Row(**row) for row in found]
    ours = {line[:4]: line.seconds for line in lines if line.side == OURS}
    others = [line for line in lines if line.side != OURS and line[:4] in ours]
    if not others:
        return
    figure, axes = pyplot.subplots(figsize=(8, 0.5 * len(others) + 1.2), layout="constrained")
    names = [f"{line.what}, batch {line.batch}, {line.size}\nbeside {line.side}" for line in others]
    bars = axes.barh(names, [line.seconds / ours[line[:4]] for line in others], color="#4477aa")
    axes.bar_label(bars, fmt=" %.1fx")
    axes.axvline(1, color="black", linewidth=1)
    axes.set(xscale="log", xlabel="times as fast as the reference (logarithmic)")
    axes.margins(x=0.15)  # for the labels
    axes.invert_yaxis()
    figure.savefig(path, dpi=120)
