"""Peak memory of evaluations of 1,000 and 10,000 pictures, each in a process of its own.

    python tpu_scripts/evaluation/memory.py

writes batch jobs of random pictures of 64 x 64 pixels, and evaluates them with the embedded model's CLIP: its score,
the nearest name, kandinsky-clip-mmd, and Fréchet and kernel distances of CLIP's and of 2,048 further features, with a
reference of as many pictures. Writes the peak of resident memory (VmHWM) to
tpu_scripts/results/evaluation-memory-DATE.json. About ten minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from kandinsky_jax import images  # noqa: E402
from kandinsky_jax.batch.shards import GeneratedImage, Output  # noqa: E402
from kandinsky_jax.common.atomic import replace_file  # noqa: E402
from kandinsky_jax.evaluation import (  # noqa: E402
    CLIPMaximumMeanDiscrepancy,
    CLIPScore,
    CLIPTowers,
    FrechetInceptionDistance,
    FunctionFeatures,
    KernelInceptionDistance,
    NearestName,
    Picture,
    Resampling,
    evaluate,
)

PER_SHARD, SIDE = 256, 64
NAMES = ("red apple", "snowman", "purple heart", "slice of pizza", "rocket", "penguin", "tulip", "skull")
MIX = np.random.default_rng(0).normal(size=(192, 2048)).astype(np.float32)


def write_job(folder: Path, count: int, seed: int) -> None:
    """Write a batch job's folder of random pictures."""
    rng = np.random.default_rng(seed)
    output = Output(str(folder), "webdataset", "png")
    output.begin(
        {
            "rows": {"count": count, "sha256": ""},
            "rows_per_shard": PER_SHARD,
            "format": "webdataset",
            "pictures": "png",
            "defaults": {},
        }
    )
    for shard in range(-(-count // PER_SHARD)):
        rows = range(shard * PER_SHARD, min(count, (shard + 1) * PER_SHARD))
        output.write(shard, [_picture(rng, i) for i in rows], [])


def _picture(rng: np.random.Generator, number: int) -> GeneratedImage:
    levels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    picture = Image.fromarray(levels).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return GeneratedImage(f"{number:09d}", images.encode(picture, "png"), {"prompt": NAMES[number % len(NAMES)]})


def wide(picture: Picture) -> np.ndarray:
    """2,048 numbers of a picture, as many as FID's network has."""
    small = np.asarray(picture.image.resize((8, 8), Image.Resampling.BOX), np.float32) / 255
    return np.tanh(small.reshape(-1) @ MIX / 10)


def worker(pictures: str, reference: str, output: str) -> None:
    """Evaluate in this process, and print its peak of resident memory in MB and what was found."""
    began, towers = time.perf_counter(), CLIPTowers.from_pretrained("tiny")
    features = FunctionFeatures("wide", wide)
    metrics = [
        CLIPScore(towers.images, towers.texts),
        NearestName(towers.images, towers.texts),
        CLIPMaximumMeanDiscrepancy(towers.images),
        FrechetInceptionDistance(towers.images, "frechet-clip"),
        KernelInceptionDistance(towers.images, "kernel-clip"),
        FrechetInceptionDistance(features, "frechet-wide", resamples=2),
        KernelInceptionDistance(features, "kernel-wide"),
    ]
    found = evaluate(
        pictures, output, metrics=metrics, reference=reference, quiet=True, resampling=Resampling(resamples=200)
    )
    peak = next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    seconds = time.perf_counter() - began
    numbers = {one.name: one.value for one in found.measurements}
    print(
        json.dumps(
            {"peak_mb": round(peak / 1024), "seconds": round(seconds, 1), "faults": dict(found.faults), **numbers}
        )
    )


def measure(count: int) -> dict[str, Any]:
    """Evaluate so many pictures in a process of its own."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write_job(folder / "pictures", count, 0)
        write_job(folder / "reference", count, 1)
        paths = [str(folder / name) for name in ("pictures", "reference", "out")]
        command = [sys.executable, __file__, "--worker", *paths]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr[-3000:])
        return {"pictures": count, **json.loads(done.stdout)}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 10000])
    parser.add_argument("--output", type=Path, default=ROOT / "tpu_scripts" / "results")
    parser.add_argument("--worker", nargs=3, help="of this script alone")
    arguments = parser.parse_args()
    if arguments.worker:
        worker(*arguments.worker)
        return
    found: dict[str, Any] = {"date": datetime.date.today().isoformat(), "cpus": os.cpu_count(), "runs": []}
    for count in arguments.counts:
        found["runs"].append(measure(count))
        print(json.dumps(found["runs"][-1]), flush=True)
    target = arguments.output / f"evaluation-memory-{found['date']}.json"
    replace_file(target, (json.dumps(found, indent=1) + "\n").encode())
    print(target)


if __name__ == "__main__":
    main()
