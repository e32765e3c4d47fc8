"""Train weak decoders for autoguidance: the UNets of `tiny` and of the tests' shapes from nothing, for a short time.

    python tpu_scripts/guiders/weak.py build/emoji/data build/guiders

writes build/guiders/{tiny,shapes}/decoder/model, which `autoguidance:model=FOLDER` takes. Autoguidance wants a
model with the same faults, only more of them: less trained, as here, or smaller. A training goes
on where it was stopped.
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
STEPS, RATE = 700, 1.5e-3
PICTURES = (600, 2)  # captions of shapes, and drawings of each


def untrained(model: str | Path, folder: Path) -> Path:
    """Write a family with random weights in its UNet."""
    if not folder.exists():
        pipe: Any = KandinskyV22CombinedPipeline.from_pretrained(model, dtype="float32")
        pipe.unet = type(pipe.unet).from_config(pipe.unet.config.to_dict())
        pipe.save_pretrained(folder)
    return folder


def train(model: Path, data: Path, output: Path) -> None:
    """Train a decoder for a tenth of what the model was trained."""
    if (output / "model").exists():
        return
    config = Config(
        model=str(model),
        data=str(data),
        output=str(output),
        resolution=64,
        train_batch_size=64,
        snr_gamma=5.0,
        condition_dropout=0.1,
        precompute=True,
        optimizer=OptimizerConfig(
            learning_rate=RATE,
            lr_scheduler="cosine",
            lr_warmup_steps=50,
            max_train_steps=STEPS,
            adam_weight_decay=0.0,
            ema_decay=0.98,
        ),
    )
    Run(Kind.DECODER, config).train()


def main() -> None:
    """Train what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the folder that train_tiny/pictures.py has written")
    parser.add_argument("output", type=Path)
    given = parser.parse_args()
    write_pictures(given.output / "shapes-data", *PICTURES)
    data = {"tiny": given.data / "pictures.tar", "shapes": given.output / "shapes-data"}
    for name, pictures in data.items():
        model = untrained(MODELS[name], given.output / f"untrained-{name}")
        train(model, pictures, given.output / name / Kind.DECODER)


if __name__ == "__main__":
    main()
