"""DDPO: policy gradients of any reward into a LoRA, through the probabilities of a stochastic solver's steps.

Black et al. 2023 (arXiv 2305.13301), the importance-sampling estimator (equation 5, DDPO-IS) with PPO's clipping. The
defaults are those of its PyTorch implementation, and so is the normalisation of rewards prompt by prompt.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec
from tqdm.auto import tqdm

from kandinsky_jax import lora
from kandinsky_jax.common.types import PyTree
from kandinsky_jax.diffusion import (
    DECODER_STREAM,
    batch_evaluations,
    initial_state,
    matmul_precision,
    noise_source,
    predict,
    solver_step,
    step_log_prob,
)
from kandinsky_jax.diffusion.rng import image_keys
from kandinsky_jax.parallel.mesh import DATA_AXIS
from kandinsky_jax.parallel.sharding import REPLICATED, shard_batch, sharded
from kandinsky_jax.rewards.functions import Reward, check_texts
from kandinsky_jax.rewards.sampler import DecoderSampler
from kandinsky_jax.rewards.training import (
    MetricsLog,
    TrainedLora,
    check_divides,
    check_embeds,
    check_finite,
    check_rewards,
    faults_of,
    optimizer_of,
    replicate,
    standard_error,
)

LEAST_STDDEV = 1e-6  # added to the standard deviation of rewards


@dataclasses.dataclass(frozen=True)
class DDPOConfig:
    """Settings of `train_ddpo`.

    Args:
        epochs: an epoch samples pictures, scores them, and learns from them.
        samples_per_epoch: pictures of an epoch.
        sample_batch_size: pictures sampled at once.
        train_batch_size: pictures of an update, all steps of the sampler of each; divides `samples_per_epoch`.
        inner_epochs: how often an epoch learns from its pictures.
        clip_range: of the ratio of probabilities to 1. It is small because log-probabilities are means over the numbers
            of the latents: the fewer they are, the larger it may be.
        max_advantage: bound of normalised rewards.
        buffer_size, min_count: of `PerPromptStatTracker`. A buffer of fewer rewards than an epoch has of a prompt
            compares with a part of them.
        learning_rate, weight_decay: of AdamW.
        max_grad_norm: largest norm of the gradients.
        lora: which layers of the UNet are changed, and how.
        seed: of the LoRA's first values, the prompts and all noise.
    """

    epochs: int = 10
    samples_per_epoch: int = 64
    sample_batch_size: int = 16
    train_batch_size: int = 16
    inner_epochs: int = 1
    clip_range: float = 1e-4
    max_advantage: float = 5.0
    buffer_size: int = 16
    min_count: int = 16
    learning_rate: float = 3e-4
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    lora: lora.LoraConfig = dataclasses.field(default_factory=lora.LoraConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        whole = ("epochs", "samples_per_epoch", "sample_batch_size", "train_batch_size", "inner_epochs")
        positive = ("clip_range", "max_advantage", "learning_rate", "max_grad_norm")
        faults = faults_of(self, (*whole, "buffer_size", "min_count"), positive)
        if not faults and self.min_count > self.buffer_size:
            faults.append(
                f"min_count={self.min_count} is above buffer_size={self.buffer_size}, so that it is never reached"
            )
        for name in ("sample_batch_size", "train_batch_size"):
            if not faults and self.samples_per_epoch % getattr(self, name):
                faults.append(
                    f"{name}={getattr(self, name)} does not divide samples_per_epoch={self.samples_per_epoch}"
                )
        if faults:
            raise ValueError("; ".join(faults))


class Trajectories(NamedTuple):
    """Whole samples of a batch, by the steps of the sampler."""

    embeds: jax.Array  # [B, D]
    states: jax.Array  # [B, N, slots, h, w, C], the solver's, before each step
    samples: jax.Array  # [B, N, h, w, C], after each step
    log_probs: jax.Array  # [B, N], of each step


class PerPromptStatTracker:
    """Normalises rewards by the mean and standard deviation of those that the same prompt got lately.

    Source: DDPO, section 6.3 and appendix D, where it replaces a learned value function.

    Args:
        buffer_size: rewards of a prompt that are remembered.
        min_count: with fewer rewards of a prompt, those of all pictures of the epoch are used instead.
    """

    def __init__(self, buffer_size: int, min_count: int):
        self._min_count = min_count
        self._rewards: dict[int, collections.deque[float]] = collections.defaultdict(
            functools.partial(collections.deque, maxlen=buffer_size)
        )

    def update(self, prompts: Sequence[int] | np.ndarray, rewards: np.ndarray) -> np.ndarray:
        """Add the rewards of an epoch, and return its advantages, float32 `[S]`.

        Args:
            prompts: numbers `[S]`.
            rewards: `[S]`; one that is not finite counts for nothing.
        """
        prompts, rewards = np.asarray(prompts), np.asarray(rewards, np.float64)
        found = np.empty(len(rewards), np.float32)
        for prompt in np.unique(prompts):
            own = rewards[prompts == prompt]
            buffer = self._rewards[int(prompt)]
            buffer.extend(own[np.isfinite(own)])
            known = rewards[np.isfinite(rewards)] if len(buffer) < self._min_count else np.array(buffer)
            found[prompts == prompt] = (own - known.mean()) / (known.std() + LEAST_STDDEV) if len(known) else 0
        return np.where(np.isfinite(rewards), found, np.float32(0))


def check_policy(sampler: DecoderSampler) -> None:
    """Raise ValueError for a sampler whose steps have no probabilities."""
    if not np.asarray(sampler.coefficients.matrix[:, 0, -1] > 0).any():
        raise ValueError(
            "this solver is deterministic, so its steps have no probabilities to learn from; use DDPMScheduler, or "
            "DDIMScheduler(eta=1.0)"
        )
    if jax.tree.leaves(sampler.guider.init(jnp.zeros((1, *sampler.latent_shape)))):
        raise ValueError(
            f"the guider {type(sampler.guider).__name__} carries a state from step to step, which trajectories do not "
            "keep; use one without, such as ClassifierFreeGuidance"
        )


def sample_trajectories(sampler: DecoderSampler, embeds: jax.Array, keys: jax.Array) -> tuple[Trajectories, jax.Array]:
    """Sample pictures, and keep what `policy_loss` needs of each step; goes through `jit`.

    Args:
        sampler: of a stochastic solver, with a guider without a state.
        embeds: `[B, D]`.
        keys: a key for each image `[B]`.
    Returns:
        the trajectories, and the pictures `[B, H, W, 3]` in 0..1: those of `sampler(noise, embeds, rng=keys)`.
    """
    unet, cond, uncond = sampler.conditioned(embeds)
    calls = batch_evaluations(sampler.guider.evaluations(cond, uncond))
    noise = sampler.noise(keys, len(embeds)) * sampler.init_noise_sigma
    drawn = np.ones(sampler.steps, bool)
    [step_noise] = noise_source(keys, len(embeds), DECODER_STREAM).steps(0, sampler.steps, drawn, noise.shape)

    def step(state: jax.Array, row: PyTree) -> tuple[jax.Array, PyTree]:
        index, coefficients = row
        prediction, _, _ = predict(unet, sampler.guider, calls, coefficients, state[0])
        following = solver_step(coefficients, state, prediction, step_noise(index, noise.shape))
        log_prob = step_log_prob(coefficients, state, prediction, following[0])
        return following, (jnp.moveaxis(state, 1, 0), following[0], log_prob)

    first = initial_state(noise, slots=sampler.coefficients.matrix.shape[-2])
    with matmul_precision(sampler.params["unet"]):
        rows = (jnp.arange(sampler.steps), sampler.coefficients)
        last, kept = jax.lax.scan(step, first, rows)
    return Trajectories(embeds, *(jnp.moveaxis(x, 1, 0) for x in kept)), sampler.decode(last[0])


def policy_loss(
    sampler: DecoderSampler, trajectories: Trajectories, advantages: jax.Array, clip_range: float
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Compute DDPO's clipped loss of trajectories; differentiable in the sampler's weights.

    Args:
        sampler: with the weights to be judged; the trajectories may be of others.
        trajectories: of B pictures, from `sample_trajectories`.
        advantages: `[B]`.
        clip_range: of the ratio of probabilities to 1.
    Returns:
        the mean over pictures and steps of `max(-A r, -A clip(r))`, a float32 scalar, with the ratio r of a step's
        probabilities; and the metrics `clipped` (the share of ratios beyond the range) and `kl` (half of the mean
        square of the log-ratio, Schulman's estimate).
    """
    unet, cond, uncond = sampler.conditioned(trajectories.embeds)
    calls = batch_evaluations(sampler.guider.evaluations(cond, uncond))

    @jax.checkpoint
    def of_step(total: PyTree, row: PyTree) -> tuple[PyTree, None]:
        coefficients, state, following, before = row
        state = jnp.moveaxis(state, 0, 1)
        prediction, _, _ = predict(unet, sampler.guider, calls, coefficients, state[0])
        log_ratio = step_log_prob(coefficients, state, prediction, following) - before
        ratio = jnp.exp(log_ratio)
        clipped = jnp.clip(ratio, 1 - clip_range, 1 + clip_range)
        loss = jnp.maximum(-advantages * ratio, -advantages * clipped).mean()
        found = (loss, (jnp.abs(ratio - 1) > clip_range).mean(), 0.5 * jnp.square(log_ratio).mean())
        return jax.tree.map(jnp.add, total, found), None

    with matmul_precision(sampler.params["unet"]):
        kept = (jnp.moveaxis(x, 1, 0) for x in trajectories[1:])
        total, _ = jax.lax.scan(of_step, (jnp.zeros(()),) * 3, (sampler.coefficients, *kept))
    loss, clipped, kl = (value / sampler.steps for value in total)
    return loss, {"clipped": clipped, "kl": kl}


