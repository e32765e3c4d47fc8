"""Pictures, masks, hints, embeddings and training data that the cases share; all from fixed seeds."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[3]
SHAPES_MODEL = ROOT / "tests" / "shapes_model"  # of coloured shapes: a prior, and decoders of three kinds
TINY = "tiny"
PROMPTS = ["purple heart", "grinning face"]
SHAPE_PROMPTS = ["a red circle on a blue background", "a green star on a white background"]


def model_path(model: str) -> str:
    """Where a model is."""
    return TINY if model == TINY else str(SHAPES_MODEL)


def picture(seed: int = 0, height: int = 70, width: int = 90) -> Image.Image:
    """A smooth RGB picture of no model's size."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def mask(height: int = 64, width: int = 64) -> np.ndarray:
    """Bool, true in a rectangle."""
    found = np.zeros((height, width), bool)
    found[12 : height - 20, 8:40] = True
    return found


def depth(height: int = 50, width: int = 64) -> np.ndarray:
    """A 16-bit depth map of a slope with a ball."""
    y, x = np.mgrid[:height, :width]
    ball = np.hypot(y - height / 2, x - width / 2) < 15
    return (np.where(ball, 40000, 200 * y + 100 * x)).astype(np.uint16)


def hint(height: int = 64, width: int = 64) -> np.ndarray:
    """A ready hint `[3, H, W]` in 0..1."""
    slope = np.linspace(0, 1, height * width, dtype=np.float32).reshape(height, width)
    return np.stack([slope] * 3)


def embeds(dim: int, seed: int, count: int = 1) -> np.ndarray:
    """Image embeddings of noise, float32 `[count, dim]`."""
    return np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)


@functools.cache
def pipeline(name: str, model: str, dtype: str = "float32") -> Any:
    """A pipeline of the public API; those of one model share their components."""
    import kandinsky_jax as kj

    cls = getattr(kj, name)
    if name == "KandinskyV22CombinedPipeline":
        found = cls.from_pretrained(model_path(model), dtype=dtype)
    elif "Inpaint" in name or "Controlnet" in name:
        kind = "Inpaint" if "Inpaint" in name else "Controlnet"
        first = f"KandinskyV22{kind}Pipeline"
        whole = pipeline("KandinskyV22CombinedPipeline", model, dtype)
        if name == first:
            found = cls.from_pretrained(model_path(model), dtype=dtype, movq=whole.movq)
        else:
            decoder = pipeline(first, model, dtype)
            found = cls.from_pipe(whole, decoder) if "Combined" in name else cls.from_pipe(decoder)
    else:
        found = cls.from_pipe(pipeline("KandinskyV22CombinedPipeline", model, dtype))
    found.set_progress_bar_config(disable=True)
    return found


def training_data(folder: Path, count: int = 6, hints: bool = False) -> Path:
    """A folder of captioned pictures with metadata.jsonl."""
    folder.mkdir(parents=True)
    with (folder / "metadata.jsonl").open("w") as file:
        for i in range(count):
            picture(i, 64, 70).save(folder / f"{i}.png")
            line = {"file_name": f"{i}.png", "text": (PROMPTS + SHAPE_PROMPTS)[i % 4]}
            if hints:
                Image.fromarray(depth(64, 70)).save(folder / f"hint{i}.png")
                line["hint_file_name"] = f"hint{i}.png"
            file.write(json.dumps(line) + "\n")
    return folder
