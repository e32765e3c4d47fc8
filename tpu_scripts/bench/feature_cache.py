"""What cached features (DeepCache) cost in quality and bring, with `tiny` and with the tests' model of shapes.

    python tpu_scripts/bench/feature_cache.py build/emoji/data

generates the names of the 500 commonest emoji in 25 guided steps (see train_tiny/evaluate.py) and 200 captions of
shapes in 50, with the same noise for `cache_interval` 1, 2, 3 and 5. Prints and writes the shares of right pictures,
the distance from the pictures without a cache, FLOPs of the UNet as XLA counts them, and seconds of the decoder's loop
in turns; to tpu_scripts/results/feature-cache-DATE.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tpu_scripts" / "train_tiny")]  # the scorers

import evaluate  # noqa: E402
from evaluate_fast import USUAL, Judge  # noqa: E402

from kandinsky_jax import KandinskyV22CombinedPipeline  # noqa: E402
from kandinsky_jax.common.atomic import replace_file  # noqa: E402
from kandinsky_jax.diffusion import Network  # noqa: E402
from kandinsky_jax.models.unet import FeatureCache  # noqa: E402
from tests import shapes  # noqa: E402

INTERVALS = (1, 2, 3, 5)
TURNS = 5
SEED, BATCH = 11, 25
SHAPES_CALL = {"num_inference_steps": 50, "guidance_scale": 4.0, "prior_guidance_scale": 4.0}


def flops(unet: Any, side: int, images: int = 2) -> tuple[float, float]:
    """FLOPs of an evaluation, and of one with kept features, as XLA counts the compiled programs."""
    network, params = Network.split(unet)
    sample = jnp.zeros((images, side, side, 4))
    condition = unet.condition(jnp.zeros((images, unet.config.encoder_hid_dim)))
    features = unet.feature_cache(images, side, side, np.array([True])).features

    def whole(params: Any, sample: jax.Array, condition: Any) -> jax.Array:
        return network.bind(params)(sample, 500, condition)

    def kept(params: Any, sample: jax.Array, condition: Any, features: jax.Array) -> jax.Array:
        cache = FeatureCache(features, jnp.array([False]), jnp.int32(0))
        return network.bind(params)(sample, 500, condition, cache=cache)[0]

    return tuple(
        float(jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"])
        for function, arguments in (
            (whole, (params, sample, condition)),
            (kept, (params, sample, condition, features)),
        )
    )


def measure(
    name: str, pipe: Any, generate: Callable[[int], np.ndarray], rate: Callable[[np.ndarray], float], steps: int
) -> list[dict[str, Any]]:
    """One row for each interval.

    Args:
        generate: the pictures of an interval, float `[N, H, W, 3]` in 0..1.
        rate: the share of them that is right.
        steps: of the decoder.
    """
    whole, kept = flops(pipe.unet, evaluate.SIDE // 8)
    rows: list[dict[str, Any]] = []
    for interval in INTERVALS:
        pictures = generate(interval)
        full = pictures if interval == 1 else full  # noqa: F821
        refreshed = -(-steps // interval)
        rows.append(
            {
                "model": name,
                "cache_interval": interval,
                "right": round(float(rate(pictures)), 4),
                "rms_255": round(float(np.sqrt(np.mean((pictures - full) ** 2)) * 255), 2),
                "fewer_flops": round(steps * whole / (refreshed * whole + (steps - refreshed) * kept), 2),
            }
        )
        print(rows[-1], flush=True)
    return rows


def seconds(pipe: Any, call: dict[str, Any]) -> dict[int, float]:
    """Medians of a decoder's call in turns, by interval."""
    embeds = pipe.prior_pipe(["red"] * 8, num_inference_steps=2, generator=0, return_dict=False)
    settings = {name: value for name, value in call.items() if not name.startswith("prior_")}
    settings |= {"height": evaluate.SIDE, "width": evaluate.SIDE, "output_type": "latent", "generator": 0}
    found: dict[int, list[float]] = {interval: [] for interval in INTERVALS}
    for turn in range(TURNS + 1):
        for interval, times in found.items():
            began = time.perf_counter()
            pipe.decoder_pipe(*embeds, cache_interval=interval, **settings)
            if turn:  # the first compiles
                times.append(time.perf_counter() - began)
    return {interval: statistics.median(times) for interval, times in found.items()}


def tiny(data: Path, count: int | None) -> list[dict[str, Any]]:
    """Measure the embedded model."""
    there = evaluate.known(data)
    asked = [(code, text) for code in evaluate.common(there, 500) for text in there.captions[code]][:count]
    pipe = KandinskyV22CombinedPipeline.from_pretrained("tiny", dtype="float32")
    pipe.set_progress_bar_config(disable=True)
    judge = Judge(pipe, there, asked)

    def generate(interval: int) -> np.ndarray:
        settings = USUAL | {"cache_interval": interval}
        return evaluate.generate(pipe, [text for _, text in asked], **settings)[0] / np.float32(255)

    rows = measure(
        "tiny",
        pipe,
        generate,
        lambda x: judge.right((x * 255).round().astype(np.uint8)).mean(),
        USUAL["num_inference_steps"],
    )
    return timed(rows, seconds(pipe, USUAL))


def coloured_shapes(count: int) -> list[dict[str, Any]]:
    """Measure the tests' model."""
    asked = shapes.captions(count, seed=SEED)
    pipe = KandinskyV22CombinedPipeline.from_pretrained(ROOT / "tests" / "shapes_model", dtype="float32")
    pipe.set_progress_bar_config(disable=True)

    def generate(interval: int) -> np.ndarray:
        found = []
        for first in tqdm(range(0, count, BATCH), desc="generate", unit="batch"):
            texts = [one.text for one in asked[first : first + BATCH]]
            size = {"height": shapes.SIDE, "width": shapes.SIDE, "output_type": "np"}
            settings = SHAPES_CALL | size | {"cache_interval": interval, "generator": first}
            found.append(pipe(texts, **settings).images)
        return np.concatenate(found)

    def rate(pictures: np.ndarray) -> float:
        return shapes.rates(map(shapes.classify, pictures), [one.truth for one in asked])["all"]

    rows = measure("shapes", pipe, generate, rate, SHAPES_CALL["num_inference_steps"])
    return timed(rows, seconds(pipe, SHAPES_CALL))


def timed(rows: list[dict[str, Any]], medians: dict[int, float]) -> list[dict[str, Any]]:
    """Add how many times faster the decoder's loop is."""
    return [row | {"faster": round(medians[1] / medians[row["cache_interval"]], 2)} for row in rows]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the folder that train_tiny/pictures.py has written")
    parser.add_argument("--names", type=int, help="of emoji; default: all 782")
    parser.add_argument("--captions", type=int, default=200, help="of shapes, default 200")
    parser.add_argument("--output", type=Path, default=ROOT / "tpu_scripts" / "results")
    given = parser.parse_args()
    found: dict[str, Any] = {"date": datetime.date.today().isoformat(), "cpus": os.cpu_count()}
    found["intervals"] = coloured_shapes(given.captions) + tiny(given.data, given.names)
    target = given.output / f"feature-cache-{found['date']}.json"
    replace_file(target, (json.dumps(found, indent=1) + "\n").encode())
    print(json.dumps(found["intervals"], indent=1), target)


if __name__ == "__main__":
    main()
