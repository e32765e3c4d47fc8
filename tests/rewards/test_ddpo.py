"""DDPO: trajectories, the clipped loss beside its formula, advantages, and a reward without a gradient that rises."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kandinsky_jax import diffusion, lora, rewards
from tests.conftest import note
from tests.rewards import small

COUNT, CLIP = 4, 1e-3


@pytest.fixture(scope="module")
def sampler():
    return small.sampler()


@pytest.fixture(scope="module")
def keys():
    return jax.random.split(jax.random.key(3), COUNT)


@pytest.fixture(scope="module")
def sampled(sampler, keys):
    return jax.jit(rewards.sample_trajectories)(sampler, small.embeds(COUNT), keys)


@pytest.fixture(scope="module")
def value(sampler, sampled):
    """The loss as a function of a LoRA of rank 2."""
    config = lora.LoraConfig(rank=2)

    def of(changes, advantages, clip_range):
        return rewards.policy_loss(sampler.with_lora(changes, config.scale), sampled[0], advantages, clip_range)

    changes = lora.init(sampler.params["unet"], config, jax.random.key(0))
    moved = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(x.size), x.shape), changes)
    return jax.jit(of), changes, moved


def test_trajectories_are_those_of_ordinary_samples(sampler, keys, sampled):
    trajectories, images = sampled
    embeds = small.embeds(COUNT)
    ordinary = jax.jit(lambda s: s(s.noise(keys, COUNT), embeds, keys))(sampler)
    np.testing.assert_allclose(images, ordinary, atol=1e-4)
    np.testing.assert_array_equal(trajectories.states[:, 1:, 0], trajectories.samples[:, :-1])
    np.testing.assert_allclose(trajectories.states[:, 0, 0], sampler.noise(keys, COUNT), rtol=1e-6)
    # A step's log-probability is that of its noise, less the logarithm of the deviation; the last one has no noise.
    [noise] = diffusion.noise_source(keys, COUNT, diffusion.DECODER_STREAM).steps(0, 3, None, None)
    for i in range(2):
        drawn = np.asarray(noise(jnp.int32(i), (COUNT, *sampler.latent_shape)))
        deviation = float(sampler.coefficients.matrix[i, 0, -1])
        logs = (-(drawn**2) / 2 - np.log(deviation) - np.log(2 * np.pi) / 2).mean((1, 2, 3))
        np.testing.assert_allclose(trajectories.log_probs[:, i], logs, atol=1e-4)
    assert np.array_equal(trajectories.log_probs[:, 2], np.zeros(COUNT))


def test_the_loss_of_the_weights_that_sampled_is_minus_the_advantage(value):
    loss, changes, _ = value
    advantages = jnp.array([1.0, -2.0, 0.5, 3.0])
    found, metrics = loss(changes, advantages, CLIP)
    assert abs(found + advantages.mean()) < 1e-4
    assert metrics["clipped"] == 0
    assert metrics["kl"] < 1e-8


def test_the_loss_of_other_weights_is_ppos(sampler, sampled, value):
    """The formula in NumPy, from log-probabilities step by step."""
    loss, _, moved = value
    trajectories = sampled[0]
    advantages = np.float32([1.0, -2.0, 0.5, 3.0])
    unet, cond, uncond = sampler.with_lora(moved).conditioned(trajectories.embeds)
    calls = diffusion.batch_evaluations(sampler.guider.evaluations(cond, uncond))

    @jax.jit
    def log_probs(coefficients, state, following):
        with jax.default_matmul_precision("highest"):
            prediction, _, _ = diffusion.predict(unet, sampler.guider, calls, coefficients, state[0])
        return diffusion.step_log_prob(coefficients, state, prediction, following)

    expected, far = [], []
    for i in range(sampler.steps):
        coefficients = jax.tree.map(lambda x: x[i], sampler.coefficients)  # noqa: B023
        state = jnp.moveaxis(trajectories.states[:, i], 0, 1)
        logs = np.asarray(log_probs(coefficients, state, trajectories.samples[:, i]))
        ratio = np.exp(logs - np.asarray(trajectories.log_probs[:, i]))
        clipped = np.clip(ratio, 1 - CLIP, 1 + CLIP)
        expected.append(np.maximum(-advantages * ratio, -advantages * clipped))
        far.append(np.abs(ratio - 1) > CLIP)
    found, metrics = loss(moved, advantages, CLIP)
    assert abs(found - np.mean(expected)) < 1e-4
    assert metrics["clipped"] == pytest.approx(np.mean(far))
    assert 0 < metrics["clipped"] < 1  # some are beyond the range; the last step's never are


@pytest.mark.slow
def test_the_gradient_of_the_loss_is_a_difference(value):
    loss, _, moved = value
    advantages = jnp.array([1.0, -2.0, 0.5, 3.0])
    gradient = jax.jit(jax.grad(lambda x: loss(x, advantages, 0.5)[0]))(moved)
    norm = float(jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(gradient))))
    step = 0.005 / norm
    ends = [
        loss(jax.tree.map(lambda x, g: x + sign * step * g, moved, gradient), advantages, 0.5)[0]  # noqa: B023
        for sign in (1, -1)
    ]
    slope = float(ends[0] - ends[1]) / (2 * step * norm)
    assert note(abs(slope / norm - 1), "of the gradient's norm") < 0.02


def test_advantages_are_normalised_prompt_by_prompt():
    """ddpo-pytorch's PerPromptStatTracker: all rewards until a prompt has enough of its own, of the last ones."""
    rng = np.random.default_rng(0)
    tracker, kept = rewards.PerPromptStatTracker(buffer_size=6, min_count=4), {0: [], 1: []}
    for count in (3, 1, 5):
        prompts = np.array([0] * count + [1])
        scores = rng.normal(size=count + 1) + 10 * prompts
        found = tracker.update(prompts, scores)
        for prompt in (0, 1):
            own = scores[prompts == prompt]
            kept[prompt] = (kept[prompt] + list(own))[-6:]
            known = scores if len(kept[prompt]) < 4 else np.array(kept[prompt])
            np.testing.assert_allclose(found[prompts == prompt], (own - known.mean()) / (known.std() + 1e-6), rtol=1e-5)


