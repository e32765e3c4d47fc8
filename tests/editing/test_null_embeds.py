"""Null-embedding optimisation: guided sampling follows the inversion without guidance."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kandinsky_jax as kj
from kandinsky_jax import diffusion
from kandinsky_jax.editing import ddim_inversion, embeds_by_step, optimize_null_embeds
from tests.diffusion.toy import SHAPE, assert_close, inputs, normal
from tests.editing.test_inversion import Momentum, calmer, schedule

STEPS, WIDTH = 6, 8
GUIDER = diffusion.ClassifierFreeGuidance(3.0)
WEIGHTS = normal(7, WIDTH, SHAPE[-1]) / WIDTH**0.5


def condition(embeds: jax.Array) -> jax.Array:
    return embeds @ WEIGHTS


def given() -> tuple[jax.Array, jax.Array, jax.Array]:
    """The trajectory, and embeddings of the pictures and of nothing."""
    latents, embeds, null = inputs()[0], normal(3, SHAPE[0], WIDTH), normal(4, SHAPE[0], WIDTH)
    trajectory = ddim_inversion(calmer, latents, condition(embeds), None, schedule(STEPS), fixed_point_iterations=30)
    return trajectory, embeds, null


def optimized(trajectory: jax.Array, embeds: jax.Array, null: jax.Array, **options):
    options = {"learning_rate": 0.1, "iterations": 30, "guider": GUIDER, "tolerance": 1e-7} | options
    return optimize_null_embeds(calmer, condition, trajectory, condition(embeds), null, schedule(STEPS), **options)


def sampled(first: jax.Array, embeds: jax.Array, null: jax.Array) -> jax.Array:
    """Guided sampling by embeddings of each step, `[B, N, D]`."""
    model = embeds_by_step(calmer, condition, schedule(STEPS))
    return diffusion.sample(model, first, embeds, null, schedule(STEPS), guider=GUIDER)


def each_step(embeds: jax.Array) -> jax.Array:
    return jnp.repeat(embeds[:, None], STEPS, axis=1)


def test_guided_sampling_with_the_embeddings_reconstructs():
    trajectory, embeds, null = given()
    found = optimized(trajectory, embeds, null)
    assert found.embeds.shape == (SHAPE[0], STEPS, WIDTH)
    before, after = (
        jnp.abs(sampled(trajectory[0], each_step(embeds), used) - trajectory[-1]).mean()
        for used in (each_step(null), found.embeds)
    )
    assert after < 0.1 * before
    assert_close(sampled(trajectory[0], each_step(embeds), found.embeds), found.latents)


def test_the_gradient_is_that_of_finite_differences(enable_x64):
    """The first step of Adam goes against the gradient's sign, by the learning rate."""
    trajectory, embeds, null = (np.asarray(x, np.float64) for x in given())
    rate, first = 1e-3, jax.tree.map(lambda x: x[:1], diffusion.solver_coefficients(schedule(STEPS)))
    options = {"guider": GUIDER, "iterations": 1, "learning_rate": rate, "tolerance": 0.0}
    found = optimize_null_embeds(calmer, condition, trajectory[:2], condition(embeds), null, first, **options)

    @jax.jit
    def loss(null: jax.Array) -> jax.Array:
        reached = diffusion.sample(calmer, trajectory[0], condition(embeds), condition(null), first, guider=GUIDER)
        return ((reached - trajectory[1]) ** 2).mean(axis=(1, 2, 3)).sum()

    slopes = np.zeros_like(null)
    for place in np.ndindex(null.shape):
        change = np.zeros_like(null)
        change[place] = 1e-5
        slopes[place] = (loss(null + change) - loss(null - change)) / 2e-5
    np.testing.assert_allclose(found.embeds[:, 0], null - rate * np.sign(slopes), rtol=1e-4)
    assert found.losses.sum() < loss(null)


@pytest.fixture
def enable_x64():
    with jax.enable_x64(True):
        yield


def test_an_image_is_optimised_by_itself_and_stops_early():
    trajectory, embeds, null = given()
    solved = embeds.at[1].set(embeds[1] + 0.01)  # guidance against nearly the same embedding has little to mend
    run = jax.jit(lambda *args: optimized(*args, tolerance=1e-4))
    both = run(trajectory, embeds, null.at[1].set(solved[1]))
    for i in range(SHAPE[0]):
        one = slice(i, i + 1)
        alone = run(trajectory[:, one], embeds[one], null.at[1].set(solved[1])[one])
        assert_close(both.embeds[one], alone.embeds, 1e-4)
        assert_close(both.latents[one], alone.latents, 1e-4)
        np.testing.assert_array_equal(both.iterations[:, one], alone.iterations)
    assert both.iterations[0, 0] > 0
    assert both.iterations[0, 1] == 0
    assert both.iterations.max() <= 30
    assert (both.losses[:, 1] <= 1e-4).all()


def test_it_never_gets_worse_than_the_step_before():
    trajectory, embeds, null = given()
    huge = optimized(trajectory, embeds, null, learning_rate=100.0, iterations=3)
    none = optimized(trajectory, embeds, null, iterations=0)
    assert_close(none.embeds, each_step(null), 0)
    assert (huge.losses[0] <= none.losses[0]).all()


def test_wrong_arguments():
    trajectory, embeds, null = given()
    with pytest.raises(ValueError, match="trajectory has 6 samples; needed are 7 for 6 steps"):
        optimized(trajectory[1:], embeds, null)
    with pytest.raises(ValueError, match="Momentum keeps a state"):
        optimized(trajectory, embeds, null, guider=Momentum())
    for wrong in ({"iterations": -1}, {"tolerance": float("nan")}):
        with pytest.raises(ValueError, match=r"iterations=.* and tolerance=.* must be at least 0"):
            optimized(trajectory, embeds, null, **wrong)


def test_embeds_by_step_takes_those_of_the_step():
    trajectory, embeds, null = given()
    rows = diffusion.solver_coefficients(schedule(STEPS))
    changing = jnp.stack([embeds + 0.3 * i for i in range(STEPS)], axis=1)
    expected = trajectory[0]
    for i in range(STEPS):
        one = jax.tree.map(lambda column, i=i: column[i : i + 1], rows)
        expected = diffusion.sample(calmer, expected, condition(changing[:, i]), condition(null), one, guider=GUIDER)
    assert_close(sampled(trajectory[0], changing, each_step(null)), expected)
    with pytest.raises(ValueError, match="same timestep"):
        embeds_by_step(calmer, condition, kj.HeunDiscreteScheduler().schedule(4))
