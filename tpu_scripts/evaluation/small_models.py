"""The rates of the small models by `evaluate`: right emoji of `tiny`; colours, shapes and grounds of the tests' model.

    python tpu_scripts/evaluation/small_models.py build/emoji/data build/rates

generates the names of the 500 commonest emoji (see train_tiny/evaluate.py) in 25 steps and 200 captions of shapes in
50, as batch jobs, and measures them. An emoji is right where the nearest of all training pictures, by MoVQ's latents,
is the asked one. Writes tpu_scripts/results/small-models-DATE.json and .md. A run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tpu_scripts" / "train_tiny")]  # the training pictures of emoji

import evaluate as emoji  # noqa: E402

from kandinsky_jax import KandinskyV22CombinedPipeline  # noqa: E402
from kandinsky_jax.batch import Job  # noqa: E402
from kandinsky_jax.common.atomic import replace_file  # noqa: E402
from kandinsky_jax.evaluation import Evaluation, NearestCandidate, Picture, PictureMetric, evaluate  # noqa: E402
from tests import shapes  # noqa: E402

MODEL = ROOT / "tests" / "shapes_model"
SEED = 11
COLUMNS = ("colour", "background", "shape", "all")


@dataclasses.dataclass(frozen=True)
class Latents:
    """Extractor of MoVQ's latents, `[D]`."""

    pipe: Any
    name: str = "latents"
    needs_prompt: bool = False
    devices: int = 1

    def fingerprint(self) -> str:
        return "MoVQ of tiny"

    def prepare(self, picture: Picture) -> np.ndarray:
        return np.asarray(picture.image)

    def encode(self, batch: np.ndarray) -> np.ndarray:
        return emoji.latents(self.pipe, batch).reshape(len(batch), -1)


def nearest_emoji(data: Path, count: int) -> tuple[list[str], NearestCandidate]:
    """Return the names of the commonest emoji, and the metric."""
    there = emoji.known(data)
    asked = {text: there.codes.index(code) for code in emoji.common(there, count) for text in there.captions[code]}
    latents = Latents(KandinskyV22CombinedPipeline.from_pretrained("tiny", dtype="float32"))
    candidates = latents.encode(there.pixels)
    return list(asked), NearestCandidate("nearest-emoji", latents, candidates, lambda name, prompt: asked[prompt])


def right_shapes(count: int) -> tuple[list[str], PictureMetric]:
    """Return captions of shapes, and the metric."""
    truths = {one.text: one.truth for one in shapes.captions(count, seed=SEED)}

    def right(picture: Picture) -> list[float]:
        rates = shapes.rates([shapes.classify(picture.image)], [truths[picture.prompt]])
        return [rates[column] for column in COLUMNS]

    return list(truths), PictureMetric("shapes", right, COLUMNS)


def measure(folder: Path, prompts: Sequence[str], metric: Any, model: str, **settings: Any) -> Evaluation:
    """Generate a picture of each prompt, and evaluate them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in prompts))
    job = Job(
        str(folder / "prompts.txt"), str(folder / "job"), model=model, batch=25, dtype="float32", defaults=settings
    )
    return evaluate(job, folder / "evaluation", metrics=[metric], clip=model)


def main() -> None:
    """Generate, measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the folder that train_tiny/pictures.py has written")
    parser.add_argument("folder", type=Path, help="for jobs and features")
    parser.add_argument("--emoji", type=int, default=500, help="default: %(default)s")
    parser.add_argument("--captions", type=int, default=200, help="of shapes, default: %(default)s")
    parser.add_argument("--output", type=Path, default=ROOT / "tpu_scripts" / "results")
    given = parser.parse_args()
    size = {"height": shapes.SIDE, "width": shapes.SIDE}
    guided = size | {"steps": 25, "guidance_scale": emoji.GUIDANCE, "prior_guidance_scale": emoji.PRIOR_GUIDANCE}
    found = {
        "tiny": measure(given.folder / "tiny", *nearest_emoji(given.data, given.emoji), model="tiny", **guided),
        "shapes": measure(given.folder / "shapes", *right_shapes(given.captions), model=str(MODEL), **size, steps=50),
    }
    target = given.output / f"small-models-{datetime.date.today().isoformat()}.json"
    numbers = {name: {"pictures": one.pictures, **one.as_json()["metrics"]} for name, one in found.items()}  # type: ignore[dict-item]
    replace_file(target, (json.dumps(numbers, indent=1) + "\n").encode())
    text = "\n".join(f"{name}\n\n{one.table()}" for name, one in found.items())
    replace_file(target.with_suffix(".md"), (text.strip() + "\n").encode())
    print(text, target, sep="\n")


if __name__ == "__main__":
    main()
