"""The two loops: `sample` for gradients and `denoise` with dynamic bounds."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kandinsky_jax import diffusion
from kandinsky_jax.schedulers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from tests.conftest import note, quick_and_slow
from tests.diffusion.toy import SHAPE, assert_close, inputs, network, normal, with_variance

STEPS = 7
STOCHASTIC = DDPMScheduler(variance_type="learned_range").schedule(STEPS)
SCHEDULE = DPMSolverMultistepScheduler().schedule(STEPS)
KEY = jax.random.key(5)


def sampled(segment=1, **others):
    arguments = {"rng": KEY, "segment": segment} | others
    return diffusion.sample(with_variance, *inputs(), STOCHASTIC, **arguments)


@pytest.mark.parametrize("segment", quick_and_slow((1, 3, 100), 3))
def test_scan_and_dynamic_loop_agree_whatever_the_segment(segment):
    noise, cond, uncond = inputs()
    guider = diffusion.ClassifierFreeGuidance()
    [noises] = diffusion.noise_source(KEY, len(noise), diffusion.DECODER_STREAM).steps(
        0, STEPS, STOCHASTIC.draws_noise, SHAPE
    )
    loop = diffusion.initial_loop_state(noise, guider)
    table = jax.tree.map(jnp.asarray, STOCHASTIC.table)  # padded
    for first, last in ((0, 3), (3, STEPS)):  # in two goes
        loop = diffusion.denoise(
            with_variance, loop, cond, uncond, table, first, last, guider=guider, step_noise=noises
        )
    difference = np.abs(sampled(segment) - loop.solver[0]).max()
    assert note(difference, "scan and dynamic loop, max |d|") <= 1e-6


def test_one_program_of_the_dynamic_loop_serves_every_number_of_steps():
    noise, cond, uncond = inputs()
    guider = diffusion.NoGuidance()

    @jax.jit
    def run(table, last):
        loop = diffusion.initial_loop_state(noise, guider)
        return diffusion.denoise(network, loop, cond, None, table, 0, last, guider=guider).solver[0]

    for steps in (2, 5, 9):
        schedule = DDIMScheduler().schedule(steps)
        expected = diffusion.sample(network, noise, cond, uncond, schedule, guider=guider)
        found = run(jax.tree.map(jnp.asarray, schedule.table), steps)
        assert_close(found, expected)
    assert run._cache_size() == 1


@pytest.mark.slow
def test_gradients_do_not_depend_on_the_segment():
    noise, cond, uncond = inputs()
    weights = normal(9, *SHAPE)

    @functools.partial(jax.jit, static_argnames="segment")
    def slopes(noise, segment):
        def loss(noise):
            return (weights * diffusion.sample(network, noise, cond, uncond, SCHEDULE, segment=segment)).sum()

        return jax.grad(loss)(noise), jax.jvp(loss, (noise,), (weights,))[1]

    expected, forward = slopes(noise, 1)
    np.testing.assert_allclose(jnp.vdot(expected, weights), forward, rtol=1e-4)
    assert_close(slopes(noise, 3)[0], expected)


def test_images_at_different_steps_are_denoised_together():
    noise, cond, uncond = inputs()
    guider = diffusion.ClassifierFreeGuidance(2.0)
    schedules = [SCHEDULE, DDIMScheduler().schedule(STEPS)]
    tables = [diffusion.solver_coefficients(schedule) for schedule in schedules]
    together = jax.tree.map(lambda *x: jnp.stack(x, axis=1), *tables)
    found = diffusion.sample(network, noise, cond, uncond, together, guider=guider)
    for i, table in enumerate(tables):
        one = slice(i, i + 1)
        alone = diffusion.sample(network, noise[one], cond[one], uncond[one], table, guider=guider)
        assert_close(found[one], alone)


def test_a_feature_cache_is_carried_by_the_loop():
    noise, cond, uncond = inputs()

    def caching(sample, timestep, condition, cache):
        """Every second step takes the output of the step before."""
        count, kept = cache
        output = jax.lax.cond(count % 2 == 0, lambda: network(sample, timestep, condition), lambda: kept)
        return output, (count + 1, output)

    first = (jnp.int32(0), jnp.zeros((2 * SHAPE[0], *SHAPE[1:])))
    table = diffusion.solver_coefficients(SCHEDULE)
    found = diffusion.sample(caching, noise, cond, uncond, SCHEDULE, cache=first, segment=3)
    state, both = diffusion.initial_state(noise), jnp.concatenate([uncond, cond])
    for i in range(STEPS):
        own = jax.tree.map(lambda x, i=i: x[i], table)
        if i % 2 == 0:
            outputs = network(jnp.concatenate([state[0] * own.input_scale] * 2), jnp.full(4, own.timestep), both)
        prediction, _ = diffusion.ClassifierFreeGuidance().combine(jnp.split(outputs, 2), state[0], own, None)
        state = diffusion.solver_step(own, state, prediction, jnp.zeros_like(noise))
    assert_close(found, state[0])


class EulerCoefficients(NamedTuple):
    """What the guider reads, and the own step's levels."""

    timestep: jax.Array
    input_scale: jax.Array
    x0_from: jax.Array
    eps_from: jax.Array
    clip: jax.Array
    threshold: jax.Array
    next_level: jax.Array  # [N, 2] signal and noise after each step