def train_ddpo(
    sampler: DecoderSampler,
    embeds: jax.Array | np.ndarray,
    reward: Reward,
    config: DDPOConfig | None = None,
    *,
    mesh: Mesh | None = None,
    log: str | os.PathLike[str] | None = None,
    quiet: bool = False,
) -> TrainedLora:
    """Train a LoRA of the UNet to raise the mean of any reward, which needs no gradient.

    Args:
        sampler: the decoder with a stochastic solver; its weights do not change.
        embeds: image embeddings `[P, D]`. Number p is that of prompt p of the reward.
        reward: see `Reward`; it is called with NumPy arrays, on the host.
        config: see `DDPOConfig`.
        mesh: shards batches over its axis `data`; the networks are on every device.
        log: file of JSON lines to write the metrics to.
        quiet: no progress bar.
    Returns:
        the LoRA, and for each epoch `epoch`, `reward` and its `standard_error` over the epoch's pictures, which are
        sampled before the epoch learns from them; and the means of its updates' `loss`, `clipped`, `kl`.
    Raises:
        ValueError: for a deterministic solver, or batches that do not fit the mesh.
    """
    config = DDPOConfig() if config is None else config
    check_policy(sampler)
    embeds = check_embeds(embeds)
    check_texts(reward, len(embeds))
    for name in ("sample_batch_size", "train_batch_size"):
        check_divides(mesh, name, getattr(config, name))
    optimizer = optimizer_of(config.learning_rate, config.max_grad_norm, config.weight_decay)
    changes = lora.init(sampler.params["unet"], config.lora, jax.random.key(config.seed))
    sampler, changes = replicate(mesh, (sampler, changes))
    state = replicate(mesh, optimizer.init(changes))
    sample, update = _sample(config, mesh), _update(optimizer, config, mesh)
    tracker = PerPromptStatTracker(config.buffer_size, config.min_count)
    rng, metrics = np.random.default_rng(config.seed), MetricsLog(log)
    with tqdm(range(config.epochs), desc="ddpo", unit="epoch", disable=quiet) as bar:
        bar.set_postfix_str("compiling the first epoch")
        for epoch in bar:
            prompts = rng.permutation(np.resize(rng.permutation(len(embeds)), config.samples_per_epoch))
            images = np.arange(len(prompts)) + epoch * len(prompts)
            keys = image_keys([config.seed] * len(prompts), images)
            trajectories, scores = _epoch_samples(config, mesh, sample, changes, sampler, embeds, prompts, keys, reward)
            scores = scores if epoch else check_finite(scores)
            advantages = tracker.update(prompts, scores).clip(-config.max_advantage, config.max_advantage)
            found = []
            for rows in _shuffled(rng, len(prompts), config):
                batch = _on(mesh, jax.tree.map(lambda x: x[rows], (trajectories, jnp.asarray(advantages))))  # noqa: B023
                changes, state, values = update(changes, state, sampler, *batch)
                found.append(jax.device_get(values))
            means = {name: np.mean([values[name] for values in found]) for name in found[0]}
            kept = scores[np.isfinite(scores)]
            error = standard_error(kept)
            row = metrics.add(
                {"epoch": epoch, "reward": np.mean(kept) if len(kept) else np.nan, "standard_error": error, **means}
            )
            bar.set_postfix(reward=f"{row['reward']:.4f}")
    return TrainedLora(changes, config.lora, metrics.history)


