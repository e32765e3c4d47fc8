"""Pictures in requests: bytes that are decoded, never a path or an address that is opened."""

from __future__ import annotations

import base64
import binascii
import contextlib
import io
import re
from collections.abc import Iterator

import numpy as np
from PIL import Image

from kandinsky_jax import images
from kandinsky_jax.common.errors import shorten
from kandinsky_jax.serve.api.bodies import Budget
from kandinsky_jax.serve.api.errors import ApiError
from kandinsky_jax.serve.api.picture_files import FileFault, essential_file, essential_info

FORMATS = ("PNG", "JPEG", "WEBP")
OPAQUE = 128  # least alpha, of 255, of what is kept
_DATA_URL = re.compile(r"data:image/[a-z]{1,10};base64,", re.ASCII)


class PictureReader:
    """Decodes the pictures of one request.

    Args:
        most: pixels that they may have together.
        budget: pixels that all requests hold together.
    """

    def __init__(self, most: int, budget: Budget):
        self.most, self.budget = most, budget
        self.pixels = 0

    def decode(self, data: bytes, name: str) -> Image.Image:
        """Decode a PNG, JPEG or WebP; its size is checked before its pixels are decoded."""
        if not data:
            raise _refused(name, "is empty; needed is a PNG, JPEG or WebP")
        with _faults(name):
            opened = Image.open(io.BytesIO(essential_file(data)), formats=FORMATS)
        with opened:
            width, height = opened.size
            if self.pixels + width * height > self.most:
                raise _refused(
                    name, f"has {width} x {height} pixels; a request's pictures may have {self.most:,} together"
                )
            self.budget.take(width * height)
            self.pixels += width * height
            with _faults(name):
                opened.load()
                opened.info = essential_info(opened.info)
                picture = images.read(opened, name)
        picture.info = {key: value for key, value in picture.info.items() if key == "transparency"}
        return picture

    def decode_text(self, text: str, name: str) -> Image.Image:
        """Decode base64, or a data: URL with it."""
        match = _DATA_URL.match(text[:40])
        encoded = text[match.end() :] if match else text
        try:
            data = base64.b64decode("".join(encoded.split()), validate=True)
        except (binascii.Error, ValueError):
            raise _refused(name, "is not base64; needed is a picture in base64, or a data: URL with it") from None
        return self.decode(data, name)

    def release(self) -> None:
        """Return the pixels to the budget, once they are no longer held."""
        self.budget.give(self.pixels)
        self.pixels = 0


@contextlib.contextmanager
def _faults(name: str) -> Iterator[None]:
    """Convert errors of reading a picture."""
    try:
        yield
    except Image.UnidentifiedImageError:
        raise _refused(name, "cannot be read as a PNG, JPEG or WebP") from None
    except FileFault as error:
        raise _refused(name, str(error)) from None
    except Exception as error:  # Pillow's readers raise many kinds for damaged data
        fault = shorten(str(error), 100) or type(error).__name__
        raise _refused(name, f"cannot be read as a picture: {fault}") from None


def has_holes(picture: Image.Image) -> bool:
    """Whether some of a picture is transparent."""
    return picture.has_transparency_data and bool((np.asarray(picture.convert("RGBA"))[..., 3] < OPAQUE).any())


def repaint_mask(mask: Image.Image, image: Image.Image) -> Image.Image:
    """Return a mask that is white where the picture is repainted.

    Args:
        mask: transparent where it is repainted; one without transparency is white there.
        image: has the same size.
    """
    if mask.size != image.size:
        raise _refused("mask", f"has {_size(mask)} pixels and the image {_size(image)}; give them the same size")
    if mask.has_transparency_data:
        alpha = mask.convert("RGBA").getchannel("A")
        mask = alpha.point([255] * OPAQUE + [0] * (256 - OPAQUE))
        where = "transparent"
    else:
        where = "transparent or white"
    try:
        repaints = images.masks(mask, "mask", mask.height, mask.width, warn=False).any()
    except ValueError as error:
        raise ApiError(400, str(error), "mask", "invalid_image") from None
    if not repaints:
        raise _refused("mask", f"repaints nothing: no part of it is {where}")
    return mask


def _size(picture: Image.Image) -> str:
    return f"{picture.width} x {picture.height}"


def _refused(name: str, fault: str) -> ApiError:
    return ApiError(400, f"{name} {fault}", name.partition("[")[0], "invalid_image")
