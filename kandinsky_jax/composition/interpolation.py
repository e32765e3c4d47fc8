"""Interpolation between noises and between image embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kandinsky_jax.common.errors import quote
from kandinsky_jax.common.types import Array, Float
from kandinsky_jax.diffusion import slerp

# (start [B, ...], end [B, ...], share [] or [B]) -> [B, ...], such as `slerp` and `lerp`
Interpolation: TypeAlias = Callable[[jax.Array, jax.Array, ArrayLike], jax.Array]


def interpolation_grid(
    corners: Float[Array, "K *s"], rows: int, columns: int, interpolate: Interpolation = slerp
) -> Float[Array, "N *s"]:
    """Interpolate between two or four corners of a grid.

    Each row lies between its ends, which lie on the left and the right edge: bilinear for `lerp`. `slerp` does not
    commute, so there the rows are great circles and most columns are not.

    Args:
        corners: `[2, ...]`, the left and the right end of one row; or `[4, ...]`: top left, top right, bottom left,
            bottom right.
        rows, columns: cells from top to bottom and from left to right; one row for two corners.
        interpolate: `slerp` or `lerp`.
    Returns:
        `[rows * columns, ...]`, row by row.
    Raises:
        ValueError: for another number of corners or rows.
    """
    if len(corners) not in (2, 4):
        raise ValueError(f"corners has the shape {list(corners.shape)}; needed are two or four of them, [2 or 4, ...]")
    for name, count in (("rows", rows), ("columns", columns)):
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {quote(count)}")
    if len(corners) == 2 and rows != 1:
        raise ValueError(f"two corners make one row, but rows={rows}; give four corners for more")
    down, across = jnp.linspace(0, 1, rows), jnp.linspace(0, 1, columns)
    left, right = corners[:1], corners[1:2]
    if len(corners) == 4:
        left, right = interpolate(left, corners[2:3], down), interpolate(right, corners[3:], down)  # [rows, ...]
    left, right = (jnp.repeat(edge, columns, axis=0) for edge in (left, right))
    return interpolate(left, right, jnp.tile(across, rows))