def _epoch_samples(
    config: DDPOConfig,
    mesh: Mesh | None,
    sample: Callable[..., Any],
    changes: lora.Lora,
    sampler: DecoderSampler,
    embeds: jax.Array,
    prompts: np.ndarray,
    keys: jax.Array,
    reward: Reward,
) -> tuple[Trajectories, np.ndarray]:
    """Return the trajectories of an epoch's pictures, and their rewards `[S]`."""
    parts, scores = [], []
    for rows in np.arange(len(prompts)).reshape(-1, config.sample_batch_size):
        trajectories, images = sample(changes, sampler, *_on(mesh, (embeds[prompts[rows]], keys[rows])))
        found = check_rewards(np.asarray(reward(np.asarray(images), prompts[rows])), len(rows))  # type: ignore[arg-type]
        parts.append(trajectories)
        scores.append(found)
    return jax.tree.map(lambda *x: jnp.concatenate(x), *parts), np.concatenate(scores)


def _shuffled(rng: np.random.Generator, count: int, config: DDPOConfig) -> np.ndarray:
    """Return the pictures of each update of an epoch, `[updates, train_batch_size]`."""
    orders = [rng.permutation(count) for _ in range(config.inner_epochs)]
    return np.concatenate(orders).reshape(-1, config.train_batch_size)


