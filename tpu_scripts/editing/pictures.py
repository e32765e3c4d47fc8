"""Generate the pictures of docs/editing.md.

python tpu_scripts/editing/pictures.py

writes docs/editing.png, what the programs in examples/editing write, one a row; and docs/editing_shapes.png, drawings
of shapes and their edits by the settings of measure.py. A few minutes on two CPU cores.
"""

from __future__ import annotations

import os
import runpy
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tpu_scripts" / "editing")]

import measure  # noqa: E402

EXAMPLES = ("ddim_inversion", "edit_by_prompt", "edit_by_arithmetic", "edit_in_mask", "null_embeds")
SHOWN, SCALE = 10, 2


def write(name: str, rows: Sequence[Image.Image]) -> None:
    """Write rows of pictures below each other, enlarged, to docs."""
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    sheet = sheet.resize((sheet.width * SCALE, sheet.height * SCALE), Image.Resampling.NEAREST)
    sheet.convert("P", palette=Image.Palette.ADAPTIVE, colors=256).save(ROOT / "docs" / f"{name}.png", optimize=True)


def of_examples() -> list[Image.Image]:
    """What the examples write."""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for name in EXAMPLES:
            runpy.run_path(str(ROOT / "examples" / "editing" / f"{name}.py"))
        rows = [Image.open(f"{name}.png").convert("RGB") for name in EXAMPLES]
        os.chdir(ROOT)
    return rows


def of_shapes() -> list[Image.Image]:
    """Drawings, and their edits by each setting."""
    made = measure.Edits(measure.drawn(measure.load("shapes"), 48, measure.CHOICE_SEEDS[0]), measure.CHOICE_SEEDS[0])
    rows = [made.given.pixels, *map(made.pictures, measure.SETTINGS)]
    strips = [np.concatenate(list(row[:SHOWN]), axis=1) for row in rows]
    return [Image.fromarray((strip * 255).round().astype(np.uint8)) for strip in strips]


if __name__ == "__main__":
    write("editing", of_examples())
    write("editing_shapes", of_shapes())
