"""Arithmetic of image embeddings, and a condition that changes from step to step."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from kandinsky_jax.common.types import Array, Float, PyTree
from kandinsky_jax.diffusion import Model, Schedule, SolverCoefficients, model_precision, slerp


def _norm(x: jax.Array) -> jax.Array:
    """The norm along the last axis `[..., 1]`, whose gradient at zero is zero."""
    squares = jnp.sum(x**2, axis=-1, keepdims=True)
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)


def shift_embeds(
    embeds: Float[Array, "*#B D"],
    source: Float[Array, "*#B D"],
    target: Float[Array, "*#B D"],
    strength: ArrayLike = 1.0,
) -> Float[Array, "*out D"]:
    """Move image embeddings along the direction from one embedding to another.

    Args:
        embeds: of the pictures, `[..., D]`.
        source, target: image embeddings of what is there and of what shall be, `[..., D]`: from the prior for two
            prompts with the same noise, so that what the prompts leave open cancels, or means over pictures.
        strength: `[]` or `[...]`; the factor of target - source.
    Returns:
        `[..., D]`.
    """
    return embeds + jnp.asarray(strength)[..., None] * (target - source)


def rotate_embeds(
    embeds: Float[Array, "#B D"], source: Float[Array, "#B D"], target: Float[Array, "#B D"], share: ArrayLike
) -> Float[Array, "out D"]:
    """Rotate image embeddings towards the difference of two text embeddings: text diffs.

    Source: Ramesh et al. 2022 (arXiv 2204.06125), section 3.3, with share from 0.25 to 0.5.

    Args:
        embeds: of the pictures, `[B, D]`.
        source, target: text embeddings of what is there and of what shall be, `[B, D]`; one serves all.
        share: of the way to the normalised difference, 0..1; `[]` or `[B]`.
    Returns:
        `[B, D]`, of the norms of `embeds`.
    """
    difference = target - source
    norm = _norm(difference)
    rotated = slerp(embeds, _norm(embeds) * difference / jnp.where(norm > 0, norm, 1), share)
    return jnp.where(norm > 0, rotated, embeds)


def embeds_by_step(
    model: Model, condition: Callable[[jax.Array], PyTree], schedule: Schedule | SolverCoefficients
) -> Model:
    """Return a model whose condition is embeddings of every step, `[B, N, D]`.

    With it `diffusion.sample` takes arrays as cond and uncond, and any guider joins them as ever:

        model = embeds_by_step(unet, unet.condition, schedule)
        cond = jnp.repeat(image_embeds[:, None], len(schedule), axis=1)
        diffusion.sample(model, trajectory[0], cond, found.embeds, schedule)

    Args:
        model: the bound UNet.
        condition: what makes a condition of embeddings `[B, D]`, such as `unet.condition`; called at every step.
        schedule: one whose timesteps differ from step to step.
    Raises:
        ValueError: where two steps have the same timestep.
    """
    timesteps = schedule.table.timestep[: len(schedule)] if isinstance(schedule, Schedule) else schedule.timestep
    if isinstance(timesteps, np.ndarray) and len(np.unique(timesteps)) < len(timesteps):
        raise ValueError("two steps of this schedule have the same timestep; needed is one for each, as DDIM has")
    of_steps = jnp.asarray(timesteps)

    def at_step(sample: jax.Array, timestep: jax.Array, embeds: jax.Array) -> jax.Array:
        steps = jnp.argmin(jnp.abs(of_steps - timestep[:, None]), axis=1)  # [B]
        with model_precision(model):
            return model(sample, timestep, condition(embeds[jnp.arange(len(embeds)), steps]))

    return at_step
