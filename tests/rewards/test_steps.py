"""What rewards need of the core: probabilities of stochastic solvers' steps, and gradients of the last steps."""

from __future__ import annotations

import math

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch

from kandinsky_jax import diffusion
from kandinsky_jax.schedulers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    SASolverScheduler,
)
from tests.conftest import nchw
from tests.diffusion.toy import SHAPE, assert_close, inputs, network, normal, row, with_variance

STEPS = 6
BETAS = {"beta_schedule": "linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}


def log_prob(coefficients, sample, output, following, variance=None):
    prediction = diffusion.prediction_from_output(coefficients, sample, output, variance)
    slots = coefficients.matrix.shape[-2]
    return diffusion.step_log_prob(coefficients, diffusion.initial_state(sample, slots), prediction, following)


def torch_of(array) -> torch.Tensor:
    return torch.from_numpy(nchw(array).copy())


# Log-probabilities ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to_one", [True, False])
def test_ddims_steps_have_the_probabilities_of_ddpos_implementation(to_one):
    """`ddim_step_with_logprob` of ddpo-pytorch and trl, written out beside diffusers' scheduler."""
    # As in Stable Diffusion, the last step goes from timestep 1, or the end is without noise.
    options = BETAS | {"set_alpha_to_one": to_one, "steps_offset": 0 if to_one else 1}
    theirs = diffusers.DDIMScheduler(**options)
    theirs.set_timesteps(STEPS)
    schedule = DDIMScheduler(**options, eta=1.0).schedule(STEPS)
    sample, output, following = normal(0, *SHAPE), normal(1, *SHAPE), normal(2, *SHAPE)
    for i, timestep in enumerate(theirs.timesteps):
        zeros = torch.zeros(*torch_of(sample).shape)
        mean = theirs.step(torch_of(output), timestep, torch_of(sample), eta=1.0, variance_noise=zeros).prev_sample
        std = theirs._get_variance(timestep, timestep - 1000 // STEPS) ** 0.5
        found = log_prob(row(schedule, i), sample, output, following)
        if to_one and i == STEPS - 1:  # ends without noise
            assert std == 0
            assert np.array_equal(found, np.zeros(SHAPE[0]))
            continue
        difference = (torch_of(following) - mean) ** 2
        logs = -difference / (2 * std**2) - torch.log(std) - torch.log(torch.sqrt(2 * torch.as_tensor(math.pi)))
        assert_close(found, logs.mean(dim=(1, 2, 3)).numpy(), 1e-4)


@pytest.mark.parametrize("kind", ["fixed_small", "learned_range"])
def test_ancestral_steps_have_the_probability_of_their_own_normal_distribution(kind):
    """Mean and deviation of diffusers' DDPM, taken apart by its own noise; probabilities by SciPy."""
    theirs = diffusers.DDPMScheduler(**BETAS, variance_type=kind)
    theirs.set_timesteps(STEPS)
    schedule = DDPMScheduler(**BETAS, variance_type=kind).schedule(STEPS)
    sample, output, following = normal(0, *SHAPE), normal(1, *SHAPE), normal(2, *SHAPE)
    variance = jnp.tanh(normal(3, *SHAPE)) if kind == "learned_range" else None
    given = torch_of(output) if variance is None else torch.cat([torch_of(output), torch_of(variance)], 1)
    for i, timestep in enumerate(theirs.timesteps[:-1]):
        noises, results = [], []
        for seed in (0, 1):
            noises.append(torch.randn(torch_of(sample).shape, generator=torch.Generator().manual_seed(seed)))
            generator = torch.Generator().manual_seed(seed)
            results.append(theirs.step(given, timestep, torch_of(sample), generator=generator).prev_sample)
        stddev = (results[1] - results[0]) / (noises[1] - noises[0])
        mean = results[0] - stddev * noises[0]
        logs = scipy.stats.norm.logpdf(torch_of(following), mean, stddev)
        found = log_prob(row(schedule, i), sample, output, following, variance)
        assert_close(found, logs.mean(axis=(1, 2, 3)), 1e-3)


@pytest.mark.parametrize("name", ["sde-dpmsolver++", "sa"])
def test_a_multistep_solvers_step_is_as_probable_as_its_noise(name):
    """With what it remembers in the other slots of the state."""
    scheduler = SASolverScheduler() if name == "sa" else DPMSolverMultistepScheduler(algorithm_type=name)
    coefficients = row(scheduler.schedule(STEPS), 3)
    state, drawn = normal(0, 6, *SHAPE), normal(1, *SHAPE)
    prediction = diffusion.prediction_from_output(coefficients, state[0], normal(2, *SHAPE))
    following = diffusion.solver_step(coefficients, state, prediction, drawn)[0]
    found = diffusion.step_log_prob(coefficients, state, prediction, following)
    expected = scipy.stats.norm.logpdf(drawn) - np.log(coefficients.matrix[0, -1])
    assert_close(found, expected.mean(axis=(1, 2, 3)), 1e-4)


def test_a_row_per_image_has_each_images_own_probability():
    schedule = DDIMScheduler(eta=1.0, clip_sample=False).schedule(STEPS)
    sample, output, following = normal(0, *SHAPE), normal(1, *SHAPE), normal(2, *SHAPE)
    own = [row(schedule, i) for i in (1, STEPS - 1)]  # the last one draws no noise
    together = log_prob(jax.tree.map(lambda *x: jnp.stack(x), *own), sample, output, following)
    for i, coefficients in enumerate(own):
        alone = log_prob(coefficients, sample[i : i + 1], output[i : i + 1], following[i : i + 1])
        assert_close(together[i : i + 1], alone, 1e-6)


@pytest.mark.parametrize("name", ["ddim", "learned range", "without noise"])
def test_gradients_of_log_probabilities_are_differences(name):
    """In float64, by the output and the learned variance; finite and zero where there is no noise."""
    with jax.enable_x64(True):
        schedule = {
            "ddim": DDIMScheduler(eta=1.0, clip_sample=False),
            "learned range": DDPMScheduler(variance_type="learned_range", clip_sample=False),
            "without noise": DDIMScheduler(eta=0.0, clip_sample=False),
        }[name].schedule(STEPS)
        coefficients = jax.tree.map(lambda x: x.astype(jnp.float64), row(schedule, 2))
        sample, output, following, direction = (normal(i, *SHAPE).astype(jnp.float64) for i in range(4))

        def value(output, variance):
            return log_prob(coefficients, sample, output, following, variance).sum()

        at = (output, jnp.tanh(direction))
        gradients = jax.grad(value, argnums=(0, 1))(*at)
        step = 1e-5
        ends = [value(*(x + sign * step * direction for x in at)) for sign in (1, -1)]
        slope = (ends[0] - ends[1]) / (2 * step)
        along = sum((gradient * direction).sum() for gradient in gradients)
        if name == "without noise":
            assert slope == along == 0
        else:
            assert abs(along - slope) <= 1e-6 * abs(slope)


# Gradients of the last steps --------------------------------------------------------------------------------------

SCHEDULES = {
    "DDIM": DDIMScheduler(clip_sample=False).schedule(STEPS),
    "DPM++ 2M": DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", solver_order=2).schedule(STEPS),
    "DDPM": DDPMScheduler(clip_sample=False).schedule(STEPS),
}


def loss_of(schedule, gradient_steps, model=network, noise=None, segment=1):
    """A scalar of a sample as a function of the conditions."""
    given, cond, uncond = inputs()
    noise = given if noise is None else noise
    guider = diffusion.ClassifierFreeGuidance(2.0)

    def loss(change):
        result = diffusion.sample(
            model,
            noise,
            cond.astype(noise.dtype) + change,
            uncond.astype(noise.dtype),
            schedule,
            guider=guider,
            rng=jax.random.key(0),
            gradient_steps=gradient_steps,
            segment=segment,
        )
        return jnp.mean(result * jnp.cos(jnp.arange(result.size)).reshape(result.shape))

    return loss


@pytest.mark.parametrize(("name", "last"), [("DDIM", STEPS), ("DPM++ 2M", 2), ("DDPM", 1)])
def test_the_gradient_of_the_last_steps_is_that_with_constants_before(name, last):
    """Differences in float64 of a model that only sees the change from a step on; for multistep solvers too."""
    with jax.enable_x64(True):
        schedule = diffusion.solver_coefficients(SCHEDULES[name])
        schedule = jax.tree.map(lambda x: x.astype(jnp.float64), schedule)
        noise, direction = inputs()[0].astype(jnp.float64), normal(7, SHAPE[0], SHAPE[-1]).astype(jnp.float64)
        constant = inputs()[1].astype(jnp.float64)
        begin = schedule.timestep[STEPS - last]

        def from_then_on(sample, timestep, condition):
            """Sees the changed condition (the second half of the batch, after uncond) in the last steps only."""
            before = jnp.concatenate([condition[: len(condition) // 2], constant])
            return network(sample, timestep, jnp.where(timestep[:, None] <= begin, condition, before))

        zero = jnp.zeros_like(direction)
        value, gradient = jax.value_and_grad(loss_of(schedule, last, noise=noise))(zero)
        traced = jax.jit(lambda k: jax.grad(loss_of(schedule, k, noise=noise))(zero))(jnp.int32(last))
        late = loss_of(schedule, None, from_then_on, noise)
        step = 1e-5
        slope = (late(step * direction) - late(-step * direction)) / (2 * step)
        assert abs((gradient * direction).sum() - slope) <= 1e-6 * abs(slope)
        np.testing.assert_allclose(traced, gradient, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(value, loss_of(schedule, None, noise=noise)(zero), rtol=1e-12)
        whole = jax.grad(loss_of(schedule, None, noise=noise))(zero)
        assert (np.abs(whole - gradient).max() < 1e-12) == (last == STEPS)
        segments = jax.grad(loss_of(schedule, last, noise=noise, segment=2))(zero)
        np.testing.assert_allclose(segments, gradient, rtol=1e-9, atol=1e-12)


def test_reverse_mode_runs_the_last_steps_only():
    calls: list[int] = []

    @jax.custom_vjp
    def counted(x):
        return x

    def backward(_, gradient):
        jax.debug.callback(lambda: calls.append(1))
        return (gradient,)

    counted.defvjp(lambda x: (x, None), backward)

    def model(sample, timestep, condition):
        return counted(network(sample, timestep, condition))

    zero = jnp.zeros((SHAPE[0], SHAPE[-1]))
    for last, runs in ((2, 2), (None, STEPS)):
        jax.block_until_ready(jax.jit(jax.grad(loss_of(SCHEDULES["DDIM"], last, model)))(zero))
        jax.effects_barrier()
        assert len(calls) == runs
        calls.clear()


@pytest.mark.parametrize("wrong", [0, -1, True, 1.5])
def test_numbers_of_steps_that_are_none(wrong):
    with pytest.raises(ValueError, match="gradient_steps must be an integer of at least 1, got"):
        loss_of(SCHEDULES["DDIM"], wrong)(jnp.zeros((SHAPE[0], SHAPE[-1])))


def test_the_learned_variance_is_part_of_the_sample_and_the_probability():
    """A trajectory's own samples are as probable as its noise."""
    schedule = DDPMScheduler(variance_type="learned_range", clip_sample=False).schedule(STEPS)
    noise, cond, _ = inputs()
    drawn = normal(9, *SHAPE)
    coefficients = row(schedule, 1)
    output = with_variance(noise, jnp.full(SHAPE[0], 500), cond)
    prediction, _ = diffusion.NoGuidance().combine([output], noise, coefficients, None)
    state = diffusion.initial_state(noise)
    following = diffusion.solver_step(coefficients, state, prediction, drawn)[0]
    found = diffusion.step_log_prob(coefficients, state, prediction, following)
    low, high = coefficients.log_variance
    share = (prediction.variance + 1) / 2
    logs = scipy.stats.norm.logpdf(drawn) - (share * high + (1 - share) * low) / 2
    assert_close(found, logs.mean(axis=(1, 2, 3)), 1e-4)
