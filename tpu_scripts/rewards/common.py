"""What the measurements of rewards share: names of emoji, their embeddings, results, contact sheets."""

from __future__ import annotations

import datetime
import json
import sys
import time
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from kandinsky_jax import DDIMScheduler, KandinskyV22CombinedPipeline, diffusion, rewards  # noqa: E402

COMMON = ROOT / "tpu_scripts" / "train_tiny" / "common.txt"
SIDE = 64
GUIDANCE = 2.0  # what `tiny` recommends
STEPS = 10


def names(count: int | None = None) -> list[str]:
    """The Unicode names of the commonest emoji of one code point, all of which `tiny` has been trained on."""
    lines = [line.split("-")[0] for line in COMMON.read_text().splitlines() if not line.startswith("#")]
    found = dict.fromkeys(unicodedata.name(chr(int(code, 16)), "").lower() for code in lines if code.strip())
    return [name for name in found if name][:count]


def load() -> Any:
    """The embedded model, float32."""
    pipe = KandinskyV22CombinedPipeline.from_pretrained("tiny", dtype="float32")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def embeddings(pipe: Any, prompts: Sequence[str], seed: int = 0) -> np.ndarray:
    """What the prior generates, without guidance, float32 `[N, D]`."""
    found = []
    for start in range(0, len(prompts), 50):
        some = list(prompts[start : start + 50])
        some += [some[-1]] * (50 - len(some))  # one shape, one program
        output = pipe.prior_pipe(some, guidance_scale=1.0, generator=[seed] * 50)
        found.append(np.asarray(output.image_embeds, np.float32))
    return np.concatenate(found)[: len(prompts)]


def sampler(pipe: Any, eta: float = 0.0, steps: int = STEPS, scale: float = GUIDANCE) -> rewards.DecoderSampler:
    """The decoder with DDIM and guidance; none at scale 1."""
    schedule = DDIMScheduler.from_config(pipe.scheduler.config, eta=eta).schedule(steps)
    guider = diffusion.NoGuidance() if scale == 1 else diffusion.ClassifierFreeGuidance(scale)
    return rewards.DecoderSampler.from_pipeline(pipe, schedule, guider=guider, height=SIDE, width=SIDE)


def mean_of(values: np.ndarray) -> dict[str, float]:
    """Mean and standard error."""
    return {"mean": float(np.mean(values)), "standard_error": float(np.std(values, ddof=1) / np.sqrt(len(values)))}


def write(name: str, began: float, found: dict[str, Any]) -> Path:
    """Write a dated result."""
    path = ROOT / "tpu_scripts" / "results" / f"{name}-{datetime.date.today():%Y-%m-%d}.json"
    about = {"seconds": round(time.time() - began), "jax": jax.__version__, "device": jax.devices()[0].device_kind}
    path.write_text(json.dumps(about | found, indent=1) + "\n")
    print(path)
    return path


def sheet(path: Path, rows: dict[str, np.ndarray], columns: Sequence[str] = ()) -> None:
    """A contact sheet of rows of pictures `[N, 64, 64, 3]` in 0..1, with a label before each row."""
    left, top = 92, 14 if columns else 0
    count = max(map(len, rows.values()))
    whole = Image.new("RGB", (left + SIDE * count, top + SIDE * len(rows)), "white")
    pen = ImageDraw.Draw(whole)
    for x, text in enumerate(columns):
        pen.text((left + SIDE * x + 2, 1), text[:11], fill=0, font_size=10)
    for y, (label, pictures) in enumerate(rows.items()):
        pen.multiline_text((2, top + SIDE * y + 18), label, fill=0, font_size=11)
        for x, picture in enumerate(pictures):
            tile = Image.fromarray((np.asarray(picture) * 255).round().astype(np.uint8))
            whole.paste(tile, (left + SIDE * x, top + SIDE * y))
    whole.quantize(128).save(path, optimize=True)
    print(path)
