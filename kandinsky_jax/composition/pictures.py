"""Pictures of a composition in files: grids, and frames as a GIF."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from kandinsky_jax import images
from kandinsky_jax.common import atomic
from kandinsky_jax.common.errors import quote
from kandinsky_jax.utils import make_image_grid


def to_pictures(pixels: jax.Array | np.ndarray) -> list[Image.Image]:
    """Convert what MoVQ decodes, `[B, H, W, 3]` about -1..1, to PIL pictures in RGB."""
    if np.ndim(pixels) != 4 or np.shape(pixels)[-1] != 3:
        raise ValueError(
            f"pixels have the shape {list(np.shape(pixels))}; needed is [B, H, W, 3], as movq.decode gives"
        )
    pictures: list[Image.Image] = images.to_output(images.from_network(np.asarray(pixels)), "pil")
    return pictures


def _pictures(given: Sequence[Image.Image] | jax.Array | np.ndarray, name: str) -> list[Image.Image]:
    """Return PIL pictures of one size, in RGB."""
    pictures = to_pictures(given) if isinstance(given, jax.Array | np.ndarray) else [images.rgb(item) for item in given]
    if not pictures:
        raise ValueError(f"{name} is empty; give at least one picture")
    if sizes := {picture.size for picture in pictures[1:]} - {pictures[0].size}:
        raise ValueError(f"{name} have sizes {pictures[0].size} and {min(sizes)} (width, height); needed is one size")
    return pictures


def save_grid(
    pictures: Sequence[Image.Image] | jax.Array | np.ndarray, path: str | os.PathLike[str], columns: int | None = None
) -> None:
    """Write pictures into one file, row by row; atomically.

    Args:
        pictures: PIL pictures of one size, or what `movq.decode` gives, `[B, H, W, 3]`.
        path: ends in .png, .jpg, .jpeg or .webp.
        columns: pictures in a row, a divisor of how many there are; None is one row.
    Raises:
        ValueError: where something does not fit, before anything is written.
    """
    images.check_writable(Path(path))
    found = _pictures(pictures, "pictures")
    columns = len(found) if columns is None else columns
    if columns < 1 or len(found) % columns:
        raise ValueError(f"columns={quote(columns)} does not divide {len(found)} pictures")
    images.write(Path(path), make_image_grid(found, len(found) // columns, columns))


def save_gif(
    frames: Sequence[Image.Image] | jax.Array | np.ndarray,
    path: str | os.PathLike[str],
    seconds: float = 2.0,
    *,
    back: bool = False,
    loop: bool = True,
) -> None:
    """Write frames as an animated GIF; atomically.

    Each frame gets a palette of 256 colours, fitted to it and not dithered.

    Args:
        frames: PIL pictures of one size, or what `movq.decode` gives, `[B, H, W, 3]`.
        path: ends in .gif.
        seconds: from the first frame to the end of the last; a frame lasts a multiple of 10 ms, at least 20.
        back: append the frames between the ends in reverse, so that a loop has no jump. `seconds` counts them.
        loop: repeat for ever; otherwise once.
    Raises:
        ValueError: where something does not fit, before anything is written.
    """
    target = Path(path)
    if target.suffix.lower() != ".gif" or not target.absolute().parent.is_dir():
        raise ValueError(f"path must end in .gif and lie in a folder that exists, got {quote(os.fspath(path))}")
    if not seconds > 0:
        raise ValueError(f"seconds must be above 0, got {quote(seconds)}")
    found = _pictures(frames, "frames")
    found += found[-2:0:-1] if back else []
    quantized = [frame.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE) for frame in found]
    options: dict[str, object] = {"loop": 0} if loop else {}
    duration = max(20, 10 * round(100 * seconds / len(found)))
    atomic.sweep(target.parent, target.name)
    atomic.fill_file(
        target,
        lambda file: quantized[0].save(
            file, "GIF", save_all=True, append_images=quantized[1:], duration=duration, **options
        ),
    )
