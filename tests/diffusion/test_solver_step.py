"""A solver's step: rows per image, and gradients that are finite and right."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kandinsky_jax import diffusion
from kandinsky_jax.schedulers import (
    SCHEDULERS,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    Scheduler,
)
from tests.conftest import OFFICIAL, note, official_config
from tests.diffusion.toy import SHAPE, assert_close, inputs, network, normal, row, with_variance

THRESHOLD = {"thresholding": True, "sample_max_value": 2.0, "dynamic_thresholding_ratio": 0.9}
# Options of one solver or two.
OTHERS = [("eta", 1.0), ("use_clipped_model_output", True), ("predict_x0", False), ("solver_order", 3)]
OFFICIAL_CONFIGS = [
    official_config(folder.name, "scheduler") for folder in sorted(OFFICIAL.iterdir()) if folder.is_dir()
]
STEP = 1e-7  # of differences in float64
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


def variants(name: str) -> list[Scheduler]:
    """A solver with each option that makes another kind of table, and from the official models' configurations."""
    cls = SCHEDULERS[name]
    defaults = {field.name: field.default for field in cls.fields()}
    # Some forms cannot end at a sigma of zero.
    ends = {"final_sigmas_type": "sigma_min"} if "final_sigmas_type" in defaults else {}
    options: list[dict[str, object]] = [{}, *([ends] if ends else [])]
    options += [{"clip_sample": on} for on in (True, False) if "clip_sample" in defaults]
    options += [THRESHOLD] * ("thresholding" in defaults)
    for field in ("variance_type", "prediction_type", "algorithm_type", "solver_type"):
        known = cls.CHOICES.get(field, ()) if field in defaults else ()
        options += [ends | {field: kind} for kind in known if kind is not None]
    options += [{"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}] * (
        "rescale_betas_zero_snr" in defaults
    )
    options += [{field: value} | ends for field, value in OTHERS if field in defaults]
    official = [
        config
        for config in OFFICIAL_CONFIGS
        if all(config.get(field, known[0]) in known for field, known in cls.CHOICES.items() if field in defaults)
    ]
    assert official
    return [*(cls(**some) for some in options), *(cls.from_config(config) for config in official)]


def rows(scheduler: Scheduler, count: int) -> diffusion.SolverCoefficients:
    """The first and the last rows of a schedule of twelve steps, `count` in all."""
    table = diffusion.solver_coefficients(scheduler.schedule(12))
    return jax.tree.map(lambda x: jnp.concatenate([x[: count - count // 2], x[-(count // 2) :]]), table)


@jax.jit
def gradients(coefficients, noise, cond, uncond, scale):
    """Of a sample by six steps; also where the coefficients are differentiated, and where all are batched by vmap."""

    def loss(noise, cond, scale, coefficients):
        guider = diffusion.ClassifierFreeGuidance(scale)
        key = jax.random.key(0)
        result = diffusion.sample(with_variance, noise, cond, uncond, coefficients, guider=guider, rng=key)
        return jnp.mean(result * jnp.arange(result.size).reshape(result.shape))

    at = (noise, cond, scale, coefficients)
    alone = jax.grad(loss, argnums=(0, 1, 2, 3))(*at)
    forward = jax.jvp(loss, at, jax.tree.map(jnp.ones_like, at))[1]
    twice = jax.tree.map(lambda x: jnp.stack([x, x]), coefficients)
    batched = jax.vmap(jax.grad(loss, argnums=(0, 1, 2)), in_axes=(None, None, None, 0))(noise, cond, scale, twice)
    return alone, forward, batched


def test_vmap_of_forward_mode_is_one_of_each():
    """Over noise, conditions and guidance scale together."""
    schedule = DDIMScheduler().schedule(3)

    def sampled(noise, cond, uncond, scale):
        guider = diffusion.ClassifierFreeGuidance(scale)
        return diffusion.sample(network, noise, cond, uncond, schedule, guider=guider)

    def forward(*at):
        return jax.jvp(sampled, at, jax.tree.map(lambda x: 0.1 * x, at))

    examples = [(*inputs(), jnp.float32(1.5)), (*(x[::-1] for x in inputs()), jnp.float32(4.0))]
    found = jax.vmap(forward)(*(jnp.stack(both) for both in zip(*examples, strict=True)))
    for i, example in enumerate(examples):
        for own, expected in zip(found, forward(*example), strict=True):
            assert_close(own[i], expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULERS)
def test_gradients_of_a_sample_are_finite_for_every_solver(name):
    for scheduler in variants(name):
        noise, cond, uncond = inputs()
        found = gradients(rows(scheduler, 6), noise, cond, uncond, jnp.float32(3.0))
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(found)), scheduler
        assert jnp.abs(found[0][0]).max() > 0, scheduler
        assert jnp.abs(found[0][2]) > 0, scheduler
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


@jax.jit
def slopes(coefficients, given, direction, weights):
    """Slopes along a direction of one guided step by each of some rows, to the state's six slots, both outputs, the
    variance, the noise and the scale: by reverse mode, by forward mode and by differences. And the gradients."""

    def guided_step(own, state, uncond, cond, variance, noise, scale):
        outputs = [jnp.concatenate([x, variance], axis=-1) for x in (uncond, cond)]
        prediction, _ = diffusion.ClassifierFreeGuidance(scale).combine(outputs, state[0], own, None)
        return (weights * diffusion.solver_step(own, state, prediction, noise)).sum()

    def of(own):
        found = jax.grad(guided_step, argnums=tuple(range(1, 7)))(own, *given)
        reverse = sum(jnp.vdot(g, d) for g, d in zip(found, direction, strict=True))
        forward = jax.jvp(lambda *x: guided_step(own, *x), given, direction)[1]
        ahead, back = (
            guided_step(own, *(x + step * d for x, d in zip(given, direction, strict=True))) for step in (STEP, -STEP)
        )
        return reverse, forward, (ahead - back) / (2 * STEP), found

    return jax.vmap(of)(coefficients)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_gradients_of_a_guided_step_agree_with_differences(name):
    """Forward and reverse mode with each other, and in float64 with differences."""
    for scheduler in variants(name):
        variance = jnp.tanh(normal(5, *SHAPE))
        if getattr(scheduler, "variance_type", None) == "learned":
            variance = variance**2
        given = (normal(3, 6, *SHAPE), *(normal(i, *SHAPE) for i in (4, 7)), variance, normal(6, *SHAPE), np.float32(3))
        direction = tuple(normal(10 + i, *np.shape(x)) for i, x in enumerate(given))
        arguments = (rows(scheduler, 12), given, direction, normal(8, 6, *SHAPE))
        single = slopes(*arguments)
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((single[:2], single[3]))), scheduler
        with jax.enable_x64(True):
            double = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), arguments)
            reverse, forward, differences = (np.asarray(x) for x in slopes(*double)[:3])
        for what, found in (("reverse", reverse), ("forward", forward)):
            error = np.abs(found - differences) / np.abs(differences)
            assert note(error.max(), f"relative error of a slope, {what} mode, float64") <= 1e-4, scheduler
