"""One step of any solver, from a row of coefficients; pure functions of arrays with finite gradients.

A step has two parts. `prediction_from_output` turns a network's output into predictions of x0 and eps: what is not
linear happens here (clipping, dynamic thresholding). `solver_step` is the linear rest:

    state' = matrix @ [state, x0, eps, stddev * noise]

and a guider's correction of the sample, if it makes one. The coefficients come from a schedule
(`kandinsky_jax.schedulers`), or are made by hand. Their fields have no leading axis, one row for the whole batch, or a
leading axis `[B, ...]`, one row per image, so that images of one batch may be at different steps, or under different
schedules.

No `where` here differentiates an unselected branch to NaN: what is not selected is replaced before it is computed.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kandinsky_jax.common.types import Array, Float
from kandinsky_jax.schedulers.table import STATE_SLOTS, Schedule, SolverCoefficients


class Prediction(NamedTuple):
    """What a guided evaluation predicts about a sample `[B, ..., C]`; float32, or float64 where the sample is."""

    x0: jax.Array  # [B, ..., C], the clean sample, clipped or thresholded
    eps: jax.Array  # [B, ..., C], the noise in the sample; zeros where the solver does not use it
    variance: jax.Array | None = None  # [B, ..., C], the network's second half of channels, as it is
    correction: jax.Array | None = None  # [B, ..., C], what the step adds to its sample


def solver_coefficients(schedule: Schedule) -> SolverCoefficients:
    """Take a schedule's coefficients as JAX arrays.

    Args:
        schedule: from a scheduler's `schedule(num_inference_steps)`.
    Returns:
        float32 fields `[N, ...]`, N evaluations of the network (two per step of second-order solvers).
    """
    if not isinstance(schedule, Schedule):
        raise TypeError(f"schedule must be what scheduler.schedule(steps) returns, got {type(schedule).__name__}")
    return jax.tree.map(lambda column: jnp.asarray(column[: len(schedule)]), schedule.table)


def initial_state(sample: Float[Array, "*sample"], slots: int = STATE_SLOTS) -> Float[Array, "{slots} *sample"]:
    """Make a solver's first state from a sample.

    Args:
        sample: `[B, ..., C]`, scaled by the schedule's `init_noise_sigma`.
        slots: samples that the state holds; the rest are zeros, for what a multistep solver keeps.
    Returns:
        `[slots, B, ..., C]`, the sample first; float32, or float64 where the sample is.
    """
    dtype = jnp.promote_types(sample.dtype, jnp.float32)
    return jnp.zeros((slots, *sample.shape), dtype).at[0].set(sample)


def per_image(values: ArrayLike, ndim: int) -> jax.Array:
    """Shape one number, or one per image, to broadcast over a batch.

    Args:
        values: `[]` or `[B]`.
        ndim: axes of the batch `[B, ...]`.
    Returns:
        `[]` or `[B, 1, ...]`.
    """
    values = jnp.asarray(values)
    if values.ndim > 1:
        raise ValueError(f"values have the shape {list(values.shape)}; needed is one number, or one per image [B]")
    return values if values.ndim == 0 else values.reshape(-1, *[1] * (ndim - 1))


def predict_x0(
    coefficients: SolverCoefficients, sample: Float[Array, "*sample"], output: Float[Array, "*sample"]
) -> Float[Array, "*sample"]:
    """Predict the clean sample from a network's output, before any clipping.

    Args:
        coefficients: one row, or one per image.
        sample: what the network saw, `[B, ..., C]`, before `input_scale`.
        output: `[B, ..., C]`, whatever the network predicts (noise, sample or velocity).
    Returns:
        x0 `[B, ..., C]`. Guidance is linear, so guidance of x0 equals guidance of the output.
    """
    of_sample, of_output = (per_image(coefficients.x0_from[..., i], sample.ndim) for i in range(2))
    return of_sample * sample + of_output * output


def output_for_x0(
    coefficients: SolverCoefficients, sample: Float[Array, "*sample"], x0: Float[Array, "*sample"]
) -> Float[Array, "*sample"]:
    """Return the network's output that would have predicted an x0: the inverse of `predict_x0`.

    For guiders that work on x0: change it, and go on with `prediction_from_output`. Where the output says nothing of
    x0 (the noise prediction of a sample without noise), the result is zeros.

    Args:
        coefficients, sample: as in `predict_x0`.
        x0: `[B, ..., C]`.
    Returns:
        `[B, ..., C]`.
    """
    of_sample, of_output = (per_image(coefficients.x0_from[..., i], sample.ndim) for i in range(2))
    some = of_output != 0
    return jnp.where(some, (x0 - of_sample * sample) / jnp.where(some, of_output, 1), 0)


def limit_x0(coefficients: SolverCoefficients, x0: Float[Array, "*sample"]) -> Float[Array, "*sample"]:
    """Clip a predicted x0 `[B, ..., C]` as the schedule asks: to +-clip, or by dynamic thresholding."""
    on, bound = coefficients.threshold[..., 0] > 0, per_image(coefficients.clip, x0.ndim)

    def clipped(x0: jax.Array) -> jax.Array:
        return jnp.clip(x0, -bound, bound)

    def thresholded(x0: jax.Array) -> jax.Array:
        result = dynamic_threshold(x0, coefficients.threshold[..., 1], coefficients.threshold[..., 2])
        return result if on.ndim == 0 else jnp.where(per_image(on, x0.ndim), result, clipped(x0))

    return jax.lax.cond(jnp.any(on), thresholded, clipped, x0)


def dynamic_threshold(x0: Float[Array, "*sample"], quantile: ArrayLike, largest: ArrayLike) -> Float[Array, "*sample"]:
    """Clip each image to a quantile of its absolute values, and divide by it.

    Source: Saharia et al. 2022 (arXiv 2205.11487), section 2.3.

    Args:
        x0: `[B, ...]`.
        quantile: 0..1, `[]` or `[B]`.
        largest: upper bound of the quantile's value, whose lower bound is 1; `[]` or `[B]`.
    Returns:
        `[B, ...]` in -1..1.
    """
    values = jnp.abs(x0).reshape(x0.shape[0], -1)
    if jnp.ndim(quantile) == 0:
        bound = jnp.quantile(values, quantile, axis=1)
    else:
        bound = jax.vmap(jnp.quantile)(values, quantile)
    bound = per_image(jnp.clip(bound, 1.0, largest), x0.ndim)
    return jnp.clip(x0, -bound, bound) / jnp.where(bound > 0, bound, 1)


def prediction_from_output(
    coefficients: SolverCoefficients,
    sample: Float[Array, "*sample"],
    output: Float[Array, "*output"],
    variance: Float[Array, "*sample"] | None = None,
) -> Prediction:
    """Turn a network's output, guided or not, into predictions of x0 and eps.

    Args:
        coefficients: one row of a schedule's, or one per image; the fields x0_from, eps_from, clip and threshold.
        sample: the state's first slot, `[B, ..., C]`, float32.
        output: `[B, ..., C]`, float32.
        variance: the network's second half of channels `[B, ..., C]`, if it has one.
    """
    if output.shape != sample.shape:
        raise ValueError(
            f"the output has the shape {list(output.shape)}, the sample {list(sample.shape)}; needed is the same, with "
            "the learned variance split off (split_output) and a guidance scale for each image or one for all"
        )
    x0 = limit_x0(coefficients, predict_x0(coefficients, sample, output))
    of_sample, of_x0, of_output = (per_image(coefficients.eps_from[..., i], sample.ndim) for i in range(3))
    return Prediction(x0, of_sample * sample + of_x0 * x0 + of_output * output, variance)


def noise_stddev(coefficients: SolverCoefficients, variance: Float[Array, "*sample"] | None, ndim: int) -> jax.Array:
    """The factor of a step's noise beside the matrix's own: 1, or what a learned variance asks for.

    Args:
        coefficients: one row, or one per image; the fields log_variance and variance_is_output.
        variance: `[B, ..., C]`: an interpolant of log-variances in -1..1 (Nichol & Dhariwal 2021, arXiv 2102.09672,
            equation 15), or the variance itself; None for 0.
        ndim: axes of the sample.
    Returns:
        broadcastable to `[B, ..., C]`.
    """
    low, high = (per_image(coefficients.log_variance[..., i], ndim) for i in range(2))
    direct = per_image(coefficients.variance_is_output > 0, ndim)
    if variance is None:
        return jnp.where(direct, 0.0, jnp.exp((0.5 * high + 0.5 * low) / 2))
    share = (variance + 1) / 2
    interpolated = jnp.exp(jnp.where(direct, 0.0, (share * high + (1 - share) * low) / 2))
    positive = variance > 0
    root = jnp.where(positive, jnp.sqrt(jnp.where(positive, variance, 1.0)), 0.0)
    return jnp.where(direct, root, interpolated)


def solver_step(
    coefficients: SolverCoefficients,
    state: Float[Array, "slots *sample"],
    prediction: Prediction,
    noise: Float[Array, "*#sample"],
) -> Float[Array, "slots *sample"]:
    """Do one step of any linear solver.

    Args:
        coefficients: one row of a schedule's, or one per image; the fields matrix, log_variance and
            variance_is_output.
        state: `[slots, B, ..., C]`, float32, the sample first; see `initial_state`.
        prediction: of the state's sample.
        noise: standard normal, `[B, ..., C]`; not used where the solver is deterministic.
    Returns:
        the next state, like `state`.
    """
    stddev = noise_stddev(coefficients, prediction.variance, noise.ndim)
    terms = jnp.stack([prediction.x0, prediction.eps, stddev * noise])
    terms = jnp.concatenate([state, terms])  # [slots + 3, B, ..., C]
    equation = "ij,j...->i..." if coefficients.matrix.ndim == 2 else "bij,jb...->ib..."
    following = jnp.einsum(equation, coefficients.matrix, terms, precision="highest").astype(state.dtype)
    return following if prediction.correction is None else following.at[0].add(prediction.correction)


def step_log_prob(
    coefficients: SolverCoefficients,
    state: Float[Array, "slots *sample"],
    prediction: Prediction,
    next_sample: Float[Array, "*sample"],
) -> Float[Array, "B"]:
    """Compute the log-probability of a stochastic solver's step, for policy gradients.

    A step of `solver_step` is a sample from a normal distribution: its mean is the step without noise, and its standard
    deviation the matrix's factor of the noise, times that of a learned variance. The mean over all elements of an image
    is taken, not the sum, as in DDPO's implementation (Black et al. 2023, arXiv 2305.13301), of whose
    `ddim_step_with_logprob` this is the generalisation.

    Args:
        coefficients, state, prediction: of the step, as in `solver_step`.
        next_sample: slot 0 of the state after the step, `[B, ..., C]`; a constant of the policy's gradient.
    Returns:
        `[B]`, float32 (float64 where the state is). A step without noise has no density: 0, with a gradient of zero.
    """
    mean = solver_step(coefficients, state, prediction, jnp.zeros_like(next_sample))[0]
    factor = per_image(coefficients.matrix[..., 0, -1], mean.ndim)
    stddev = factor * noise_stddev(coefficients, prediction.variance, mean.ndim)
    noisy = stddev > 0
    scale = jnp.where(noisy, stddev, 1.0)
    logs = -0.5 * jnp.square((next_sample - mean) / scale) - jnp.log(scale) - 0.5 * math.log(2 * math.pi)
    return jnp.where(noisy, logs, 0.0).mean(axis=tuple(range(1, mean.ndim))).astype(state.dtype)
