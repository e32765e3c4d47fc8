"""Our training step beside the reference's in PyTorch, in turns, in one run: steps a second.

    python tpu_scripts/bench/train_benchmark.py  # the small model, a quarter of an hour
    python tpu_scripts/bench/train_benchmark.py --kinds lora-prior --rounds 1 --seconds 1 --batch 2 --output /tmp/look
    python tpu_scripts/bench/train_benchmark.py --models FOLDER --size 512 --batch 1  # official sizes, from a folder

On a GPU where there is one, in bfloat16 with float32 weights; on a CPU in float32. AdamW, gradients clipped at 1.0.
Ours is `Trainer.step`, theirs the loss of diffusers' example scripts on their networks, backward, clip, step and
zero_grad; LoRA is peft's. Theirs pads captions to 77 tokens; ours leaves out tokens that are padding in the whole
batch, as it does in training runs (--padded keeps them). Each is measured on batches that are encoded already, and with
the frozen networks (MoVQ and CLIP's towers) in front of every step, as both have them in training runs.
For each line of the table both sides have a process, and while one works the other waits. Results go to
tpu_scripts/results/train-benchmark-DATE.json and .md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from benchmark_worker import OURS
from tqdm.auto import tqdm
from train_benchmark_worker import DECODER, PRIOR, Job, cores
from worker_process import WorkerProcess

from kandinsky_jax.checkpoint import hub

RESULTS = Path(__file__).parents[1] / "results"
SMALL = hub.EMBEDDED["tiny"]  # the trained small model
KINDS = ("decoder", "prior", "lora-decoder", "lora-prior")
THEIRS = "PyTorch"
SIDES = (OURS, THEIRS)
FIXED = ("batch", "size", "rank", "ema", "snr_gamma", "padded", "device", "dtype")  # of all lines of a table


class Row(NamedTuple):
    """One side of one line of the table."""

    kind: str
    encoding: bool
    side: str
    steps_per_second: float  # the median over the rounds
    spread: tuple[float, float]  # least and most
    rounds: int
    first_step_s: float  # compilation included
    load_s: float
    peak_gb: float
    loss: float  # mean of the last round


class Worker(WorkerProcess):
    """A process of one side, which has made its first step."""

    def __init__(self, job: Job):
        # Nothing compiled earlier: the first step is what it costs on a new machine.
        environment = {"KANDINSKY_JAX_CACHE": "off", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        if job.device == "cpu":
            environment |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        script = Path(__file__).with_name("train_benchmark_worker.py")
        super().__init__(f"{job.side}, {job.kind}", script, {**environment, "JAX_COMPILATION_CACHE_DIR": None})
        self.job = job
        self.started = self.ask(job._asdict())


def row(job: Job, started: dict[str, Any], found: list[dict[str, Any]]) -> Row:
    """What one process has measured."""
    rates = [each["steps"] / each["seconds"] for each in found]
    return Row(
        kind=job.kind,
        encoding=job.encoding,
        side=job.side,
        steps_per_second=statistics.median(rates),
        spread=(min(rates), max(rates)),
        rounds=len(rates),
        first_step_s=started["first_step_s"],
        load_s=started["load_s"],
        peak_gb=found[-1]["peak_gb"],
        loss=found[-1]["loss"],
    )


def table(rows: list[Row]) -> str:
    """Markdown: ours beside theirs."""
    each = "steps/s | first step, s | peak GB"
    text = f"| trained | networks in front | ours, {each} | PyTorch, {each} | ratio |\n|{'---|' * 9}\n"
    pairs: dict[tuple[str, bool], dict[str, Row]] = {}
    for line in rows:
        pairs.setdefault((line.kind, line.encoding), {})[line.side] = line
    for (kind, encoding), pair in pairs.items():
        cells = [kind, "yes" if encoding else "no", *_cells(pair[OURS]), *_cells(pair[THEIRS])]
        cells.append(f"{pair[OURS].steps_per_second / pair[THEIRS].steps_per_second:.2f}x")
        text += "| " + " | ".join(cells) + " |\n"
    return text


def _cells(line: Row) -> list[str]:
    low, high = line.spread
    rate = f"{line.steps_per_second:.3g} ({low:.3g} to {high:.3g}, {line.rounds} rounds)"
    return [rate, f"{line.first_step_s:.1f}", f"{line.peak_gb:.1f}"]


def measure(jobs: list[Job], rounds: int, seconds: float, bar: tqdm) -> tuple[list[Row], list[dict[str, Any]]]:
    """All sides of one line, in turns."""
    workers: list[Worker] = []
    found: list[list[dict[str, Any]]] = [[] for _ in jobs]
    try:
        for job in jobs:  # one after the other: compiling has the machine for itself
            bar.set_description(f"{job.side} starts, {job.kind}")
            workers.append(Worker(job))
        bar.set_description(f"{jobs[0].kind}{', encoding' if jobs[0].encoding else ''}")
        for _ in range(rounds):
            for worker, answers in zip(workers, found, strict=True):
                answers.append(worker.ask({"seconds": seconds}))
                bar.update()
    finally:
        for worker in workers:
            worker.close()
    lines = [row(w.job, w.started, answers) for w, answers in zip(workers, found, strict=True)]
    raw = [w.job._asdict() | w.started | {"rounds": a} for w, a in zip(workers, found, strict=True)]
    return lines, raw


def options() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=SMALL, help=f"a folder with {PRIOR} and {DECODER}")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=64, help="of the pictures")
    parser.add_argument("--rank", type=int, default=4, help="of LoRA")
    parser.add_argument("--ema", type=float, metavar="DECAY", help="also an average of the weights; default: none")
    parser.add_argument("--snr-gamma", type=float, help="min-SNR weighting; default: none")
    parser.add_argument("--padded", action="store_true", help="ours with all rows of text too")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where PyTorch finds one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side")
    parser.add_argument("--seconds", type=float, default=5.0, help="of a turn")
    parser.add_argument("--output", type=Path, help="without its ending; default: results/train-benchmark-DATE")
    arguments = parser.parse_args()
    if min(arguments.batch, arguments.rank, arguments.rounds) < 1 or arguments.seconds <= 0:
        parser.error("--batch, --rank and --rounds are at least 1, --seconds above 0")
    if arguments.size < 64 or arguments.size % 64:
        parser.error(f"--size is a multiple of 64, got {arguments.size}")
    if arguments.ema is not None and not 0 < arguments.ema < 1:
        parser.error(f"--ema is between 0 and 1, got {arguments.ema}")
    for repository in (PRIOR, DECODER):
        if not (arguments.models / repository / "model_index.json").is_file():
            parser.error(f"--models: {arguments.models} has no {repository} in diffusers' layout")
    return arguments


def main() -> None:
    """Measure, print and write."""
    arguments = options()
    import torch

    arguments.device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    arguments.dtype = arguments.dtype or ("float32" if arguments.device == "cpu" else "bfloat16")
    today = datetime.date.today().isoformat()
    output = arguments.output or RESULTS / f"train-benchmark-{today}"
    output.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "date": today,
        "hardware": f"{cores()} CPU cores" if arguments.device == "cpu" else torch.cuda.get_device_name(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("jax", "flax", "optax", "torch", "diffusers", "transformers", "peft")},
        "models": "the small model" if arguments.models == SMALL else arguments.models.name,
        **{name: getattr(arguments, name) for name in (*FIXED, "seconds")},
    }
    fixed = {name: about[name] for name in FIXED}
    lines: list[Row] = []
    raw: list[dict[str, Any]] = []
    plan = [(kind, encoding) for kind in arguments.kinds for encoding in (False, True)]
    with tqdm(total=len(plan) * len(SIDES) * arguments.rounds, unit="turn") as bar:
        for kind, encoding in plan:
            what = {"kind": kind, "encoding": encoding, "models": str(arguments.models.absolute())}
            jobs = [Job(side=side, **what, **fixed) for side in SIDES]
            found, measured = measure(jobs, arguments.rounds, arguments.seconds, bar)
            lines += found
            raw += [{**each, "models": about["models"]} for each in measured]
            # After each line, so that nothing measured is lost.
            kept = {**about, "rows": [line._asdict() for line in lines], "measured": raw}
            output.with_suffix(".json").write_text(json.dumps(kept, indent=1) + "\n")
    heading = ", ".join(f"{name} {value}" for name, value in about.items() if value is not None)
    output.with_suffix(".md").write_text(f"{heading}\n\n{table(lines)}")
    print(table(lines))


if __name__ == "__main__":
    main()
