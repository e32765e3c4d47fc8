"""A solver's step: rows per image, and gradients that are finite and right."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kandinsky_jax import diffusion
from kandinsky_jax.schedulers import SCHEDULERS, DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from tests.conftest import note
from tests.diffusion.toy import SHAPE, assert_close, inputs, normal, row, with_variance

THRESHOLD = {"thresholding": True, "sample_max_value": 2.0, "dynamic_thresholding_ratio": 0.9}
COEFFICIENTS = {
    "ddim": row(DDIMScheduler(clip_sample=True).schedule(8), 3),
    "dpm++2m": row(DPMSolverMultistepScheduler().schedule(8), 3),
    "threshold": row(DPMSolverMultistepScheduler(**THRESHOLD).schedule(8), 3),
    "learned range": row(DDPMScheduler(variance_type="learned_range", clip_sample=False).schedule(8), 3),
    "learned": row(DDPMScheduler(variance_type="learned", clip_sample=False).schedule(8), 3),
}
# Bounds that a variance which is an output does not use: their exponential would overflow.
COEFFICIENTS["learned, with bounds"] = COEFFICIENTS["learned"]._replace(log_variance=jnp.array([10.0, -10.0]))


@jax.jit
def one_step(coefficients, state, output, variance, noise):
    prediction = diffusion.prediction_from_output(coefficients, state[0], output, variance)
    return diffusion.solver_step(coefficients, state, prediction, noise)


def arrays(batch: int) -> list[jax.Array]:
    """State, output, variance and noise."""
    shape = (batch, *SHAPE[1:])
    return [normal(3, 6, *shape), normal(4, *shape), jnp.tanh(normal(5, *shape)), normal(6, *shape)]


def test_a_row_per_image_is_each_images_own_row():
    state, *others = arrays(len(COEFFICIENTS))
    together = one_step(jax.tree.map(lambda *x: jnp.stack(x), *COEFFICIENTS.values()), state, *others)
    for i, own in enumerate(COEFFICIENTS.values()):
        alone = one_step(own, state[:, i : i + 1], *(x[i : i + 1] for x in others))
        assert_close(together[:, i : i + 1], alone, 1e-6)


def test_equal_rows_per_image_are_one_row_for_the_batch():
    given = arrays(3)
    for own in COEFFICIENTS.values():
        each = one_step(jax.tree.map(lambda x: jnp.stack([x] * 3), own), *given)
        assert_close(each, one_step(own, *given), 1e-6)


def test_an_output_for_an_x0_predicts_it():
    sample, x0 = normal(0, *SHAPE), normal(1, *SHAPE)
    for own in COEFFICIENTS.values():
        again = diffusion.predict_x0(own, sample, diffusion.output_for_x0(own, sample, x0))
        assert_close(again, x0, 1e-5)
    clean = row(DDIMScheduler().schedule(8), 0)._replace(x0_from=jnp.array([1.0, 0.0]))
    assert np.array_equal(diffusion.output_for_x0(clean, sample, x0), jnp.zeros(SHAPE))


@jax.jit
def gradients(coefficients, noise, cond, uncond, scale):
    """Of a sample by six steps; also where the coefficients are differentiated, and where all are batched by vmap."""

    def loss(noise, cond, scale, coefficients):
        guider = diffusion.ClassifierFreeGuidance(scale)
        key = jax.random.key(0)
        result = diffusion.sample(with_variance, noise, cond, uncond, coefficients, guider=guider, rng=key)
        return jnp.mean(result * jnp.arange(result.size).reshape(result.shape))

    alone = jax.grad(loss, argnums=(0, 1, 2, 3))(noise, cond, scale, coefficients)
    twice = jax.tree.map(lambda x: jnp.stack([x, x]), coefficients)
    batched = jax.vmap(jax.grad(loss, argnums=(0, 1, 2)), in_axes=(None, None, None, 0))(noise, cond, scale, twice)
    return alone, batched


@pytest.mark.parametrize("name", SCHEDULERS)
def test_gradients_are_finite_for_every_solver(name):
    fields = {field.name for field in SCHEDULERS[name].fields()}
    variants = [{}]
    variants += [THRESHOLD] * ("thresholding" in fields)
    if "variance_type" in fields:
        variants += [{"variance_type": kind} for kind in SCHEDULERS[name].CHOICES["variance_type"]]
    for fields in variants:
        schedule = SCHEDULERS[name](**fields).schedule(12)
        last = jax.tree.map(lambda x: x[-6:], diffusion.solver_coefficients(schedule))
        noise, cond, uncond = inputs()
        alone, batched = gradients(last, noise, cond, uncond, 3.0)
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((alone, batched))), (name, fields)
        assert jnp.abs(alone[0]).max() > 0
        assert jnp.abs(alone[2]) > 0
    assert gradients._cache_size() == 1


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_gradients_are_finite_at_the_edges_of_a_branch(name):
    """Zero and huge numbers, where the branch that a row does not take would give NaN or infinity."""
    own = COEFFICIENTS[name]
    state, output, variance, noise = arrays(2)
    variance = jnp.concatenate([jnp.zeros_like(variance[:1]), -(variance[1:] ** 2)])
    variance = variance * (1.0 if name == "learned range" else 1e6)
    for some in (state, jnp.zeros_like(state)):
        found = jax.grad(lambda *x: one_step(own, *x).sum(), argnums=(0, 1, 2, 3))(some, output, variance, noise)
        assert all(jnp.isfinite(leaf).all() for leaf in found)


def test_gradients_agree_with_differences_in_float64():
    with jax.enable_x64(True):
        double = jax.tree.map(lambda x: np.asarray(x, np.float64), [*arrays(2), normal(7, *SHAPE)])
        given = [jnp.asarray(x) for x in [*double, np.float64(3.0)]]
        weights = jnp.asarray(np.random.default_rng(8).normal(size=(6, *SHAPE)))

        @jax.jit
        def guided_step(coefficients, state, uncond, variance, noise, cond, scale):
            outputs = [jnp.concatenate([x, variance], axis=-1) for x in (uncond, cond)]
            prediction, _ = diffusion.ClassifierFreeGuidance(scale).combine(outputs, state[0], coefficients, None)
            return (weights * diffusion.solver_step(coefficients, state, prediction, noise)).sum()

        for name, own in COEFFICIENTS.items():
            own = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), own)
            if name == "learned":
                given[2] = given[2] ** 2  # a variance
            for seed in range(3):
                rng = np.random.default_rng(seed)
                direction = [jnp.asarray(rng.normal(size=x.shape)) for x in given]
                step = 1e-6
                ahead, back = (
                    guided_step(own, *(x + s * d for x, d in zip(given, direction, strict=True))) for s in (step, -step)
                )
                found = jax.grad(guided_step, argnums=tuple(range(1, 7)))(own, *given)
                slope = sum(jnp.vdot(g, d) for g, d in zip(found, direction, strict=True))
                difference = (ahead - back) / (2 * step)
                error = note(abs(slope - difference) / abs(difference), "relative error of a slope, float64")
                assert error <= 1e-4, (name, seed, float(slope), float(difference))