def _on(mesh: Mesh | None, batch: PyTree) -> PyTree:
    return batch if mesh is None else shard_batch(mesh, batch, pictures=False)


def _sample(config: DDPOConfig, mesh: Mesh | None) -> Callable[..., Any]:
    """Return the compiled sampling of a batch."""
    each = PartitionSpec(DATA_AXIS)

    def of_device(changes: lora.Lora, sampler: DecoderSampler, embeds: jax.Array, keys: jax.Array) -> PyTree:
        return sample_trajectories(sampler.with_lora(changes, config.lora.scale), embeds, keys)

    return jax.jit(sharded(mesh, of_device, (REPLICATED, REPLICATED, each, each), each))


def _update(optimizer: optax.GradientTransformation, config: DDPOConfig, mesh: Mesh | None) -> Callable[..., Any]:
    """Return the compiled update of changes and the optimizer's state."""

    def of_device(
        changes: lora.Lora, sampler: DecoderSampler, trajectories: Trajectories, advantages: jax.Array
    ) -> PyTree:
        def loss(changes: lora.Lora) -> tuple[jax.Array, dict[str, jax.Array]]:
            changed = sampler.with_lora(changes, config.lora.scale)
            value, found = policy_loss(changed, trajectories, advantages, config.clip_range)
            return value, {"loss": value, **found}

        found = jax.grad(loss, has_aux=True)(changes)
        return found if mesh is None else jax.lax.pmean(found, DATA_AXIS)

    each = PartitionSpec(DATA_AXIS)
    gradients = sharded(mesh, of_device, (REPLICATED, REPLICATED, each, each), REPLICATED)

    def update(
        changes: lora.Lora, state: PyTree, sampler: DecoderSampler, trajectories: Trajectories, advantages: jax.Array
    ) -> tuple[lora.Lora, PyTree, dict[str, jax.Array]]:
        gradient, found = gradients(changes, sampler, trajectories, advantages)
        updates, state = optimizer.update(gradient, state, changes)
        return optax.apply_updates(changes, updates), state, found | {"gradient_norm": optax.tree.norm(gradient)}

    return jax.jit(update)
