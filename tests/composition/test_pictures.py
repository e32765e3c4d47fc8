"""Grids and GIFs in files."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageSequence

from kandinsky_jax import composition

PIXELS = np.linspace(-1, 1, 6)[:, None, None, None] * np.ones((6, 8, 8, 3))
LEVELS = [0, 51, 102, 153, 204, 255]


def test_a_grid_is_written_row_by_row(tmp_path):
    for given in (PIXELS, jnp.asarray(PIXELS), composition.to_pictures(PIXELS)):
        composition.save_grid(given, tmp_path / "grid.png", columns=3)
        with Image.open(tmp_path / "grid.png") as image:
            grid = np.asarray(image)
        assert grid.shape == (16, 24, 3)
        np.testing.assert_array_equal(grid[::8, ::8, 0], np.reshape(LEVELS, (2, 3)))
    composition.save_grid(PIXELS, str(tmp_path / "grid.webp"))
    with Image.open(tmp_path / "grid.webp") as row:
        assert row.size == (48, 8)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid.png", "grid.webp"]


def frames_of(path):
    with Image.open(path) as image:
        found = [
            (np.asarray(frame.convert("RGB"))[0, 0, 0], frame.info["duration"])
            for frame in ImageSequence.Iterator(image)
        ]
        return found, image.info.get("loop")


def test_a_gif_has_its_frames_and_its_duration(tmp_path):
    composition.save_gif(PIXELS, tmp_path / "forth.gif", seconds=3)
    assert frames_of(tmp_path / "forth.gif") == ([(level, 500) for level in LEVELS], 0)
    composition.save_gif(PIXELS, tmp_path / "back.gif", seconds=3, back=True, loop=False)
    found, loop = frames_of(tmp_path / "back.gif")
    assert found == [(level, 300) for level in [*LEVELS, 204, 153, 102, 51]]
    assert loop is None
    composition.save_gif(PIXELS, tmp_path / "fast.gif", seconds=0.001)
    assert frames_of(tmp_path / "fast.gif")[0][0][1] == 20
    assert not list(tmp_path.glob(".*"))


def test_what_cannot_be_written_leaves_the_file_that_is_there(tmp_path):
    path = tmp_path / "old.gif"
    path.write_bytes(b"old")
    uneven = [Image.new("RGB", (8, 8)), Image.new("RGB", (8, 9))]
    for frames, seconds, message in (
        ([], 1, "frames is empty"),
        (uneven, 1, r"frames have sizes \(8, 8\) and \(8, 9\)"),
        (PIXELS[0], 1, r"pixels have the shape \[8, 8, 3\]; needed is \[B, H, W, 3\]"),
        (PIXELS, 0, "seconds must be above 0, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            composition.save_gif(frames, path, seconds)
    assert path.read_bytes() == b"old"
    with pytest.raises(ValueError, match=r"path must end in \.gif"):
        composition.save_gif(PIXELS, tmp_path / "frames.png")
    with pytest.raises(ValueError, match="columns=4 does not divide 6 pictures"):
        composition.save_grid(PIXELS, tmp_path / "grid.png", columns=4)
    with pytest.raises(ValueError, match="should end in one of"):
        composition.save_grid(PIXELS, path)
