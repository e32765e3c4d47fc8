"""Inpainting: a mask of latents, and the blend that holds the kept part."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from kandinsky_jax.common.types import Array, Bool, Float, Int


class Blend(NamedTuple):
    """Holds a part of the sample to a known picture (inpainting), as noisy as the sample is after each row."""

    picture: jax.Array  # [B, h, w, C]
    noise: jax.Array  # [B, h, w, C], the same at every row
    keep: jax.Array  # [B, h, w, 1], 1 where the picture is held
    levels: jax.Array  # [MAX_STEPS, 2] how much picture and how much noise there is after each row

    def __call__(self, row: Int[Array, ""], sample: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        """The sample `[B, h, w, C]` after a row, with its known part put back."""
        signal, sigma = self.levels[row]
        return self.keep * (signal * self.picture + sigma * self.noise) + (1 - self.keep) * sample

    def map(self, function: Callable[[jax.Array, int | None], jax.Array]) -> Blend:
        """A function of each array and its axis of images, None where it has none."""
        picture, noise, keep = (function(array, 0) for array in self[:3])
        return Blend(picture, noise, keep, function(self.levels, None))


def latent_repaint_mask(repaint_mask: Bool[np.ndarray, "B H W"], h: int, w: int) -> Bool[np.ndarray, "B {h} {w}"]:
    """Convert a mask of pixels to a mask of latents.

    As in the reference, the first of each latent's pixels decides, and a repainted latent includes six neighbours: up,
    left, up-left, down, right, down-right (not the two others on the diagonals).

    Args:
        repaint_mask: bool `[B, H, W]`, true where the picture is repainted.
        h, w: height and width of the latents.
    Returns:
        bool `[B, h, w]`, true where a latent is repainted.
    """
    _, height, width = repaint_mask.shape
    repainted = repaint_mask[:, np.arange(h) * height // h][:, :, np.arange(w) * width // w]  # [B, h, w]
    padded = np.pad(repainted, ((0, 0), (1, 1), (1, 1)))
    dilated = repainted.copy()
    for down, right in ((0, 1), (1, 0), (0, 0), (2, 1), (1, 2), (2, 2)):
        dilated |= padded[:, down : down + h, right : right + w]
    return dilated
