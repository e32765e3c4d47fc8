"""Negative image embeddings, one for each step, with which guided sampling follows an inversion without guidance.

Source: null-text inversion, Mokady et al. 2022 (arXiv 2211.09794), section 3.3 and algorithm 1, with the decoder's
negative image embedding in the place of the empty prompt's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from kandinsky_jax.common.types import Array, Float, PyTree
from kandinsky_jax.diffusion import (
    ClassifierFreeGuidance,
    Guider,
    Model,
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
from kandinsky_jax.editing.inversion import check_invertible, check_stateless

Condition = Callable[[jax.Array], PyTree]  # embeddings [B, D] -> what the model takes as condition
_CFG = ClassifierFreeGuidance()


class NullEmbeds(NamedTuple):
    """What `optimize_null_embeds` finds."""

    embeds: jax.Array  # [B, N, D], the negative embedding of each step
    latents: jax.Array  # [B, ..., C], the last sample of guided sampling with them
    losses: jax.Array  # [N, B], the mean squared distance to the trajectory after each step
    iterations: jax.Array  # int [N, B], gradient steps that were taken


def optimize_null_embeds(
    model: Model,
    condition: Condition,
    trajectory: Float[Array, "M B *s C"],
    cond: PyTree,
    null_embeds: Float[Array, "B D"],
    schedule: Schedule | SolverCoefficients,
    *,
    guider: Guider = _CFG,
    iterations: int = 10,
    learning_rate: float = 0.1,
    tolerance: float = 1e-5,
) -> NullEmbeds:
    """Optimise the negative embedding of each step by Adam, the first step first.

    Step i begins where the guided step before has come to, with the embedding before, and minimises the mean squared
    distance between the next sample and `trajectory[i + 1]`. An image stops once that is at most `tolerance`.

    Args:
        model: the bound UNet.
        condition: what makes a condition of embeddings, such as `unet.condition`; gradients go through it.
        trajectory: `[N + 1, B, ..., C]`, from `ddim_inversion` without guidance.
        cond: the picture's own condition, as in the inversion.
        null_embeds: to begin with `[B, D]`, such as the pipeline's negative embedding.
        schedule: that of the inversion.
        guider: with the guidance of the edit; one without a state.
        iterations: at most, for each step.
        learning_rate: Adam's, for embeddings whose numbers are of about 1; it falls by half from the first step to the
            last. The paper's 0.01 is for 77 tokens.
        tolerance: of the mean squared distance.
    Returns:
        embeddings `[B, N, D]`, and what they reach; sample with them by `embeds_by_step`.
    Raises:
        ValueError: where the guider keeps a state, or the trajectory is not of N steps.
    """
    coefficients = solver_coefficients(schedule) if isinstance(schedule, Schedule) else schedule
    steps = len(coefficients.timestep)
    if len(trajectory) != steps + 1:
        raise ValueError(
            f"trajectory has {len(trajectory)} samples; needed are {steps + 1} for {steps} steps, as ddim_inversion "
            "with the same schedule returns them"
        )
    if isinstance(schedule, Schedule):
        check_invertible(schedule)
    if iterations < 0 or not tolerance >= 0:
        raise ValueError(f"iterations={iterations} and tolerance={tolerance} must be at least 0")
    check_stateless(guider, trajectory[0])
    optimizer = optax.scale_by_adam()

    def distance(
        embeds: jax.Array, sample: jax.Array, target: jax.Array, row: SolverCoefficients
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        calls = batch_evaluations(guider.evaluations(cond, condition(embeds)))
        prediction, _, _ = predict(model, guider, calls, row, sample, guider.init(sample))
        state = initial_state(sample, row.matrix.shape[-2])
        reached = solver_step(row, state, prediction, jnp.zeros_like(sample))[0]
        losses = jnp.mean((reached - target) ** 2, axis=tuple(range(1, sample.ndim)))  # [B]
        return losses.sum(), (losses, reached)

    def step(carry: tuple[jax.Array, jax.Array], row: PyTree) -> tuple[tuple[jax.Array, jax.Array], PyTree]:
        (sample, embeds), (index, coefficients, target) = carry, row
        rate = learning_rate * (1 - index / (2 * steps))

        def unfinished(search: _Search) -> jax.Array:
            return (search.evaluated <= iterations) & jnp.any(search.losses > tolerance)

        def update(search: _Search) -> _Search:
            gradient, (losses, reached) = jax.grad(distance, has_aux=True)(search.tried, sample, target, coefficients)
            search = search.with_better(losses, reached)
            change, adam = optimizer.update(gradient, search.adam)
            tried = search.tried - rate * change
            going_on = search.losses > tolerance
            return search._replace(
                tried=jnp.where(going_on[:, None], tried, search.tried),
                adam=adam,
                evaluated=search.evaluated + 1,
                iterations=search.iterations + going_on,
            )

        unknown = jnp.full(len(sample), jnp.inf, sample.dtype)
        nothing = jnp.zeros(len(sample), jnp.int32)
        search = _Search(embeds, optimizer.init(embeds), embeds, unknown, sample, nothing, jnp.zeros((), jnp.int32))
        found = jax.lax.while_loop(unfinished, update, search)
        taken = jnp.minimum(found.iterations, iterations)  # the last evaluation's step is not taken
        return (found.reached, found.best), (found.best, found.losses, taken)

    first = jnp.asarray(trajectory[0], jnp.promote_types(trajectory.dtype, jnp.float32))
    embeds = jnp.asarray(null_embeds, first.dtype)
    with model_precision(model):
        (latents, _), (found, losses, taken) = jax.lax.scan(
            step, (first, embeds), (jnp.arange(steps), coefficients, trajectory[1:])
        )
    return NullEmbeds(found.swapaxes(0, 1), latents, losses, taken)


class _Search(NamedTuple):
    """The search for one step's embeddings."""

    tried: jax.Array  # [B, D], to be evaluated next
    adam: PyTree
    best: jax.Array  # [B, D]
    losses: jax.Array  # [B], of the best
    reached: jax.Array  # [B, ..., C], the next sample with the best
    iterations: jax.Array  # int [B]
    evaluated: jax.Array  # int []

    def with_better(self, losses: jax.Array, reached: jax.Array) -> _Search:
        """Keep what was tried for the images in which it is better."""
        better = losses < self.losses
        return self._replace(
            best=jnp.where(better[:, None], self.tried, self.best),
            losses=jnp.where(better, losses, self.losses),
            reached=jnp.where(per_image(better, reached.ndim), reached, self.reached),
        )
