"""Speed and quality of guidance in part of the steps, with the tests' model of shapes.

`python tpu_scripts/bench/guidance_interval.py` generates the same captions with the same noise for several intervals,
and has the tests' scorer say which pictures show what they were asked for. It prints a table and writes
`tpu_scripts/results/guidance-interval-DATE.json`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kandinsky_jax import KandinskyV22CombinedPipeline
from kandinsky_jax.pipelines import checks

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # the scorer is the tests'
from tests import shapes  # noqa: E402

SHAPES_MODEL = ROOT / "tests" / "shapes_model"
BATCH = 25
# Shares of the steps, the noisiest first; None is no guidance at all.
INTERVALS: list[tuple[float, float] | None] = [
    (0.0, 1.0),
    (0.1, 1.0),
    (0.2, 1.0),
    (0.4, 1.0),
    (0.6, 1.0),
    (0.8, 1.0),
    (0.9, 1.0),
    (0.0, 0.8),
    (0.0, 0.4),
    (0.1, 0.9),
    (0.2, 0.8),
    None,
]


def evaluations(interval: tuple[float, float] | None, steps: int) -> float:
    """Rows that the network sees, relative to guidance at every step."""
    first, last = (0, 0) if interval is None else checks.interval(interval, steps) or (0, steps)
    return (steps + last - first) / (2 * steps)


def generate(
    pipe: KandinskyV22CombinedPipeline, embeds: list[Any], interval: tuple[float, float] | None, steps: int
) -> np.ndarray:
    """The pictures of all batches, float32 `[N, 64, 64, 3]` in 0..1."""
    guidance = {"guidance_scale": 1.0} if interval is None else {"guidance_scale": 4.0, "guidance_interval": interval}
    size = {"height": shapes.SIDE, "width": shapes.SIDE, "output_type": "np"}
    generated = [
        pipe.decoder_pipe(*pair, num_inference_steps=steps, generator=seed, **guidance, **size).images
        for seed, pair in enumerate(embeds)
    ]
    return np.concatenate(generated)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=100)
    parser.add_argument("--steps", type=int, default=50)
    given = parser.parse_args()
    pipe = KandinskyV22CombinedPipeline.from_pretrained(SHAPES_MODEL, dtype="float32")
    pipe.set_progress_bar_config(disable=True)
    captions = shapes.captions(given.captions)
    batches = [captions[i : i + BATCH] for i in range(0, len(captions), BATCH)]
    embeds = [
        pipe.prior_pipe([c.text for c in batch], generator=seed, return_dict=False)
        for seed, batch in enumerate(batches)
    ]
    found = {
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "captions": given.captions,
        "steps": given.steps,
        "guidance_scale": 4.0,
    }
    target = ROOT / "tpu_scripts" / "results" / f"guidance-interval-{found['date']}.json"
    target.parent.mkdir(exist_ok=True)
    rows, full = [], None
    for interval in INTERVALS:
        began = time.perf_counter()
        pictures = generate(pipe, embeds, interval, given.steps)
        full = pictures if full is None else full
        rates = shapes.rates(map(shapes.classify, pictures), [c.truth for c in captions])
        row = {
            "interval": interval,
            "evaluations": round(evaluations(interval, given.steps), 3),
            **{part: round(float(rate), 3) for part, rate in rates.items()},
            "rms_255": round(float(np.sqrt(np.mean((pictures - full) ** 2)) * 255), 2),
        }
        rows.append(row)
        print("  ".join(f"{key} {value}" for key, value in row.items()), f" {time.perf_counter() - began:.0f} s")
        target.write_text(json.dumps(found | {"intervals": rows}, indent=2) + "\n")
    print(target)


if __name__ == "__main__":
    main()
