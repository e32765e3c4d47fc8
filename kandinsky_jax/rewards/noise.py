"""Noise optimisation: the first noise of a picture, changed so that a reward rises.

ReNO: Eyring et al. 2024 (arXiv 2406.04312), for one-step generators, through which a gradient is cheap and short. The
defaults are those of its implementation: 50 iterations of gradient ascent with Nesterov momentum.
"""

from __future__ import annotations

import dataclasses
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm.auto import tqdm

from kandinsky_jax.common.types import Array, Float
from kandinsky_jax.diffusion import per_image
from kandinsky_jax.rewards.functions import Reward, check_texts
from kandinsky_jax.rewards.sampler import DecoderSampler
from kandinsky_jax.rewards.training import MetricsLog, as_pytree, check_embeds, check_finite, check_rewards, faults_of


@dataclasses.dataclass(frozen=True)
class NoiseConfig:
    """Settings of `optimize_noise`.

    Args:
        iterations: gradients that are followed.
        learning_rate: of the noise. A step is at most this times `max_grad_norm`, times 10 when momentum has built up;
            the norm of noise is about the square root of its numbers: 128 at 512 x 512 pixels, 16 at 64 x 64.
        momentum: of Nesterov's.
        max_grad_norm: largest norm of an image's gradient.
        regularization: weight of `noise_regularization`, 0 for none.
    """

    iterations: int = 50
    learning_rate: float = 5.0
    momentum: float = 0.9
    max_grad_norm: float = 0.1
    regularization: float = 0.01

    def __post_init__(self) -> None:
        faults = faults_of(self, ("iterations",), ("learning_rate", "max_grad_norm"))
        if not 0 <= self.momentum < 1:
            faults.append(f"momentum must be from 0 to below 1, got {self.momentum!r}")
        if not 0 <= self.regularization < np.inf:
            faults.append(f"regularization must be a number from 0 on, got {self.regularization!r}")
        if faults:
            raise ValueError("; ".join(faults))


class OptimizedNoise(NamedTuple):
    """The result of `optimize_noise`: for each image the noise of its highest reward."""

    noise: jax.Array  # [B, h, w, C]
    images: np.ndarray  # float32 [B, H, W, 3] in 0..1
    rewards: np.ndarray  # [iterations + 1, B], of the noise before each iteration and after the last
    norms: np.ndarray  # [iterations + 1, B], of the noise


def noise_regularization(noise: Float[Array, B * s]) -> Float[Array, "B"]:
    """Return the negative log-likelihood of each noise's norm, up to a constant; least where noise usually is.

    The norm of d standard normal numbers has a chi distribution: `norm**2 / 2 - (d - 1) * log(norm)`. Source: ReNO,
    section 3.2 (after Samuel et al. 2023, arXiv 2306.08687). Its gradient at a noise of zeros is 0.
    """
    flat = noise.reshape(len(noise), -1)
    square = jnp.square(flat).sum(axis=1)
    log_norm = 0.5 * jnp.log(jnp.where(square > 0, square, 1.0))
    return 0.5 * square - (flat.shape[1] - 1) * log_norm


def optimize_noise(
    sampler: DecoderSampler,
    embeds: jax.Array | np.ndarray,
    noise: jax.Array | np.ndarray,
    reward: Reward,
    config: NoiseConfig | None = None,
    *,
    prompts: jax.Array | np.ndarray | None = None,
    rng: int | jax.Array | None = None,
    log: str | os.PathLike[str] | None = None,
    quiet: bool = False,
) -> OptimizedNoise:
    """Change the first noise of pictures so that a differentiable reward rises; each picture by itself.

    Args:
        sampler: best with a one-step student, such as `tiny` after `load_fast()` with a schedule of one step.
        embeds: image embeddings `[B, D]`.
        noise: standard normal `[B, h, w, C]`, such as `sampler.noise(seed, B)`.
        reward: differentiable, see `Reward`.
        config: see `NoiseConfig`.
        prompts: what the reward gets as such, int `[B]`; None is 0 .. B - 1.
        rng: of the noise that a stochastic schedule adds, the same in every iteration.
        log: file of JSON lines to write each iteration's metrics to: the mean `reward`, `best_reward` and `norm`.
        quiet: no progress bar.
    """
    config = NoiseConfig() if config is None else config
    embeds, first = check_embeds(embeds), jnp.asarray(noise)
    if first.shape != (len(embeds), *sampler.latent_shape):
        raise ValueError(
            f"the noise has the shape {list(first.shape)}; needed is {[len(embeds), *sampler.latent_shape]}, one for "
            "each embedding"
        )
    check_texts(reward, len(embeds) if prompts is None else int(np.max(prompts)) + 1)
    prompts = jnp.arange(len(embeds)) if prompts is None else jnp.asarray(prompts)
    optimizer = optax.sgd(config.learning_rate, config.momentum, nesterov=True)
    reward = as_pytree(reward)

    @jax.jit
    def evaluate(
        noise: jax.Array, sampler: DecoderSampler, reward: Reward, embeds: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return the clipped gradient of what is minimised, the rewards `[B]`, and the pictures."""

        def objective(noise: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            images = sampler(noise, embeds, rng)
            rewards = check_rewards(jnp.asarray(reward(images, prompts)), len(prompts))
            each = config.regularization * noise_regularization(noise) - rewards
            return each.sum(), (rewards, images)

        gradient, (rewards, images) = jax.grad(objective, has_aux=True)(noise)
        norms = norms_of(gradient)
        shrunk = jnp.minimum(1.0, config.max_grad_norm / jnp.where(norms > 0, norms, 1.0))
        return gradient * per_image(shrunk, gradient.ndim), rewards, images

    now, state, metrics = first, optimizer.init(first), MetricsLog(log)
    best = (first, jnp.zeros(()), jnp.full(len(first), -jnp.inf))
    rewards_of, norms = [], []
    with tqdm(range(config.iterations + 1), desc="noise", unit="iteration", disable=quiet) as bar:
        for iteration in bar:
            gradient, rewards, images = evaluate(now, sampler, reward, embeds)
            best = _better(best, (now, images, rewards))
            rewards_of.append(np.asarray(rewards) if iteration else check_finite(np.asarray(rewards)))
            norms.append(np.asarray(norms_of(now)))
            means = {"reward": rewards_of[-1].mean(), "best_reward": np.mean(best[2]), "norm": norms[-1].mean()}
            row = metrics.add({"iteration": iteration, **means})
            bar.set_postfix(reward=f"{row['reward']:.4f}")
            updates, state = optimizer.update(gradient, state)
            now = optax.apply_updates(now, updates)
    return OptimizedNoise(best[0], np.asarray(best[1]), np.stack(rewards_of), np.stack(norms))


def norms_of(noise: jax.Array) -> jax.Array:
    """Return the norm of each image's numbers, `[B]`."""
    return jnp.linalg.norm(noise.reshape(len(noise), -1), axis=1)


@jax.jit
def _better(
    best: tuple[jax.Array, jax.Array, jax.Array], found: tuple[jax.Array, jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Take for each image what has the higher reward, the last item of both."""
    is_better = found[2] > best[2]
    noise, images, rewards = (
        jnp.where(per_image(is_better, new.ndim), new, old) for old, new in zip(best, found, strict=True)
    )
    return noise, images, rewards
