"""From a picture's latents to the noises of a stochastic sampler that gives it back exactly.

Source: Huberman-Spiegelglas et al. 2023, "An Edit Friendly DDPM Noise Space" (arXiv 2304.06140), algorithm 1.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kandinsky_jax.common.errors import shorten
from kandinsky_jax.common.types import Array, Float, PyTree
from kandinsky_jax.diffusion import (
    DECODER_STREAM,
    GivenNoise,
    Guider,
    Model,
    NoGuidance,
    Schedule,
    SolverCoefficients,
    StepNoise,
    batch_evaluations,
    initial_loop_state,
    model_precision,
    noise_source,
    noise_stddev,
    per_image,
    predict,
    solver_step,
)
from kandinsky_jax.schedulers.table import Z

_NO_GUIDANCE = NoGuidance()


class EditFriendlyInversion(NamedTuple):
    """A picture as noises of a stochastic sampler; from `edit_friendly_inversion`."""

    samples: jax.Array  # [N + 1, B, ..., C]; item i is the sample that step i takes, the last one the clean latents
    noise: jax.Array  # [N, B, ..., C], the noise of each step
    coefficients: SolverCoefficients  # [N, ...], to be sampled with

    def after(self, skip: int = 0) -> tuple[jax.Array, SolverCoefficients, GivenNoise]:
        """Return what `diffusion.sample` needs to go on after the first `skip` steps.

        The more steps are skipped, the more of the picture stays whatever the condition is; the paper skips 36 of 100.
        A multistep solver misses its earlier predictions there, and gives the latents back less exactly.

        Returns:
            the sample `[B, ..., C]` to begin with, the coefficients `[N - skip, ...]`, and the noise for `rng`.
        Raises:
            ValueError: where no step is left.
        """
        if not 0 <= skip < len(self.noise):
            raise ValueError(f"skip={skip} is out of range; needed is 0 to {len(self.noise) - 1} of {len(self.noise)}")
        rest = jax.tree.map(lambda column: column[skip:], self.coefficients)
        return self.samples[skip], rest, GivenNoise(self.noise[skip:], jnp.zeros((), jnp.int32))


def edit_friendly_inversion(
    model: Model,
    latents: Float[Array, "B *s C"],
    cond: PyTree,
    uncond: PyTree,
    schedule: Schedule,
    *,
    rng: int | jax.Array | StepNoise,
    guider: Guider = _NO_GUIDANCE,
) -> EditFriendlyInversion:
    """Find the noises with which a stochastic sampler makes these latents.

    The sample of every step is drawn from q(x_t | x_0) with noise of its own, and the step's noise is what leads from
    one to the next: z = (next - mean) / stddev. Samples of neighbouring steps are further apart than on a sampler's own
    path, so that z has a larger variance than 1 and carries the picture's layout through an edit.

    Any schedule that adds noise will do, with clipping, a learned variance, or a multistep solver. A step without
    noise, such as the last one of DDPM, could not reach its next sample: in the coefficients returned it takes the
    difference as noise of factor 1.

    Args:
        model, cond, uncond, guider: as in `diffusion.sample`. The condition is the picture's own.
        latents: clean latents `[B, ..., C]`; float32 (float64 stays).
        schedule: of a stochastic solver, such as `DDIMScheduler(eta=1.0)` or `DDPMScheduler`.
        rng: what the samples are drawn with: a seed or `jax.random.key`, image by image, or a function, see
            `StepNoise`; item i is for the sample that step i takes.
    Returns:
        samples, noise and coefficients; `diffusion.sample` from `after(0)` with the same conditions and guider gives
        the latents back but for rounding.
    Raises:
        ValueError: for a schedule that adds no noise at all.
    """
    check_stochastic(schedule)
    latents = jnp.asarray(latents, jnp.promote_types(latents.dtype, jnp.float32))
    coefficients = with_noise_everywhere(schedule)
    drawn = _drawn(rng, latents.shape, len(schedule)).astype(latents.dtype)
    levels = jnp.asarray(schedule.levels, latents.dtype).reshape(-1, 2, *[1] * latents.ndim)
    samples = jnp.concatenate([levels[:, 0] * latents + levels[:, 1] * drawn, latents[None]])
    calls = batch_evaluations(guider.evaluations(cond, uncond))

    def step(loop: PyTree, row: tuple[SolverCoefficients, jax.Array]) -> tuple[PyTree, jax.Array]:
        coefficients, following = row
        sample = loop.solver[0]
        prediction, guided, _ = predict(model, guider, calls, coefficients, sample, loop.guider)
        mean = solver_step(coefficients, loop.solver, prediction, jnp.zeros_like(sample))[0]
        factor = per_image(coefficients.matrix[..., 0, Z], sample.ndim)
        noise = (following - mean) / (factor * noise_stddev(coefficients, prediction.variance, sample.ndim))
        solver = solver_step(coefficients, loop.solver, prediction, noise)
        return loop._replace(solver=solver, guider=guided), noise

    loop = initial_loop_state(samples[0], guider, slots=coefficients.matrix.shape[-2])
    with model_precision(model):
        _, noise = jax.lax.scan(step, loop, (coefficients, samples[1:]))
    return EditFriendlyInversion(samples, noise, coefficients)


def with_noise_everywhere(schedule: Schedule) -> SolverCoefficients:
    """Return a schedule's coefficients in which steps without noise take some of factor 1; JAX arrays `[N, ...]`."""
    table = SolverCoefficients(*(column[: len(schedule)] for column in schedule.table))
    matrix = table.matrix.copy()
    without = matrix[:, 0, Z] == 0
    matrix[without, 0, Z] = 1
    changed = table._replace(
        matrix=matrix,
        log_variance=np.where(without[:, None], 0, table.log_variance),
        variance_is_output=np.where(without, 0, table.variance_is_output),
    )
    return jax.tree.map(jnp.asarray, changed)


def check_stochastic(schedule: object) -> None:
    """Raise for anything but a schedule that adds noise."""
    if not isinstance(schedule, Schedule):
        raise TypeError(f"schedule must be what scheduler.schedule(steps) returns, got {type(schedule).__name__}")
    if not schedule.draws_noise.any():
        raise ValueError(
            "this schedule adds no noise; needed is a stochastic one, such as DDIMScheduler.from_config(config, "
            "eta=1.0).schedule(50), or ddim_inversion"
        )


def _drawn(rng: int | jax.Array | StepNoise, shape: tuple[int, ...], steps: int) -> jax.Array:
    """Standard normal numbers for every step, `[N, B, ..., C]`."""
    if not callable(rng):
        if not isinstance(rng, int | np.integer | jax.Array):
            raise TypeError(f"rng must be a seed, a jax.random.key or a function, got {shorten(rng)}")
        [rng] = noise_source(rng, shape[0], DECODER_STREAM).steps(0, steps, np.ones(steps, bool), shape)
    return jnp.stack([rng(jnp.asarray(i), shape) for i in range(steps)])
