"""Between two noises or two embeddings: along the straight line, or the great circle."""

from __future__ import annotations

import jax.numpy as jnp
from jax.typing import ArrayLike

from kandinsky_jax.common.types import Array, Float
from kandinsky_jax.diffusion.solver import per_image


def lerp(start: Float[Array, "B *s"], end: Float[Array, "C *s"], share: ArrayLike) -> Float[Array, "D *s"]:
    """Interpolate along the straight line.

    Args:
        start, end: `[B, ...]`; either may have a batch of 1.
        share: of the end, 0..1, `[]` or one per image `[B]`.
    Returns:
        `[B, ...]`.
    """
    share = per_image(share, start.ndim)
    return (1 - share) * start + share * end


def slerp(start: Float[Array, "B *s"], end: Float[Array, "C *s"], share: ArrayLike) -> Float[Array, "D *s"]:
    """Interpolate along the great circle: between normal noises, the result has about the norm of normal noise.

    Source: Shoemake 1985, "Animating rotation with quaternion curves", section 3.3, Slerp. An image is one vector, all
    axes but the first. The angle is that between the directions; the weights sin((1 - share) angle) / sin(angle) and
    sin(share angle) / sin(angle) are applied to the vectors as they are, whatever their norms.

    Args:
        start, end: `[B, ...]`; either may have a batch of 1.
        share: of the end, 0..1, `[]` or one per image `[B]`.
    Returns:
        `[B, ...]`. Where the two point in the same or in opposite directions, or one is zero, it is `lerp`: there is no
        one great circle. Gradients are finite everywhere.
    """
    u, v = (_direction(x.reshape(len(x), -1)) for x in (start, end))
    half_sine, half_cosine = _norm(u - v), _norm(u + v)  # of half the angle, times 2; exact for small angles
    curved = (half_sine > 1e-6) & (half_cosine > 1e-6) & u.any(axis=1) & v.any(axis=1)
    angle = 2 * jnp.arctan2(jnp.where(curved, half_sine, 1), jnp.where(curved, half_cosine, 1))
    share = jnp.asarray(share)
    weights = [
        per_image(jnp.where(curved, jnp.sin(part * angle) / jnp.sin(angle), part), start.ndim)
        for part in (1 - share, share)
    ]
    return weights[0] * start + weights[1] * end


def _norm(x: Float[Array, "B n"]) -> Float[Array, "B"]:
    squares = jnp.sum(x**2, axis=1)
    positive = squares > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1)), 0)


def _direction(x: Float[Array, "B n"]) -> Float[Array, "B n"]:
    norm = _norm(x)[:, None]
    return x / jnp.where(norm > 0, norm, 1)
