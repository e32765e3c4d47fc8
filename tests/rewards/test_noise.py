"""Noise optimisation, beside its formulas and PyTorch's optimiser."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
import scipy.stats
import torch

from kandinsky_jax import diffusion, rewards
from tests.conftest import note
from tests.rewards import small

CONFIG = rewards.NoiseConfig(iterations=6, learning_rate=2.0, regularization=0.05)


@pytest.fixture(scope="module")
def sampler():
    return small.sampler(1, 0.0, diffusion.NoGuidance())


@pytest.fixture(scope="module")
def found(sampler, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "noise.jsonl"
    noise = sampler.noise(0, 3)
    return rewards.optimize_noise(sampler, small.embeds(3), noise, small.redness, CONFIG, log=log, quiet=True), log


def test_the_regularization_is_the_log_likelihood_of_the_norm():
    noise = np.random.default_rng(0).normal(size=(5, 4, 4, 3)) * np.linspace(0.5, 2, 5)[:, None, None, None]
    norms = np.linalg.norm(noise.reshape(5, -1), axis=1)
    difference = np.asarray(rewards.noise_regularization(np.float32(noise))) + scipy.stats.chi(48).logpdf(norms)
    np.testing.assert_allclose(difference, difference[0], rtol=1e-5)
    gradient = jax.grad(lambda x: rewards.noise_regularization(x).sum())(np.zeros((1, 4), np.float32))
    assert np.array_equal(gradient, np.zeros((1, 4)))


def test_the_iterations_are_those_of_pytorchs_optimiser(sampler, found):
    """Gradients by JAX, everything else as in ReNO's implementation: the norm's clip, SGD with Nesterov momentum."""
    embeds = small.embeds(3)

    @jax.jit
    def gradient(noise):
        def loss(noise):
            regularization = CONFIG.regularization * rewards.noise_regularization(noise)
            return (regularization - small.redness(sampler(noise, embeds), None)).sum()

        return jax.grad(loss)(noise)

    noises = [torch.from_numpy(np.array(row)) for row in sampler.noise(0, 3)]
    optimizers = [torch.optim.SGD([noise], CONFIG.learning_rate, CONFIG.momentum, nesterov=True) for noise in noises]
    norms = []
    for _ in range(CONFIG.iterations + 1):
        norms.append([float(noise.norm()) for noise in noises])
        gradients = np.asarray(gradient(np.stack([noise.numpy() for noise in noises])))
        for noise, row, optimizer in zip(noises, gradients, optimizers, strict=True):
            noise.grad = torch.from_numpy(row.copy())
            torch.nn.utils.clip_grad_norm_([noise], CONFIG.max_grad_norm)
            optimizer.step()
    assert note(np.abs(found[0].norms - norms).max(), "difference of norms") < 1e-3


def test_the_best_of_each_image_is_kept(sampler, found):
    result, log = found
    assert result.rewards.shape == result.norms.shape == (CONFIG.iterations + 1, 3)
    assert (result.rewards.max(0) > result.rewards[0]).all()
    again = np.asarray(small.redness(sampler(result.noise, small.embeds(3)), None))
    np.testing.assert_allclose(again, result.rewards.max(0), atol=1e-4)
    np.testing.assert_allclose(small.redness(result.images, None), result.rewards.max(0), atol=1e-4)
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    np.testing.assert_allclose([row["reward"] for row in rows], result.rewards.mean(1), rtol=1e-6)
    np.testing.assert_allclose([row["best_reward"] for row in rows][-1], result.rewards.max(0).mean(), rtol=1e-6)


def test_noise_of_another_shape(sampler):
    with pytest.raises(ValueError, match=r"has the shape \[2, 4, 4, 4\]; needed is \[3, 4, 4, 4\]"):
        rewards.optimize_noise(sampler, small.embeds(3), sampler.noise(0, 2), small.redness)


def test_settings_that_are_not_valid():
    with pytest.raises(ValueError, match=r"iterations must be .*momentum must be .*regularization must be"):
        rewards.NoiseConfig(iterations=0, momentum=1.0, regularization=-1.0)