def test_rewards_that_are_no_numbers_count_for_nothing():
    tracker = rewards.PerPromptStatTracker(buffer_size=4, min_count=2)
    first = tracker.update(np.zeros(3, int), np.array([1.0, np.nan, 3.0]))
    np.testing.assert_allclose(first, [-1, 0, 1], rtol=1e-5)
    np.testing.assert_allclose(tracker.update(np.zeros(2, int), np.array([2.0, 2.0])), 0, atol=1e-6)


@pytest.mark.slow
def test_first_rewards_that_are_no_numbers_are_an_error(sampler):
    config = rewards.DDPOConfig(epochs=1, samples_per_epoch=4, sample_batch_size=4, train_batch_size=4)
    with pytest.raises(ValueError, match="the reward of 4 of 4 pictures is not finite"):
        rewards.train_ddpo(sampler, small.embeds(4), lambda images, prompts: np.full(4, np.nan), config, quiet=True)


def test_a_deterministic_solver_is_refused():
    with pytest.raises(
        ValueError, match=r"this solver is deterministic.*use DDPMScheduler, or DDIMScheduler\(eta=1.0\)"
    ):
        rewards.train_ddpo(small.sampler(eta=0.0), small.embeds(2), small.redness)


def test_a_guider_with_a_state_is_refused(sampler):
    class Counting(diffusion.NoGuidance):
        def init(self, sample):
            return jnp.zeros(())

    with pytest.raises(ValueError, match="the guider Counting carries a state"):
        rewards.train_ddpo(dataclasses.replace(sampler, guider=Counting()), small.embeds(2), small.redness)


def test_settings_that_are_not_valid():
    with pytest.raises(ValueError, match="train_batch_size=5 does not divide samples_per_epoch=64"):
        rewards.DDPOConfig(train_batch_size=5)
    with pytest.raises(ValueError, match="min_count=16 is above buffer_size=4"):
        rewards.DDPOConfig(buffer_size=4)
    with pytest.raises(ValueError, match=r"epochs must be .*clip_range must be"):
        rewards.DDPOConfig(epochs=0, clip_range=0.0)


@pytest.mark.campaign
def test_a_reward_of_the_host_rises(sampler, tmp_path):
    """A reward that JAX cannot differentiate; it sees NumPy's arrays and the prompts' numbers. With the same noise."""
    seen = []

    def reward(images, prompts):
        assert isinstance(images, np.ndarray)
        seen.extend(prompts.tolist())
        return np.round(np.asarray(small.redness(images, prompts)), 1)

    config = rewards.DDPOConfig(
        epochs=2,
        samples_per_epoch=128,
        train_batch_size=32,
        sample_batch_size=64,
        inner_epochs=4,
        buffer_size=32,
        learning_rate=1e-2,
        clip_range=1e-2,
    )
    result = rewards.train_ddpo(sampler, small.embeds(4), reward, config, log=tmp_path / "ddpo.jsonl", quiet=True)
    assert np.bincount(seen).tolist() == [2 * 32] * 4  # each prompt equally often
    embeds = np.repeat(small.embeds(4), 16, axis=0)
    before, after = (
        np.asarray(small.redness(s.generate(embeds, seed=7, batch_size=64, quiet=True), None))
        for s in (sampler, sampler.with_lora(result.changes))
    )
    gain = after - before
    assert note(gain.mean() / (gain.std() / np.sqrt(len(gain))), "gain in standard errors") > 5
    rows = [json.loads(line) for line in (tmp_path / "ddpo.jsonl").read_text().splitlines()]
    assert rows == result.history
    assert set(rows[0]) == {"epoch", "reward", "standard_error", "loss", "clipped", "kl", "gradient_norm"}


@pytest.mark.slow
def test_a_reward_of_another_shape(sampler):
    config = rewards.DDPOConfig(epochs=1, samples_per_epoch=4, sample_batch_size=4, train_batch_size=4)
    with pytest.raises(ValueError, match=r"the reward returned the shape \[\]; needed is \[4\]"):
        rewards.train_ddpo(sampler, small.embeds(4), lambda images, prompts: 0.0, config, quiet=True)
