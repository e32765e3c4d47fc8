"""Sets of true pictures of coloured shapes, which the shapes model's own CLIP can judge."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kandinsky_jax import images
from kandinsky_jax.batch.shards import GeneratedImage, Output
from kandinsky_jax.evaluation import CLIPTowers
from tests import shapes
from tests.conftest import SHAPES_MODEL

Drawn = Sequence[tuple[str, Image.Image]]  # (prompt, picture)


def drawn(count: int, seed: int = 0) -> list[tuple[str, Image.Image]]:
    """True pictures of different captions."""
    rng = np.random.default_rng(seed)
    return [
        (asked.text, Image.fromarray((shapes.draw(asked, rng) * 255).round().astype(np.uint8)))
        for asked in shapes.captions(count, seed)
    ]


def write_job(url: str, pictures: Drawn, per_shard: int = 8, form: str = "webdataset", errors: int = 0) -> Output:
    """Write pictures as a batch job does; the last `errors` rows are ones that failed."""
    output = Output(url, form, "png")
    count = len(pictures) + errors
    output.begin(
        {
            "rows": {"count": count, "sha256": ""},
            "rows_per_shard": per_shard,
            "format": form,
            "pictures": "png",
            "mode": "generate",
            "defaults": {"num_images": 1},
        }
    )
    for shard in range(-(-count // per_shard)):
        rows = range(shard * per_shard, min(count, (shard + 1) * per_shard))
        good = [
            GeneratedImage(f"{i:09d}", images.encode(pictures[i][1], "png"), {"prompt": pictures[i][0], "seed": i})
            for i in rows
            if i < len(pictures)
        ]
        failed = [{"row": i, "id": None, "error": "prompt is missing or empty"} for i in rows if i >= len(pictures)]
        output.write(shard, good, failed)
    return output


def write_folder(folder: Path, pictures: Drawn) -> Path:
    """Write pictures as a folder with metadata.jsonl."""
    folder.mkdir()
    lines = []
    for i, (prompt, picture) in enumerate(pictures):
        picture.save(folder / f"{i:05d}.png")
        lines.append(json.dumps({"file_name": f"{i:05d}.png", "text": prompt}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="session")
def towers() -> CLIPTowers:
    """The shapes model's CLIP."""
    return CLIPTowers.from_pretrained(SHAPES_MODEL)
