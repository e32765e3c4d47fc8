"""Generate docs/examples.png: the pictures that the programs in examples/ write, side by side, enlarged.

python tpu_scripts/example_pictures.py
"""

from __future__ import annotations

import os
import runpy
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[1]
EXAMPLES = ("guidance_grid", "attention_maps", "own_guider", "swapped_block")
SCALE = 2


def main() -> None:
    """Run the examples in a folder that is removed afterwards, and paste their pictures."""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for name in EXAMPLES:
            runpy.run_path(str(ROOT / "examples" / f"{name}.py"))
        pictures = [Image.open(f"{name}.png").convert("RGB") for name in EXAMPLES]
        os.chdir(ROOT)
    sheet = Image.new("RGB", (sum(p.width for p in pictures), max(p.height for p in pictures)), "white")
    left = 0
    for picture in pictures:
        sheet.paste(picture, (left, 0))
        left += picture.width
    sheet.resize((sheet.width * SCALE, sheet.height * SCALE)).save(ROOT / "docs" / "examples.png")


if __name__ == "__main__":
    main()
