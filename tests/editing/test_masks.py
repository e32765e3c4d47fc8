"""Edits within a mask."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kandinsky_jax import diffusion
from kandinsky_jax.editing import KeepOutside, ddim_inversion, difference_mask
from tests.diffusion.toy import SHAPE, assert_close, inputs, network, normal
from tests.editing.test_inversion import calmer, schedule

STEPS = 6


def where(sample: jax.Array, timestep: jax.Array, condition: jax.Array) -> jax.Array:
    """A network whose condition matters in the upper left corner alone."""
    corner = jnp.zeros(sample.shape[1:3]).at[:2, :2].set(1)[..., None]
    return 0.5 * jnp.tanh(sample) + corner * condition[:, None, None] * (1 + 0.1 * sample)


def test_what_is_outside_the_mask_stays():
    latents, cond, uncond = inputs()
    steps = schedule(STEPS)
    trajectory = ddim_inversion(calmer, latents, cond, None, steps, fixed_point_iterations=5)
    mask = jnp.zeros((*SHAPE[:3], 1)).at[:, 1:3, 1:].set(1)
    for skip in (0, 2):
        rows = jax.tree.map(lambda x, skip=skip: x[skip:], diffusion.solver_coefficients(steps))
        options = {"guider": diffusion.NoGuidance(), "after_step": KeepOutside(trajectory[skip:], mask)}
        edited = diffusion.sample(calmer, trajectory[skip], 2 * uncond, None, rows, **options)
        assert_close(
            np.asarray(edited)[np.broadcast_to(mask == 0, SHAPE)],
            np.asarray(latents)[np.broadcast_to(mask == 0, SHAPE)],
            0,
        )
        assert jnp.abs(edited - latents)[:, 1:3, 1:].max() > 0.1


def test_the_kept_part_is_as_noisy_as_the_step():
    trajectory, sample = normal(0, STEPS + 1, *SHAPE), normal(1, *SHAPE)
    mask = jnp.full((*SHAPE[:3], 1), 0.25)
    assert_close(KeepOutside(trajectory, mask)(jnp.array(2), sample), 0.25 * sample + 0.75 * trajectory[3])
    for wrong in (mask[0, :, :, 0], jnp.ones((1, 64, 64, 1))):
        with pytest.raises(ValueError, match=r"edit_mask has the shape .*; needed is one of the latents"):
            KeepOutside(trajectory, wrong)(jnp.array(2), sample)


def test_no_draws_find_no_mask():
    latents, source, target = inputs()
    for wrong in ({"draws": 0}, {"threshold": np.nan}):
        with pytest.raises(ValueError, match=r"draws=.* must be at least 1, and threshold=.* a number"):
            difference_mask(where, latents, source, target, schedule(STEPS), rng=0, **wrong)


def test_the_mask_is_where_conditions_differ():
    latents, source, target = inputs()
    mask = difference_mask(where, latents, source, target, schedule(STEPS), rng=0)
    expected = np.zeros((*SHAPE[:3], 1), np.float32)
    expected[:, :2, :2] = 1
    np.testing.assert_array_equal(mask, expected)


def test_the_mask_is_the_papers_formula():
    latents, source, target = inputs()
    steps, draws = schedule(STEPS), 3
    options = {"rng": jax.random.key(2), "step": 4, "draws": draws, "threshold": 0.34}
    mask = jax.jit(lambda x: difference_mask(network, x, source, target, steps, **options))(latents)
    source_of = diffusion.noise_source(jax.random.key(2), SHAPE[0], diffusion.DECODER_STREAM)
    [noises] = source_of.steps(0, draws, np.ones(draws, bool), SHAPE)
    signal, sigma = np.float32(steps.levels[4])
    timestep = jnp.full(SHAPE[0], steps.timesteps[4])
    differences = []
    for i in range(draws):
        noisy = signal * latents + sigma * noises(jnp.array(i), SHAPE)
        outputs = [np.asarray(network(noisy, timestep, condition)) for condition in (source, target)]
        differences.append(np.abs(outputs[1] - outputs[0]))
    mean = np.mean(differences, axis=(0, -1))  # [B, h, w]
    share = np.clip(mean / (3 * mean.mean(axis=(1, 2), keepdims=True)), 0, 1)
    np.testing.assert_array_equal(mask[..., 0], share > 0.34)
    assert 0 < mask.mean() < 1


def test_a_step_that_is_not_there():
    latents, source, target = inputs()
    with pytest.raises(ValueError, match="step=6 is out of range; needed is 0 to 5"):
        difference_mask(network, latents, source, target, schedule(STEPS), rng=0, step=6)
