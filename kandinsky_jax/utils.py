"""Helpers that examples written for `diffusers.utils` use: pictures from files and URLs, and grids of them."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence

from PIL import Image

from kandinsky_jax.common.errors import quote, shorten
from kandinsky_jax.images import read, rgb

MAX_DOWNLOAD = 256 << 20  # bytes of a picture from a URL
TIMEOUT = 60.0  # seconds without an answer

__all__ = ["load_image", "make_image_grid"]


def load_image(
    image: str | os.PathLike[str] | Image.Image, convert_method: Callable[[Image.Image], Image.Image] | None = None
) -> Image.Image:
    """Open a picture, upright by its EXIF; `diffusers.utils.load_image`.

    Args:
        image: a path, an `http://` or `https://` URL, or a picture.
        convert_method: called with the picture; None converts it to RGB.
    Returns:
        a PIL picture: in RGB, or what `convert_method` returns.
    Raises:
        ValueError: where it cannot be fetched, or is not a picture that can be read safely.
    """
    if isinstance(image, str) and image.lower().startswith(("http://", "https://")):
        image = read(io.BytesIO(_fetch(image)), f"the picture at {shorten(image, 200)}")
    elif isinstance(image, str | os.PathLike | Image.Image):
        image = read(image)
    else:
        raise ValueError(f"needed is a path, an http:// or https:// URL or a PIL picture, got {quote(image)}")
    return rgb(image) if convert_method is None else convert_method(image)


def _fetch(url: str) -> bytes:
    """What is at a URL, by the client, and so by the proxy settings and the offline mode, of huggingface_hub."""
    from huggingface_hub import get_session

    try:
        with get_session().stream("GET", url, headers={"User-Agent": "kandinsky-jax"}, timeout=TIMEOUT) as answer:
            answer.raise_for_status()
            parts, size = [], 0
            for part in answer.iter_bytes():
                size += len(part)
                if size > MAX_DOWNLOAD:
                    raise ValueError(f"it is larger than {MAX_DOWNLOAD >> 20} MiB")
                parts.append(part)
            return b"".join(parts)
    except Exception as error:  # of the client, whose classes are of several libraries
        reason = shorten(error, 200) or type(error).__name__
        raise ValueError(f"{shorten(url, 200)} cannot be fetched: {reason}") from None


def make_image_grid(images: Sequence[Image.Image], rows: int, cols: int, resize: int | None = None) -> Image.Image:
    """Paste pictures into one, row by row; `diffusers.utils.make_image_grid`.

    Args:
        images: `rows * cols` pictures of any mode; the first one's size is a cell's.
        rows, cols: cells from top to bottom, and from left to right.
        resize: pixels of each edge that all are resized to first; None leaves them as they are.
    Returns:
        a PIL picture in RGB.
    Raises:
        ValueError: where there are more or fewer pictures than cells.
    """
    pictures = list(images)
    if not pictures or len(pictures) != rows * cols:
        raise ValueError(f"{rows} rows of {cols} need {rows * cols} pictures, got {len(pictures)}")
    if resize is not None:
        pictures = [picture.resize((resize, resize)) for picture in pictures]
    width, height = pictures[0].size
    grid = Image.new("RGB", (cols * width, rows * height))
    for i, picture in enumerate(pictures):
        grid.paste(picture, (i % cols * width, i // cols * height))
    return grid
