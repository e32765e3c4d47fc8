"""Measurement operators: what is known of a picture, as a differentiable function of its pixels.

An operator takes pictures `[B, H, W, C]` and returns an array `[B, ...]`. Any such function is one; those here are
linear.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from kandinsky_jax.common.errors import quote
from kandinsky_jax.common.types import Array, Float

Operator: TypeAlias = Callable[[jax.Array], jax.Array]  # pictures or latents [B, ...] -> measurement [B, ...]

TRUNCATE = 4.0  # standard deviations after which a Gaussian kernel ends, as in SciPy


def masking(keep_mask: ArrayLike) -> Operator:
    """Make the operator of inpainting: pixels where the mask is 1, zeros elsewhere.

    Args:
        keep_mask: `[H, W]`, `[H, W, 1]` or `[B, H, W, 1]`, 1 or true where a pixel is known.
    """
    mask = jnp.asarray(keep_mask, jnp.float32)
    if mask.ndim not in (2, 3, 4):
        raise ValueError(f"keep_mask has the shape {list(mask.shape)}; needed is [H, W], [H, W, 1] or [B, H, W, 1]")
    mask = mask[..., None] if mask.ndim == 2 else mask

    def operator(pictures: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        return mask * pictures

    return operator


def downsampling(factor: int, method: str = "cubic") -> Operator:
    """Make the operator of super-resolution: pictures reduced by a factor, with antialiasing.

    Args:
        factor: at least 2; divides the sides of the pictures.
        method: of `jax.image.resize`. "cubic" is Pillow's BICUBIC, "linear" its BILINEAR.
    """
    if isinstance(factor, bool) or not isinstance(factor, int | np.integer) or factor < 2:
        raise ValueError(f"factor must be an integer of at least 2, got {quote(factor)}")

    def operator(pictures: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
        batch, height, width, channels = pictures.shape
        if height % factor or width % factor:
            raise ValueError(f"pictures have {height} x {width} pixels, which {factor} does not divide")
        return jax.image.resize(pictures, (batch, height // factor, width // factor, channels), method, antialias=True)

    return operator


def gaussian_blur(sigma: float) -> Operator:
    """Make the operator of deblurring: `scipy.ndimage.gaussian_filter` over both sides, reflected at the border.

    Args:
        sigma: standard deviation of the kernel in pixels, above 0.
    """
    if not sigma > 0:
        raise ValueError(f"sigma must be above 0, got {quote(sigma)}")
    radius = int(TRUNCATE * sigma + 0.5)
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    kernel /= kernel.sum()

    def matrix(side: int) -> np.ndarray:
        """The blur of a row of pixels, `[side, side]`."""
        padded = np.pad(np.eye(side), [(radius, radius), (0, 0)], mode="symmetric")
        blurred: np.ndarray = np.sum([weight * padded[i : i + side] for i, weight in enumerate(kernel)], axis=0)
        return blurred

    def operator(pictures: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        down, across = (jnp.asarray(matrix(side), pictures.dtype) for side in pictures.shape[1:3])
        return jnp.einsum("yh,xw,bhwc->byxc", down, across, pictures, precision="highest")

    return operator


def of_decoded(decode: Callable[[jax.Array], jax.Array], operator: Operator) -> Operator:
    """Make an operator of pixels an operator of latents.

    Args:
        decode: latents `[B, h, w, C]` to pictures, such as `movq.decode`, which gives `[B, 8h, 8w, 3]` in -1..1.
        operator: of the pictures.
    Returns:
        an operator of latents.
    """

    def through_decoder(latents: Float[Array, "B h w C"]) -> jax.Array:
        return operator(decode(latents))

    return through_decoder
