"""Diffusion posterior sampling: one step by its formula, its gradient, and how far the measurement is met."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from kandinsky_jax import composition, diffusion
from kandinsky_jax.schedulers import DDIMScheduler, DDPMScheduler, UniPCMultistepScheduler
from tests import shapes
from tests.conftest import note
from tests.diffusion.toy import SHAPE, assert_close, inputs, network, normal, row

SCHEDULE = DDIMScheduler(clip_sample=False).schedule(5)


def squares(x0):
    """An operator that is not linear, `[B, h, w, C]` -> `[B, w]`."""
    return (x0**2).sum((1, 3))


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DDPMScheduler])
def test_without_a_scale_it_is_the_inner_guider(scheduler):
    """Also one whose predictions have a correction of their own."""
    schedule = scheduler(clip_sample=False).schedule(5)
    inner = diffusion.CFGPlusPlus(0.6)
    guider = composition.PosteriorSampling(squares, squares(normal(9, *SHAPE)), 0.0, inner)
    options = {"schedule": schedule, "rng": 0}
    alone = diffusion.sample(network, *inputs(), guider=inner, **options)
    assert_close(diffusion.sample(network, *inputs(), guider=guider, **options), alone)


def test_an_inner_guider_that_does_not_fit_the_solver():
    guider = composition.PosteriorSampling(squares, squares(normal(9, *SHAPE)), 1.0, diffusion.CFGPlusPlus(0.6))
    with pytest.raises(ValueError, match="whose steps keep nothing"):
        diffusion.sample(network, *inputs(), UniPCMultistepScheduler().schedule(5), guider=guider)


def test_an_interval_of_it_is_refused():
    guider = diffusion.IntervalGuidance(composition.PosteriorSampling(squares, squares(normal(9, *SHAPE))), 0, 1000)
    with pytest.raises(TypeError, match=r"PosteriorSampling differentiates.*as its own guider"):
        diffusion.sample(network, *inputs(), SCHEDULE, guider=guider)


def test_one_step_is_algorithm_1():
    """DDPM with 1000 steps and a network and an operator that are linear, so that all of it is NumPy in float64."""
    rng = np.random.default_rng(0)
    x, z = rng.normal(size=(2, 2, 4))
    weight, a, y = 0.3 * rng.normal(size=(4, 4)), rng.normal(size=(4, 3)), rng.normal(size=(2, 3))
    step, scale = 600, np.array([0.7, 1.3])  # t = 399
    schedule = DDPMScheduler(clip_sample=False, variance_type="fixed_small").schedule(1000)

    alphas = 1 - np.linspace(1e-4, 0.02, 1000)
    now, before, alpha = np.prod(alphas[:400]), np.prod(alphas[:399]), alphas[399]
    x0 = (x - np.sqrt(1 - now) * (x @ weight)) / np.sqrt(now)
    residual = y - x0 @ a
    jacobian = (np.eye(4) - np.sqrt(1 - now) * weight) / np.sqrt(now)  # x0 = x @ jacobian
    of_squared_norm = -2 * residual @ a.T @ jacobian.T
    zeta = scale / 2 / np.linalg.norm(residual, axis=1)
    expected = (
        np.sqrt(alpha) * (1 - before) / (1 - now) * x
        + np.sqrt(before) * (1 - alpha) / (1 - now) * x0
        + np.sqrt((1 - before) / (1 - now) * (1 - alpha)) * z
        - zeta[:, None] * of_squared_norm
    )

    def linear(sample, timestep, condition):
        return sample @ jnp.asarray(weight, jnp.float32)

    guider = composition.PosteriorSampling(
        lambda x0: x0 @ jnp.asarray(a, jnp.float32),
        jnp.asarray(y, jnp.float32),
        jnp.asarray(scale, jnp.float32),
        diffusion.NoGuidance(),
    )
    table = jax.tree.map(lambda column: column[step : step + 1], diffusion.solver_coefficients(schedule))
    assert int(table.timestep[0]) == 399
    x, z = (jnp.asarray(array, jnp.float32) for array in (x, z))
    found = diffusion.sample(linear, x, None, None, table, guider=guider, rng=lambda index, shape: z)
    assert_close(found, expected)


def correction(guider, sample, cond, uncond, model=network):
    calls = diffusion.batch_evaluations(guider.evaluations(cond, uncond))
    return diffusion.predict(model, guider, calls, row(SCHEDULE, 2), sample)[0]


def test_the_gradient_is_that_of_finite_differences():
    with jax.enable_x64(True):
        sample, cond, uncond = (x.astype(jnp.float64) for x in inputs())
        y = jnp.asarray(np.random.default_rng(1).normal(size=(2, 4)))
        inner = diffusion.ClassifierFreeGuidance(3.0)
        guider = composition.PosteriorSampling(squares, y, 1.0, inner)

        def distance(sample):
            return composition.measurement_distance(squares, y, correction(inner, sample, cond, uncond).x0)

        found = correction(guider, sample, cond, uncond)
        assert_close(found.x0, correction(inner, sample, cond, uncond).x0, 1e-12)
        for seed in range(3):
            direction = jnp.asarray(np.random.default_rng(seed).normal(size=SHAPE))
            change = (distance(sample + 1e-5 * direction) - distance(sample - 1e-5 * direction)) / 2e-5
            assert_close((-found.correction * direction).sum((1, 2, 3)), change, 1e-8)


def test_a_whole_sample_has_gradients_of_its_own():
    """Second derivatives of the network: to the noise, the measurement and the step size."""
    with jax.enable_x64(True):
        noise, cond, uncond = (x.astype(jnp.float64) for x in inputs())
        y, scale = jnp.asarray(np.random.default_rng(1).normal(size=SHAPE)), jnp.asarray(0.02)
        schedule = DDIMScheduler(clip_sample=False).schedule(5, begin=2)

        def total(noise, y, scale):
            guider = composition.PosteriorSampling(jnp.tanh, y, scale)
            return jnp.sum(diffusion.sample(network, noise, cond, uncond, schedule, guider=guider) ** 2)

        check_grads(jax.jit(total), (noise, y, scale), 1, modes=["rev"], atol=1e-6, rtol=1e-6)


def test_a_measurement_that_is_met_has_no_correction_and_no_nan():
    sample, cond, _ = inputs()
    met = correction(diffusion.NoGuidance(), sample, cond, None).x0
    guider = composition.PosteriorSampling(lambda x0: x0, met, 1.0, diffusion.NoGuidance())
    np.testing.assert_array_equal(correction(guider, sample, cond, None).correction, 0)


def test_images_of_a_batch_do_not_depend_on_each_other_and_zero_is_the_guider_alone():
    noise, cond, uncond = inputs()
    y, scales = normal(3, 2, 4), jnp.array([0.3, 0.0])
    both = diffusion.sample(
        network, noise, cond, uncond, SCHEDULE, guider=composition.PosteriorSampling(squares, y, scales)
    )
    for i in range(2):
        part = slice(i, i + 1)
        guider = composition.PosteriorSampling(squares, y[part], scales[i])
        one = diffusion.sample(network, noise[part], cond[part], uncond[part], SCHEDULE, guider=guider)
        assert_close(both[part], one)
    plain = diffusion.sample(network, noise, cond, uncond, SCHEDULE)
    assert_close(both[1], plain[1])
    assert np.abs(both[0] - plain[0]).max() > 0.05


def test_the_guider_is_a_pytree_of_its_numbers():
    noise, cond, uncond = inputs()

    @jax.jit
    def run(guider):
        return diffusion.sample(network, noise, cond, uncond, SCHEDULE, guider=guider)

    def guider(scale):
        return composition.PosteriorSampling(squares, normal(3, 2, 4), scale, diffusion.ClassifierFreeGuidance(2.0))

    assert np.abs(run(guider(0.1)) - run(guider(0.3))).max() > 0.01
    assert run._cache_size() == 1


def test_what_does_not_fit_is_said():
    noise, cond, uncond = inputs()
    guider = composition.PosteriorSampling(squares, jnp.zeros((2, 5)))
    with pytest.raises(ValueError, match=r"measurement has the shape \[2, 5\]; needed is .* \[2, 4\]"):
        diffusion.sample(network, noise, cond, uncond, SCHEDULE, guider=guider)
    nested = composition.PosteriorSampling(squares, jnp.zeros((2, 4)), guider=guider)
    with pytest.raises(TypeError, match="guider is a PosteriorSampling, which differentiates itself"):
        diffusion.sample(network, noise, cond, uncond, SCHEDULE, guider=nested)


@pytest.fixture(scope="module")
def given(ours):
    """Two true pictures, and the conditions of their captions."""
    asked = shapes.captions(2, seed=3)
    rng = np.random.default_rng(0)
    truth = jnp.asarray(np.stack([shapes.draw(item, rng) for item in asked]) * 2 - 1, jnp.float32)
    texts = [item.text for item in asked]
    embeds, negative = ours["KandinskyV22PriorPipeline"](texts, generator=0, return_dict=False)
    pipe = ours["KandinskyV22Pipeline"]
    return pipe, truth, jnp.asarray(embeds), jnp.asarray(negative)


@pytest.mark.slow
def test_the_gradient_through_unet_and_movq_is_that_of_finite_differences(given):
    pipe, truth, embeds, negative = given
    (network, params), (decoder, weights) = map(diffusion.Network.split, (pipe.unet, pipe.movq))
    with jax.enable_x64(True):
        params, weights = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (params, weights))
        truth, embeds, negative = (jnp.asarray(x, jnp.float64) for x in (truth, embeds, negative))
        sample = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 4)))
        reduced = composition.downsampling(4)

        @jax.jit
        def predicted(params, weights, sample):
            unet, movq = network.bind(params), decoder.bind(weights)
            operator = composition.of_decoded(movq.decode, reduced)
            guider = composition.PosteriorSampling(operator, reduced(truth))
            prediction = correction(guider, sample, unet.condition(embeds), unet.condition(negative), unet)
            return prediction, composition.measurement_distance(operator, reduced(truth), prediction.x0)

        found, _ = predicted(params, weights, sample)
        assert found.correction.dtype == jnp.float64
        for seed in range(2):
            direction = jnp.asarray(np.random.default_rng(seed).normal(size=sample.shape))
            # Norms and attention are computed in float32, whose rounding a smaller difference would show.
            ahead, behind = (predicted(params, weights, sample + sign * 1e-2 * direction)[1] for sign in (1, -1))
            slope = -(found.correction * direction).sum((1, 2, 3))
            error = np.abs(slope - (ahead - behind) / 2e-2).max() / np.abs(slope).max()
            assert note(error, "gradient beside finite differences, relative") <= 1e-3
