"""Train weak models for autoguidance: the networks of `tiny` and of the tests' shapes from nothing, for a short time.

    python tpu_scripts/guiders/weak.py build/emoji/data build/guiders

writes build/guiders/{tiny,shapes}/{decoder,prior}/model, which `autoguidance:model=FOLDER` takes. Autoguidance wants a
model with the same faults, only more of them: less trained, as here, or smaller. A quarter of an hour on two CPU cores;
each training goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from kandinsky_jax import KandinskyV22CombinedPipeline  # noqa: E402
from kandinsky_jax.training.config import Config  # noqa: E402
from kandinsky_jax.training.kinds import Kind  # noqa: E402
from kandinsky_jax.training.loop import Run  # noqa: E402
from kandinsky_jax.training.step import OptimizerConfig  # noqa: E402
from tpu_scripts.few_steps.shapes import write_pictures  # noqa: E402

MODELS = {"tiny": "tiny", "shapes": ROOT / "tests" / "shapes_model"}
STEPS = {Kind.DECODER: 700, Kind.PRIOR: 300}
RATES = {Kind.DECODER: 1.5e-3, Kind.PRIOR: 1e-3}
PICTURES = (600, 2)  # captions of shapes, and drawings of each


def untrained(model: str | Path, folder: Path) -> Path:
    """Write a family with random weights in its UNet and prior."""
    if not folder.exists():
        pipe: Any = KandinskyV22CombinedPipeline.from_pretrained(model, dtype="float32")
        pipe.unet = type(pipe.unet).from_config(pipe.unet.config.to_dict())
        prior = type(pipe.prior_prior).from_config(pipe.prior_prior.config.to_dict())
        prior.clip_mean[...], prior.clip_std[...] = pipe.prior_prior.clip_mean[...], pipe.prior_prior.clip_std[...]
        pipe.prior_prior = prior
        pipe.save_pretrained(folder)
    return folder


def train(kind: Kind, model: Path, data: Path, output: Path) -> None:
    """Train a network for a tenth of what the model was trained."""
    if (output / "model").exists():
        return
    config = Config(
        model=str(model),
        data=str(data),
        output=str(output),
        resolution=64,
        train_batch_size=64,
        text_length=24,
        snr_gamma=5.0 if kind == Kind.DECODER else None,
        condition_dropout=0.1,
        precompute=True,
        optimizer=OptimizerConfig(
            learning_rate=RATES[kind],
            lr_scheduler="cosine",
            lr_warmup_steps=50,
            max_train_steps=STEPS[kind],
            adam_weight_decay=0.0,
            ema_decay=0.98,
        ),
    )
    Run(kind, config).train()


def main() -> None:
    """Train what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the folder that train_tiny/pictures.py has written")
    parser.add_argument("output", type=Path)
    given = parser.parse_args()
    write_pictures(given.output / "shapes-data", *PICTURES)
    data = {
        ("tiny", Kind.DECODER): given.data / "pictures.tar",
        ("tiny", Kind.PRIOR): given.data / "captions.tar",
        ("shapes", Kind.DECODER): given.output / "shapes-data",
        ("shapes", Kind.PRIOR): given.output / "shapes-data",
    }
    for (name, kind), pictures in data.items():
        model = untrained(MODELS[name], given.output / f"untrained-{name}")
        train(kind, model, pictures, given.output / name / kind)


if __name__ == "__main__":
    main()
