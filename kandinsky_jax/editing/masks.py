"""Edits within a mask: hold what is outside of it, and find it from two conditions.

Source: DiffEdit, Couairon et al. 2022 (arXiv 2210.11427), section 3.2, steps 1 and 3.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from kandinsky_jax.common.types import Array, Float, Int, PyTree
from kandinsky_jax.diffusion import (
    DECODER_STREAM,
    Evaluation,
    Model,
    Schedule,
    batch_evaluations,
    model_precision,
    noise_source,
    split_output,
)


class KeepOutside(NamedTuple):
    """Hold the sample outside a mask to an inversion's trajectory; an `after_step` of `diffusion.sample`."""

    trajectory: jax.Array  # [N + 1, B, h, w, C], of the inversion; `trajectory[skip:]` where steps are skipped
    edit_mask: jax.Array  # [B, h, w, 1], 1 where the picture is edited, 0 where it is kept; between, mixed

    def __call__(self, index: Int[Array, ""], sample: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        """Return the sample after the step of an index, with what is kept put back."""
        shape = jnp.shape(self.edit_mask)
        if len(shape) != sample.ndim or any(n not in (1, m) for n, m in zip(shape, sample.shape, strict=True)):
            raise ValueError(
                f"edit_mask has the shape {list(shape)}; needed is one of the latents, {[*sample.shape[:-1], 1]}"
            )
        return self.edit_mask * sample + (1 - self.edit_mask) * self.trajectory[index + 1]


def difference_mask(
    model: Model,
    latents: Float[Array, "B h w C"],
    source: PyTree,
    target: PyTree,
    schedule: Schedule,
    *,
    rng: int | jax.Array,
    step: int | None = None,
    draws: int = 10,
    threshold: ArrayLike = 0.5,
) -> Float[Array, "B h w 1"]:
    """Find where two conditions predict different noise: DiffEdit's mask.

    The latents are noised to one step's level, several times; the absolute differences of the two predictions are
    averaged over draws and channels, divided by three times their mean over the picture, so that single places do not
    decide, and cut at a threshold.

    Args:
        model: as in `diffusion.sample`.
        latents: clean latents `[B, h, w, C]`.
        source, target: conditions of what is there and of what shall be, such as `unet.condition(embeds)`.
        schedule: whose levels and timesteps are used; any one.
        rng: a seed or a `jax.random.key`; draws are made image by image.
        step: index of the step whose level is taken; None for the one in the middle.
        draws: of noise.
        threshold: 0..1 of three times the mean difference.
    Returns:
        float32 `[B, h, w, 1]`, 1 where the picture is to be edited.
    """
    step = len(schedule) // 2 if step is None else step
    if not 0 <= step < len(schedule):
        raise ValueError(f"step={step} is out of range; needed is 0 to {len(schedule) - 1}")
    if draws < 1 or not np.isfinite(threshold).all():
        raise ValueError(f"draws={draws} must be at least 1, and threshold={threshold} a number")
    signal, sigma = map(float, schedule.levels[step])
    timestep = jnp.full(2 * len(latents), schedule.table.timestep[step])
    [call] = batch_evaluations([Evaluation(source), Evaluation(target)])
    [noises] = noise_source(rng, len(latents), DECODER_STREAM).steps(0, draws, np.ones(draws, bool), latents.shape)

    def difference(total: jax.Array, draw: jax.Array) -> tuple[jax.Array, None]:
        sample = schedule.table.input_scale[step] * (signal * latents + sigma * noises(draw, latents.shape))
        output = model(jnp.concatenate([sample, sample]), timestep, call.evaluation.condition)
        of_source, of_target = jnp.split(split_output(output, latents.shape[-1])[0], 2)
        return total + jnp.abs(of_target - of_source).mean(axis=-1, keepdims=True), None

    with model_precision(model):
        total, _ = jax.lax.scan(difference, jnp.zeros((*latents.shape[:-1], 1), jnp.float32), jnp.arange(draws))
    mean = total.mean(axis=(1, 2, 3), keepdims=True)
    return (total > threshold * 3 * mean).astype(jnp.float32)
