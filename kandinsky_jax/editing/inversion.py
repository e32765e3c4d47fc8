"""From a picture's latents to the noise that a deterministic sampler would have made them from.

Source: DDIM inversion, Song et al. 2020 (arXiv 2010.02502), section 4.3, in the form of Mokady et al. 2022 (arXiv
2211.09794), section 3.2; the fixed-point iteration of Pan et al. 2023 (AIDI, arXiv 2309.04907), section 3.2.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from kandinsky_jax.common.types import Array, Float, PyTree
from kandinsky_jax.diffusion import (
    Guider,
    Model,
    NoGuidance,
    Schedule,
    SolverCoefficients,
    batch_evaluations,
    initial_state,
    model_precision,
    per_image,
    predict,
    solver_coefficients,
    solver_step,
)
from kandinsky_jax.schedulers.table import EPS, STATE_SLOTS, X0, Z

_NO_GUIDANCE = NoGuidance()


def ddim_inversion(
    model: Model,
    latents: Float[Array, "B *s C"],
    cond: PyTree,
    uncond: PyTree,
    schedule: Schedule | SolverCoefficients,
    *,
    guider: Guider = _NO_GUIDANCE,
    fixed_point_iterations: int = 0,
) -> Float[Array, "M B *s C"]:
    """Invert the steps of a deterministic one-step solver such as DDIM, from the last to the first.

    A step makes `step(x) = y` of a sample x. For each y, the last first, x is sought:

        x <- x + (y - step(x)) / share    beginning with x = y

    where share is the factor of x in step(x) while the network's output is kept. The first evaluation is the usual
    approximation: it takes the network's output at y for that at x. Each further one is a fixed-point iteration. Where
    these converge, `diffusion.sample` from the first sample gives the latents back.

    Args:
        model, cond, uncond: as in `diffusion.sample`. The condition is the picture's own, such as
            `unet.condition(image_embeds)` of its CLIP image embedding.
        latents: clean latents `[B, ..., C]`, such as `movq.encode` gives; float32 (float64 stays).
        schedule: of a deterministic one-step solver without clipping, such as
            `DDIMScheduler.from_config(config, clip_sample=False, thresholding=False).schedule(50)`; or its coefficients
            `[N, ...]`, which may be traced and are not checked.
        guider: one without a state, such as `ClassifierFreeGuidance(2.0)`. With guidance the iteration may diverge.
        fixed_point_iterations: evaluations per step after the first one; 0 is the usual DDIM inversion.
    Returns:
        the trajectory `[N + 1, B, ..., C]`: item i is the sample that step i takes, item 0 the noise to begin with, and
        the last item the latents.
    Raises:
        ValueError: where a step is not one that this can invert, or the guider keeps a state.
    """
    if isinstance(schedule, Schedule):
        check_invertible(schedule)
    coefficients = solver_coefficients(schedule) if isinstance(schedule, Schedule) else schedule
    if isinstance(fixed_point_iterations, bool) or not isinstance(fixed_point_iterations, int | np.integer):
        raise TypeError(f"fixed_point_iterations must be an integer, got {fixed_point_iterations!r}")
    if fixed_point_iterations < 0:
        raise ValueError(f"fixed_point_iterations={fixed_point_iterations} is negative; 0 is the usual DDIM inversion")
    check_stateless(guider, latents)
    calls = batch_evaluations(guider.evaluations(cond, uncond))

    def undo(following: jax.Array, row: SolverCoefficients) -> tuple[jax.Array, jax.Array]:
        share = per_image(sample_share(row), following.ndim)

        def iterate(sample: jax.Array, _: None) -> tuple[jax.Array, None]:
            prediction, _, _ = predict(model, guider, calls, row, sample, guider.init(sample))
            state = initial_state(sample, row.matrix.shape[-2])
            reached = solver_step(row, state, prediction, jnp.zeros_like(sample))[0]
            return sample + (following - reached) / share, None

        sample, _ = jax.lax.scan(iterate, following, length=1 + fixed_point_iterations)
        return sample, sample

    last = jnp.asarray(latents, jnp.promote_types(latents.dtype, jnp.float32))
    with model_precision(model):
        _, samples = jax.lax.scan(undo, last, coefficients, reverse=True)
    return jnp.concatenate([samples, last[None]])


def sample_share(coefficients: SolverCoefficients) -> jax.Array:
    """Return the factor of the sample in the next one while the network's output is kept.

    Args:
        coefficients: a row of a one-step solver, or one per image.
    Returns:
        `[]` or `[B]`; for DDIM with a network that predicts noise, sqrt(alpha_prev / alpha).
    """
    first, of_x0 = coefficients.matrix[..., 0, :], coefficients.x0_from[..., 0]
    of_eps = coefficients.eps_from[..., 0] + coefficients.eps_from[..., 1] * of_x0
    return first[..., 0] + first[..., X0] * of_x0 + first[..., EPS] * of_eps


def check_stateless(guider: Guider, sample: jax.Array) -> None:
    """Raise ValueError for a guider that keeps a state."""
    if jax.tree.leaves(guider.init(sample)):
        raise ValueError(
            f"{type(guider).__name__} keeps a state from step to step, and steps are looked at one by one here; needed "
            "is a guider without one, such as ClassifierFreeGuidance"
        )


def check_invertible(schedule: Schedule) -> None:
    """Raise ValueError for a schedule whose steps `ddim_inversion` cannot undo."""
    table = jax.tree.map(lambda column: column[: len(schedule)], schedule.table)
    first = table.matrix[:, 0]
    if first[:, Z].any():
        raise ValueError(
            "this schedule adds noise at its steps; needed is a deterministic one, such as that of DDIMScheduler, or "
            "edit_friendly_inversion"
        )
    if first[:, 1:STATE_SLOTS].any():
        raise ValueError("this solver's steps look at earlier ones; needed is a one-step solver, such as DDIMScheduler")
    if np.isfinite(table.clip).any() or table.threshold[:, 0].any():
        raise ValueError(
            "this schedule clips the predicted x0, and a clipped step cannot be undone; make the scheduler with "
            "DDIMScheduler.from_config(scheduler.config, clip_sample=False, thresholding=False)"
        )
    if not np.asarray(sample_share(table)).all():
        raise ValueError(
            "the last step of this schedule keeps nothing of its sample, so that it cannot be undone; make the "
            "scheduler with set_alpha_to_one=False"
        )
