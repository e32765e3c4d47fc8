"""The sampling core around a trained UNet: beside the pipeline, and with a guider, rows and a cache of its own."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kandinsky_jax import diffusion
from kandinsky_jax.schedulers import scheduler_named
from tests.conftest import note
from tests.diffusion.toy import assert_close, normal, row

STEPS, SHAPE, SEED = 4, (2, 8, 8, 4), 5
GUIDER = diffusion.ClassifierFreeGuidance(3.0)
# Deterministic with and without a memory, ancestral with a learned variance, SDE, and one that scales the sample.
SOLVERS = ("ddim", "dpm++2m", "ddpm", "dpm++2m-sde", "euler-a")


@pytest.fixture(scope="module")
def pipe(ours):
    return ours["KandinskyV22Pipeline"]


@pytest.fixture(scope="module")
def embeds(ours):
    """The embeddings of two prompts, and the negative one of each."""
    prompts = ["red circle", "blue square"]
    pair = ours["KandinskyV22PriorPipeline"](prompts, generator=0, output_type="np", return_dict=False)
    return tuple(jnp.array(x) for x in pair)


@pytest.fixture(scope="module")
def conditions(pipe, embeds):
    """cond and uncond, computed together as the pipelines do, so that they round alike."""
    cond, uncond = embeds
    both = jax.jit(pipe.unet.condition)(jnp.concatenate([uncond, cond]))
    return tuple(jax.tree.map(lambda x, half=half: jnp.split(x, 2)[half], both) for half in (1, 0))


@pytest.fixture(scope="module")
def sampled(pipe, conditions):
    """`sample` as one program for all schedules of a length; the parameters are an argument, as in the pipelines."""
    network, params = diffusion.Network.split(pipe.unet)

    @jax.jit
    def run(params, conditions, noise, coefficients):
        return diffusion.sample(network.bind(params), noise, *conditions, coefficients, guider=GUIDER, rng=SEED)

    return functools.partial(run, params, conditions)


@pytest.fixture(scope="module")
def looped(pipe, conditions):
    """`denoise` as one program for all schedules."""
    network, params = diffusion.Network.split(pipe.unet)
    [step_noise] = diffusion.noise_source(SEED, SHAPE[0], diffusion.DECODER_STREAM).steps(0, STEPS, (), SHAPE)

    @jax.jit
    def run(params, conditions, loop, table, first, last):
        model = network.bind(params)
        with diffusion.matmul_precision(params):
            return diffusion.denoise(model, loop, *conditions, table, first, last, guider=GUIDER, step_noise=step_noise)

    return functools.partial(run, params, conditions)


def relative(found: jax.Array, expected: jax.Array) -> float:
    return np.abs(found - expected).max() / np.abs(expected).max()


def schedule_of(pipe, name: str) -> diffusion.Schedule:
    return scheduler_named(name, pipe.scheduler.config).schedule(STEPS)


def first_noise(schedule: diffusion.Schedule) -> jax.Array:
    [noise] = diffusion.noise_source(SEED, SHAPE[0], diffusion.DECODER_STREAM).initial(SHAPE)
    return noise * schedule.init_noise_sigma


@pytest.mark.parametrize("name", SOLVERS)
def test_a_sample_is_the_pipelines_for_the_same_seed(pipe, embeds, sampled, name, monkeypatch):
    monkeypatch.setattr(pipe, "scheduler", scheduler_named(name, pipe.scheduler.config))
    schedule = pipe.scheduler.schedule(STEPS)
    found = sampled(first_noise(schedule), diffusion.solver_coefficients(schedule))
    expected = pipe(
        *embeds,
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        generator=SEED,
        height=64,
        width=64,
        output_type="latent",
    ).images.transpose(0, 2, 3, 1)
    assert note(relative(found, expected), "sample beside the pipeline, max|d| / max") <= 1e-6


@pytest.mark.parametrize("name", SOLVERS)
def test_scan_and_dynamic_loop_agree(pipe, sampled, looped, name):
    schedule = schedule_of(pipe, name)
    noise = first_noise(schedule)
    found = sampled(noise, diffusion.solver_coefficients(schedule))
    loop = diffusion.initial_loop_state(noise, GUIDER)
    for first, last in ((0, 1), (1, STEPS)):  # in two goes
        loop = looped(loop, schedule.table, first, last)
    assert note(relative(found, loop.solver[0]), "scan and dynamic loop, max|d| / max") <= 1e-6


@pytest.mark.slow
def test_images_at_different_steps_are_denoised_together(pipe, sampled):
    """One at the beginning of a multistep solver's schedule, the other in the middle of an ancestral one's."""
    schedules = [schedule_of(pipe, "dpm++2m"), scheduler_named("ddpm", pipe.scheduler.config).schedule(20, begin=16)]
    tables = [diffusion.solver_coefficients(schedule) for schedule in schedules]
    noise = normal(0, *SHAPE)
    together = sampled(noise, jax.tree.map(lambda *x: jnp.stack(x, axis=1), *tables))
    for i, table in enumerate(tables):
        assert_close(together[i], sampled(noise, table)[i])


class Momentum(NamedTuple):
    """Guidance along a running mean of the differences, which the loop carries."""

    scale: jax.Array
    rate: jax.Array

    def init(self, sample):
        return jnp.zeros_like(sample)

    def evaluations(self, cond, uncond):
        return diffusion.ClassifierFreeGuidance().evaluations(cond, uncond)

    def combine(self, outputs, sample, coefficients, state):
        uncond, cond = (diffusion.split_output(output, sample.shape[-1])[0] for output in outputs)
        state = self.rate * state + (1 - self.rate) * (cond - uncond)
        return diffusion.prediction_from_output(coefficients, sample, uncond + self.scale * state), state


@pytest.mark.slow
def test_a_guiders_state_and_a_feature_cache_go_through_the_loop(pipe, conditions):
    """Guidance with a momentum, around a UNet that every second step takes the output of the step before."""
    cond, uncond = conditions
    schedule = schedule_of(pipe, "dpm++2m")
    noise, joined = first_noise(schedule), jax.tree.map(lambda *x: jnp.concatenate(x), uncond, cond)
    guider = Momentum(jnp.float32(3.0), jnp.float32(0.4))

    def caching(sample, timestep, condition, cache):
        count, kept = cache
        output = jax.lax.cond(count % 2 == 0, lambda: pipe.unet(sample, timestep, condition), lambda: kept)
        return output, (count + 1, output)

    @jax.jit
    def run(noise, coefficients):
        cache = (jnp.int32(0), jnp.zeros((2 * SHAPE[0], *SHAPE[1:-1], 2 * SHAPE[-1])))
        with jax.default_matmul_precision("highest"):
            return diffusion.sample(
                caching, noise, cond, uncond, coefficients, guider=guider, cache=cache, segment=STEPS // 2
            )

    found = run(noise, diffusion.solver_coefficients(schedule))
    evaluate = jax.jit(pipe.unet)
    state, mean = diffusion.initial_state(noise), jnp.zeros_like(noise)
    for i in range(STEPS):
        own = row(schedule, i)
        if i % 2 == 0:
            batch = jnp.concatenate([state[0] * own.input_scale] * 2)
            of_uncond, of_cond = jnp.split(evaluate(batch, jnp.full(len(batch), own.timestep), joined)[..., :4], 2)
        mean = 0.4 * mean + 0.6 * (of_cond - of_uncond)
        prediction = diffusion.prediction_from_output(own, state[0], of_uncond + 3.0 * mean)
        state = diffusion.solver_step(own, state, prediction, jnp.zeros_like(noise))
    assert_close(found, state[0])
