"""Write docs/guiders.png: the pictures of examples/guiders/high_scales.py, with the names of rows and columns.

python tpu_scripts/guiders/pictures.py
"""

from __future__ import annotations

import os
import runpy
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[2]
SIDE, LEFT, TOP = 96, 96, 16


def main() -> None:
    """Run the example and write its pictures larger, with labels."""
    target = ROOT / "docs" / "guiders.png"
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        rows = runpy.run_path(str(ROOT / "examples" / "guiders" / "high_scales.py"))["rows"]
        os.chdir(ROOT)
    columns = len(next(iter(rows.values())))
    sheet = Image.new("RGB", (LEFT + columns * SIDE, TOP + len(rows) * SIDE), "white")
    pen = ImageDraw.Draw(sheet)
    for i, text in enumerate(("scale 2", "4", "8", "16")):
        pen.text((LEFT + i * SIDE + 4, 2), text, fill=0)
    for j, (name, row) in enumerate(rows.items()):
        pen.text((4, TOP + j * SIDE + SIDE // 2 - 8), name.partition(":")[0], fill=0)
        if name == "cfg++":
            pen.text((4, TOP + j * SIDE + SIDE // 2 + 4), "0.2 0.4 0.7 1", fill=0)
        for i, picture in enumerate(row):
            tile = Image.fromarray((picture * 255).astype("uint8")).resize((SIDE, SIDE), Image.Resampling.NEAREST)
            sheet.paste(tile, (LEFT + i * SIDE, TOP + j * SIDE))
    sheet.save(target, optimize=True)
    print(target)


if __name__ == "__main__":
    main()
