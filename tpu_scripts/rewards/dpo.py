"""Diffusion-DPO on the model of shapes: pairs that prefer one colour, measured on captions without a colour.

    python tpu_scripts/rewards/dpo.py dpo-prior
    python tpu_scripts/rewards/dpo.py dpo-decoder --learning-rate 1e-3 --beta 200

Trains by `kandinsky-jax train KIND`, on pairs of true pictures of the same shape and ground, one of them preferred.
Measures on captions that training did not see, whose shape and ground are counted too, with the same noise before and
after. Writes tpu_scripts/results/KIND-DATE.json and docs/rewards-KIND.png.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import numpy as np
from PIL import Image

from kandinsky_jax import KandinskyV22CombinedPipeline
from kandinsky_jax.lora import LoraConfig
from kandinsky_jax.training.config import Config
from kandinsky_jax.training.dpo import DPOConfig
from kandinsky_jax.training.kinds import Kind
from kandinsky_jax.training.loop import Run
from kandinsky_jax.training.step import OptimizerConfig
from tests import shapes

MODEL = common.ROOT / "tests" / "shapes_model"
GROUNDS = ("green", "yellow", "white", "black", "gray")  # those on which the preferred colour can be seen
MEASURED, SHOWN, BATCH = 100, 9, 25
CALL = {"height": 64, "width": 64, "num_inference_steps": 25, "guidance_scale": 4.0, "prior_guidance_scale": 4.0}


def captions(preferred: str) -> list[shapes.Caption]:
    """Every caption that leaves the colour open, in a random order; their truth has the preferred colour."""
    found = []
    for shape in shapes.SHAPES:
        for ground in GROUNDS:
            for size in shapes.RADII:
                for template in shapes.TEMPLATES:
                    asked = shapes.caption(shapes.Verdict(preferred, ground, shape), size, template)
                    words = asked.text.replace(f"{preferred} ", "")
                    found.append(asked.__class__(words.replace("an " + shape, "a " + shape), asked.truth, size))
    return [found[i] for i in np.random.default_rng(0).permutation(len(found))]


def write_pairs(folder: Path, asked: list[shapes.Caption]) -> None:
    """Write true pictures: of the preferred colour, and of another one at the same place."""
    lines = []
    for i, each in enumerate(asked):
        rng = np.random.default_rng(i)
        others = [name for name in shapes.COLOURS if name not in (each.truth.colour, each.truth.background)]
        truth = shapes.Verdict(str(rng.choice(others)), each.truth.background, each.truth.shape)
        for name, caption in (("preferred", each), ("rejected", shapes.Caption(each.text, truth, each.size))):
            picture = shapes.draw(caption, np.random.default_rng(i))
            Image.fromarray((picture * 255).round().astype(np.uint8)).save(folder / f"{i}-{name}.png")
        row = {"file_name": f"{i}-preferred.png", "rejected_file_name": f"{i}-rejected.png", "text": each.text}
        lines.append(json.dumps(row))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def generate(pipe: Any, asked: list[shapes.Caption]) -> np.ndarray:
    """A picture of each caption, `[N, 64, 64, 3]` in 0..1; picture i has the noise of seed i."""
    found = []
    for start in range(0, len(asked), BATCH):
        some = [each.text for each in asked[start : start + BATCH]]
        seeds = list(range(start, start + BATCH))
        found.append(pipe(some, generator=seeds, output_type="np", **CALL).images)
    return np.concatenate(found)


def counts(pictures: np.ndarray, asked: list[shapes.Caption]) -> dict[str, int]:
    """How many pictures have the preferred colour, and the shape and the ground that were asked for."""
    verdicts = [shapes.classify(picture) for picture in pictures]
    rates = shapes.rates(verdicts, [each.truth for each in asked])
    return {name: round(rate * len(asked)) for name, rate in rates.items()}


def main() -> None:
    """Train, measure and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=["dpo-decoder", "dpo-prior"])
    parser.add_argument("--preferred", default="blue")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--beta", type=float, default=30.0)
    parser.add_argument("--rank", type=int, default=8)
    args = parser.parse_args()
    began = time.time()
    asked = captions(args.preferred)
    seen, unseen = asked[MEASURED:], asked[:MEASURED]
    pipe = KandinskyV22CombinedPipeline.from_pretrained(MODEL, dtype="float32")
    pipe.set_progress_bar_config(disable=True)
    pictures = {"before": generate(pipe, unseen)}
    found: dict[str, Any] = {"before": counts(pictures["before"], unseen)}
    print(found, flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "data"
        data.mkdir()
        write_pairs(data, seen)
        config = Config(
            model=str(MODEL),
            data=str(data),
            output=str(Path(scratch) / "out"),
            resolution=64,
            train_batch_size=16,
            precompute=True,
            checkpointing_steps=args.steps,
            optimizer=OptimizerConfig(learning_rate=args.learning_rate, max_train_steps=args.steps),
            lora=LoraConfig(rank=args.rank),
            dpo=DPOConfig(beta=args.beta),
        )
        result = Run(Kind(args.kind), config, pipe).train()
        rows = [json.loads(line) for line in (Path(scratch) / "out" / "metrics.jsonl").read_text().splitlines()]
        pipe.load_lora_weights(result)
    pictures["after"] = generate(pipe, unseen)
    found["after"] = counts(pictures["after"], unseen)
    print(found, flush=True)
    found |= {"pictures": MEASURED, "pairs": len(seen), "loss": [round(row["loss"], 4) for row in rows[::10]]}
    common.write(args.kind, began, {name: getattr(args, name) for name in vars(args)} | found)
    some = {name: images[:SHOWN] for name, images in pictures.items()}
    labels = [f"{each.truth.shape}, {each.truth.background}" for each in unseen[:SHOWN]]
    common.sheet(common.ROOT / "docs" / f"rewards-{args.kind}.png", some, labels)


if __name__ == "__main__":
    main()
