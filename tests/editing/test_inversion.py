"""DDIM inversion: one step as diffusers', and there and back again."""

from __future__ import annotations

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import kandinsky_jax as kj
from kandinsky_jax import diffusion
from kandinsky_jax.editing import ddim_inversion
from tests.diffusion import toy
from tests.diffusion.toy import SHAPE, assert_close, inputs, network, normal

PLAIN = {"clip_sample": False, "beta_start": 0.00085, "beta_end": 0.012}
STEPS = 10


def schedule(steps: int = STEPS, **options) -> diffusion.Schedule:
    return kj.DDIMScheduler(**PLAIN | options).schedule(steps)


def calmer(sample: jax.Array, timestep: jax.Array, condition: jax.Array) -> jax.Array:
    """A function that varies slowly with the sample, as a trained network's prediction of noise does."""
    return 0.5 * network(sample, timestep, condition)


@pytest.mark.parametrize("options", [{}, {"set_alpha_to_one": False}, {"timestep_spacing": "trailing"}])
def test_the_usual_inversion_is_diffusers(options):
    theirs = diffusers.DDIMInverseScheduler(**PLAIN | options)
    theirs.set_timesteps(STEPS)
    latents, cond, _ = inputs()
    ours = ddim_inversion(network, latents, cond, None, schedule(**options))
    sample = torch.tensor(np.asarray(latents))
    for i, timestep in enumerate(theirs.timesteps):
        output = network(jnp.asarray(sample.numpy()), jnp.full(SHAPE[0], int(timestep)), cond)
        sample = theirs.step(torch.tensor(np.asarray(output)), int(timestep), sample, return_dict=False)[0]
        assert_close(ours[STEPS - 1 - i], sample.numpy())
    assert_close(ours[STEPS], latents, 0)


@pytest.mark.parametrize("kind", ["ddim", "euler", "guided"])
def test_with_fixed_point_iterations_sampling_gives_the_latents_back(kind):
    latents, cond, uncond = inputs()
    steps = (
        kj.EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012).schedule(STEPS) if kind == "euler" else schedule()
    )
    guider = diffusion.ClassifierFreeGuidance(1.5) if kind == "guided" else diffusion.NoGuidance()

    def error(iterations: int) -> float:
        trajectory = ddim_inversion(
            calmer, latents, cond, uncond, steps, guider=guider, fixed_point_iterations=iterations
        )
        assert trajectory.shape == (STEPS + 1, *SHAPE)
        back = diffusion.sample(calmer, trajectory[0], cond, uncond, steps, guider=guider)
        return float(jnp.abs(back - latents).max())

    errors = [error(iterations) for iterations in (0, 2, 40)]
    assert errors[0] > 0.03
    assert errors[1] < 0.3 * errors[0]
    assert errors[2] < 1e-5


def test_the_trajectory_is_that_of_sampling():
    latents, cond, _ = inputs()
    trajectory = ddim_inversion(calmer, latents, cond, None, schedule(), fixed_point_iterations=40)
    rows = diffusion.solver_coefficients(schedule())
    for i in (1, 4, STEPS):
        first = jax.tree.map(lambda column, i=i: column[:i], rows)
        reached = diffusion.sample(calmer, trajectory[0], cond, None, first, guider=diffusion.NoGuidance())
        assert_close(reached, trajectory[i])


def test_it_can_be_transformed():
    latents, cond, _ = inputs()
    rows = diffusion.solver_coefficients(schedule())

    def noise(latents: jax.Array, cond: jax.Array, rows: diffusion.SolverCoefficients) -> jax.Array:
        return ddim_inversion(network, latents, cond, None, rows, fixed_point_iterations=1)[0]

    together = jax.jit(noise)(latents, cond, rows)
    each = jax.vmap(lambda x, c: noise(x[None], c[None], rows)[0])(latents, cond)
    assert_close(each, together)


def test_gradients_are_those_of_finite_differences(enable_x64):
    latents, cond, _ = (np.asarray(x, np.float64) for x in inputs())
    rows = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), diffusion.solver_coefficients(schedule(4)))
    weights, direction = (np.asarray(normal(seed, *SHAPE), np.float64) for seed in (5, 6))

    @jax.jit
    def value(latents: jax.Array) -> jax.Array:
        return (weights * ddim_inversion(network, latents, cond, None, rows, fixed_point_iterations=2)[0]).sum()

    slope = (value(latents + 1e-5 * direction) - value(latents - 1e-5 * direction)) / 2e-5
    along = (jax.grad(value)(jnp.asarray(latents)) * direction).sum()
    assert along.dtype == jnp.float64
    np.testing.assert_allclose(along, slope, rtol=1e-7)


@pytest.fixture
def enable_x64():
    with jax.enable_x64(True):
        yield


class Momentum(diffusion.NoGuidance):
    def init(self, sample):
        return jnp.zeros_like(sample)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"schedule": kj.DDIMScheduler().schedule(4)}, "clip_sample=False, thresholding=False"),
        ({"schedule": schedule(eta=1.0)}, "edit_friendly_inversion"),
        ({"schedule": kj.DPMSolverMultistepScheduler().schedule(4)}, "one-step solver"),
        ({"schedule": schedule(prediction_type="sample")}, "set_alpha_to_one=False"),
        ({"fixed_point_iterations": -1}, "negative"),
        ({"guider": Momentum()}, "Momentum keeps a state"),
    ],
)
def test_what_cannot_be_inverted_is_refused(wrong, message):
    latents, cond, _ = inputs()
    arguments = {"schedule": schedule(), **wrong}
    with pytest.raises(ValueError, match=message):
        ddim_inversion(toy.network, latents, cond, None, **arguments)
