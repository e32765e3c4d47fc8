"""Generates the README's picture and that of every mode: `python tpu_scripts/readme_pictures.py`."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from kandinsky_jax import KandinskyV22CombinedPipeline

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PROMPTS = ["purple heart", "cat face", "christmas tree", "soccer ball", "crown", "extraterrestrial alien"]
# name in the block -> mode, and what it was given
MODES = {
    "face": ("text to image", []),
    "panda": ("image to image", ["face"]),
    "cool": ("inpainting", ["face", "mask"]),
    "ball": ("depth hint", ["depth"]),
    "apple": ("picture and hint", ["face", "depth"]),
    "mixed": ("a prompt and a picture, mixed", ["cool"]),
    "varied": ("a variation", ["face"]),
}
SIDE, GAP, CAPTION = 128, 8, 30


def modes_block() -> str:
    """The code of docs/modes.md."""
    [block] = re.findall(r"```python\n(.*?)```", (DOCS / "modes.md").read_text(), re.DOTALL)
    return block


def tile(given: Any, side: int) -> Image.Image:
    """A picture, mask or depth map as a square."""
    if not isinstance(given, Image.Image):
        given = Image.fromarray(np.asarray(given if given.dtype == np.uint8 else given * 255.0, np.uint8))
    return given.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)


def draw_prompts() -> Image.Image:
    """Each prompt once, as one batch with seed 0, side by side over their prompts."""
    pipe = KandinskyV22CombinedPipeline.from_pretrained("tiny")
    weak = {"guidance_scale": 2.0, "prior_guidance_scale": 1.0}
    pictures = pipe(PROMPTS, height=64, width=64, num_inference_steps=50, generator=0, **weak).images
    sheet = Image.new("RGB", (len(pictures) * (SIDE + GAP) + GAP, SIDE + CAPTION + 2 * GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for i, (picture, prompt) in enumerate(zip(pictures, PROMPTS, strict=True)):
        left = GAP + i * (SIDE + GAP)
        sheet.paste(tile(picture, SIDE), (left, GAP))
        draw.multiline_text((left, GAP + SIDE + 2), textwrap.fill(prompt, 21), "black", font)
    return sheet


def draw_modes() -> Image.Image:
    """The results of the block, each mode's picture below its inputs."""
    made: dict[str, Any] = {}
    exec(compile(modes_block(), "modes.md", "exec"), made)
    half = SIDE // 2
    sheet = Image.new("RGB", (len(MODES) * (SIDE + GAP) + GAP, half + SIDE + CAPTION + 3 * GAP), (236, 236, 236))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for i, (name, (mode, given)) in enumerate(MODES.items()):
        left = GAP + i * (SIDE + GAP)
        for j, source in enumerate(given):
            offset = (SIDE - half * len(given)) // 2 + j * half
            sheet.paste(tile(made[source], half - 4), (left + offset + 2, GAP))
        sheet.paste(tile(made[name], SIDE), (left, half + 2 * GAP))
        draw.multiline_text((left, half + SIDE + 2 * GAP + 2), textwrap.fill(mode, 21), "black", font)
    return sheet


def main() -> None:
    """Write both sheets."""
    DOCS.mkdir(exist_ok=True)
    for name, sheet in {"tiny.png": draw_prompts(), "modes.png": draw_modes()}.items():
        sheet.save(DOCS / name)
        print(DOCS / name)


if __name__ == "__main__":
    main()
