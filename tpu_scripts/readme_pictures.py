"""Draws the README's pictures with the embedded model: `python tpu_scripts/readme_pictures.py`."""

from __future__ import annotations

import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from kandinsky_jax import KandinskyV22CombinedPipeline

DOCS = Path(__file__).parents[1] / "docs"
PROMPTS = [
    "a red circle on a blue background",
    "large yellow star, black background",
    "a green background with a purple ring",
    "white cross on gray",
    "a blue triangle on a yellow background",
    "an orange square on a white background",
]
ZOOM, GAP, CAPTION = 2, 8, 30


def main() -> None:
    """Draw each prompt once, as one batch with seed 0, and set the pictures side by side over their prompts."""
    pipe = KandinskyV22CombinedPipeline.from_pretrained("tiny")
    pictures = pipe(PROMPTS, height=64, width=64, num_inference_steps=50, generator=0).images
    side = 64 * ZOOM
    sheet = Image.new("RGB", (len(pictures) * (side + GAP) + GAP, side + CAPTION + 2 * GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for i, (picture, prompt) in enumerate(zip(pictures, PROMPTS, strict=True)):
        left = GAP + i * (side + GAP)
        sheet.paste(picture.resize((side, side), Image.Resampling.LANCZOS), (left, GAP))
        draw.multiline_text((left, GAP + side + 2), textwrap.fill(prompt, 21), "black", font)
    DOCS.mkdir(exist_ok=True)
    sheet.save(DOCS / "tiny.png")
    print(DOCS / "tiny.png")


if __name__ == "__main__":
    main()
