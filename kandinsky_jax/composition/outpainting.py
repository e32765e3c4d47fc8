"""Outpainting: a larger canvas around a picture, and the mask of what an inpainting pipeline is to add."""

from __future__ import annotations

import os
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from kandinsky_jax import images
from kandinsky_jax.common.errors import quote

MULTIPLE = 64  # pixels; the pipelines round sides up to it
Fill = Literal["edge", "reflect", "noise"] | tuple[int, int, int]


class OutpaintCanvas(NamedTuple):
    """What an inpainting pipeline takes, and where the picture lies in it."""

    image: Image.Image  # RGB, the canvas
    mask_image: Image.Image  # L, white where the pipeline is to generate
    box: tuple[int, int, int, int]  # left, upper, right and lower edge of the picture in the canvas, in pixels


def outpaint_canvas(
    image: Image.Image | str | os.PathLike[str],
    *,
    left: int = 0,
    right: int = 0,
    top: int = 0,
    bottom: int = 0,
    overlap: int = 0,
    fill: Fill = "edge",
    seed: int = 0,
) -> OutpaintCanvas:
    """Extend a picture beyond its borders, for an inpainting pipeline to fill.

        canvas = outpaint_canvas("photo.png", right=256)
        width, height = canvas.image.size
        pipe(prompt, image=canvas.image, mask_image=canvas.mask_image, width=width, height=height)

    Args:
        image: a PIL picture, or the path of one.
        left, right, top, bottom: pixels to add; the canvas's sides must be multiples of 64.
        overlap: pixels of the picture along the new part that are generated as well, so that the two join. The
            pipelines add up to a latent, 8 pixels, to that.
        fill: what is in the new part before it is generated. The inpainting UNet does not see it, but MoVQ's encoder
            does when it encodes what is beside it. "edge" repeats the border's pixels, "reflect" mirrors the picture,
            "noise" is uniform noise, and three levels 0..255 are a colour.
        seed: of the noise.
    Raises:
        ValueError: where something does not fit.
    """
    picture = np.asarray(images.rgb(images.read(image)))
    height, width = picture.shape[:2]
    added = {"left": left, "right": right, "top": top, "bottom": bottom}
    for name, pixels in (added | {"overlap": overlap}).items():
        if isinstance(pixels, bool) or not isinstance(pixels, int) or pixels < 0:
            raise ValueError(f"{name} must be an integer of at least 0, got {quote(pixels)}")
    if not any(added.values()):
        raise ValueError("left, right, top and bottom are all 0; give the pixels to add on at least one side")
    for name, side in (("height", top + height + bottom), ("width", left + width + right)):
        if side % MULTIPLE:
            raise ValueError(
                f"the canvas would have a {name} of {side} pixels; needed is a multiple of {MULTIPLE}, such as "
                f"{MULTIPLE - side % MULTIPLE} pixels more"
            )
    box = (left, top, left + width, top + height)
    keep = [
        edge + overlap * (pixels > 0) * sign
        for edge, pixels, sign in zip(box, (left, top, right, bottom), (1, 1, -1, -1), strict=True)
    ]
    if keep[0] >= keep[2] or keep[1] >= keep[3]:
        raise ValueError(f"overlap={overlap} leaves nothing of a picture of {height} x {width} pixels (height x width)")
    canvas = _filled(picture, ((top, bottom), (left, right)), fill, seed)
    mask = np.full(canvas.shape[:2], 255, np.uint8)
    mask[keep[1] : keep[3], keep[0] : keep[2]] = 0
    return OutpaintCanvas(Image.fromarray(canvas), Image.fromarray(mask), box)


def _filled(picture: np.ndarray, margins: tuple[tuple[int, int], tuple[int, int]], fill: Fill, seed: int) -> np.ndarray:
    """Return the canvas, uint8 `[H, W, 3]`."""
    if fill in ("edge", "reflect"):
        return np.pad(picture, (*margins, (0, 0)), "edge" if fill == "edge" else "symmetric")
    shape = (*(side + sum(margin) for side, margin in zip(picture.shape, margins, strict=False)), 3)
    if fill == "noise":
        canvas = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    elif isinstance(fill, tuple | list) and len(fill) == 3 and all(0 <= level <= 255 for level in fill):
        canvas = np.broadcast_to(np.asarray(fill, np.uint8), shape).copy()
    else:
        raise ValueError(f"fill must be 'edge', 'reflect', 'noise' or three levels from 0 to 255, got {quote(fill)}")
    (top, _), (left, _) = margins
    canvas[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return canvas


def paste_original(
    generated: Image.Image,
    image: Image.Image | str | os.PathLike[str],
    box: tuple[int, int, int, int],
    feather: int = 16,
) -> Image.Image:
    """Put the pixels of the picture back into the generated canvas, faded in from the borders of the new part.

    Args:
        generated: what the pipeline returned for a canvas.
        image: the picture that the canvas was made of.
        box: of the canvas.
        feather: pixels from a border of the new part to where the picture is as it was; 0 is a hard edge. At the
            canvas's own borders nothing is faded.
    Returns:
        RGB, of the size of `generated`.
    """
    picture = images.rgb(images.read(image))
    left, top, right, bottom = box
    if picture.size != (right - left, bottom - top) or right > generated.width or bottom > generated.height:
        raise ValueError(
            f"box={box} does not fit a picture of {picture.size} in a canvas of {generated.size} (width, height); give "
            "those of outpaint_canvas"
        )
    if feather < 0:
        raise ValueError(f"feather must be at least 0, got {quote(feather)}")
    across = _ramp(picture.width, left > 0, right < generated.width, feather)
    down = _ramp(picture.height, top > 0, bottom < generated.height, feather)
    share = np.minimum(across[None, :], down[:, None])
    result = images.rgb(generated).copy()
    result.paste(picture, (left, top), Image.fromarray((255 * share).round().astype(np.uint8)))
    return result


def _ramp(length: int, start: bool, end: bool, feather: int) -> np.ndarray:
    """Return the share of the picture along a side, `[length]`, which rises from each end that is faded."""
    distance = np.arange(length) + 0.5  # from the middle of a pixel to the border
    share = np.ones(length)
    for faded, pixels in ((start, distance), (end, distance[::-1])):
        if faded and feather:
            share = np.minimum(share, pixels / feather)
    return share