def euler(coefficients, state, prediction, noise):
    signal, sigma = coefficients.next_level
    return state.at[0].set(signal * prediction.x0 + sigma * prediction.eps)


def test_an_own_step_and_schedule_are_arguments():
    noise, cond, uncond = inputs()
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=True)
    schedule = scheduler.schedule(STEPS)
    table = diffusion.solver_coefficients(schedule)
    fields = {name: getattr(table, name) for name in EulerCoefficients._fields[:-1]}
    levels = jnp.asarray(np.concatenate([schedule.levels[1:], [[1.0, 0.0]]]), jnp.float32)
    own = EulerCoefficients(**fields, next_level=levels)
    found = diffusion.sample(network, noise, cond, uncond, own, step=euler)
    expected = diffusion.sample(network, noise, cond, uncond, schedule)
    assert_close(found, expected)


def test_a_sample_is_changed_after_each_step():
    noise, cond, uncond = inputs()

    def halve_the_last(index, sample):
        return jnp.where(index == STEPS - 1, sample / 2, sample)

    halved = diffusion.sample(network, noise, cond, uncond, SCHEDULE, after_step=halve_the_last)
    expected = diffusion.sample(network, noise, cond, uncond, SCHEDULE)
    assert_close(halved, expected / 2)


def test_what_does_not_fit_is_said():
    with pytest.raises(ValueError, match="adds noise at its steps; give rng="):
        sampled(rng=None)
    for wrong in (0, True, 2.0):
        with pytest.raises(ValueError, match="segment must be an integer of at least 1"):
            sampled(wrong)
    with pytest.raises(ValueError, match=r"noise has the shape \(0, .*at least one image"):
        diffusion.sample(with_variance, *(x[:0] for x in inputs()), SCHEDULE)
    with pytest.raises(TypeError, match=r"make keys of seeds first: jax\.vmap\(jax\.random\.key\)\(seeds\)"):
        jax.vmap(lambda seed: sampled(rng=seed))(jnp.arange(2))
    for wrong in (DDIMScheduler(), 10):
        with pytest.raises(TypeError, match=r"schedule must be what scheduler\.schedule\(steps\) returns"):
            diffusion.sample(with_variance, *inputs(), wrong)
    for wrong in (3.0, diffusion.ClassifierFreeGuidance):
        with pytest.raises(TypeError, match=r"guider must be an object with the methods of `Guider`"):
            sampled(guider=wrong)
    with pytest.raises(TypeError, match=r"coefficients is a Schedule; give solver_coefficients\(schedule\)"):
        diffusion.denoise(with_variance, None, None, None, SCHEDULE, 0, 1, guider=diffusion.NoGuidance())
    guider = diffusion.NoGuidance()
    loop, table = diffusion.initial_loop_state(inputs()[0], guider), diffusion.solver_coefficients(SCHEDULE)
    for bounds in ((-1, 2), (2, 1), (0, STEPS + 1), (np.int64(0), np.int64(STEPS + 1))):
        with pytest.raises(ValueError, match=f"first={bounds[0]} and last={bounds[1]} are no steps of {STEPS} rows"):
            diffusion.denoise(with_variance, loop, inputs()[1], None, table, *bounds, guider=guider)
    with pytest.raises(TypeError, match=r"step must return the next state, of shape \[6, .*; returned is one of shape"):
        sampled(step=lambda coefficients, state, prediction, noise: prediction.x0)
    with pytest.raises(TypeError, match=r"after_step must return the next sample, .*; returned is NoneType"):
        sampled(after_step=lambda index, sample: None)
    with pytest.raises(TypeError, match="step must be a function such as solver_step, got 'euler'"):
        sampled(step="euler")
    with pytest.raises(TypeError, match=r"schedule must be what .*, got DDIMScheduler"):
        diffusion.solver_coefficients(DDIMScheduler())
    with pytest.raises(TypeError, match=r"the model returned a tuple, needed is an array; .* by a cache, see predict"):
        diffusion.sample(lambda *args: (with_variance(*args), 1), *inputs(), SCHEDULE)
    one_key = diffusion.KeyNoise(jax.random.split(jax.random.key(0), 1))
    with pytest.raises(
        TypeError, match=r"step_noise must return the noise, of shape \[2, .*; returned is one of shape \[1"
    ):
        sampled(rng=one_key)
    with pytest.raises(ValueError, match=f"GivenNoise of 1 steps from 0 on; needed are {STEPS} steps from 0 on"):
        sampled(rng=diffusion.GivenNoise(inputs()[0][None], 0))
    with pytest.raises(ValueError, match=r"the coefficients have \[1, "):
        diffusion.sample(with_variance, *inputs(), table._replace(matrix=table.matrix[:1]))
    with pytest.raises(ValueError, match=r"values have the shape \[2, 3\]; needed is one number, or one per image"):
        sampled(guider=diffusion.ClassifierFreeGuidance(jnp.ones((2, 3))))
    with pytest.raises(TypeError, match="rng must be a seed"):
        sampled(rng="3")
