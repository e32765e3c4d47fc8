"""Direct backpropagation of a differentiable reward through the sampler into a LoRA.

DRaFT: Clark et al. 2023 (arXiv 2309.17400), algorithm 1: gradients through all steps, or (DRaFT-K) the last K.
AlignProp: Prabhudesai et al. 2023 (arXiv 2310.03739): K is drawn at random for each update.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec
from tqdm.auto import tqdm

from kandinsky_jax import lora
from kandinsky_jax.common.types import PyTree
from kandinsky_jax.diffusion.rng import image_keys
from kandinsky_jax.parallel.mesh import DATA_AXIS
from kandinsky_jax.parallel.sharding import REPLICATED, shard_batch, sharded
from kandinsky_jax.rewards.functions import Reward, check_texts
from kandinsky_jax.rewards.sampler import DecoderSampler
from kandinsky_jax.rewards.training import (
    MetricsLog,
    TrainedLora,
    as_pytree,
    check_divides,
    check_embeds,
    check_rewards,
    faults_of,
    optimizer_of,
    replicate,
    standard_error,
)


@dataclasses.dataclass(frozen=True)
class DraftConfig:
    """Settings of `train_draft`.

    Args:
        updates: of the LoRA.
        batch_size: pictures of an update, over all devices.
        gradient_steps: of the sampler, from the last on, that are differentiated: K for DRaFT-K; a pair (least, most)
            draws it uniformly for each update, as AlignProp does; None is all of them, DRaFT.
        learning_rate, weight_decay: of AdamW.
        max_grad_norm: largest norm of the gradients.
        lora: which layers of the UNet are changed, and how.
        seed: of the LoRA's first values, the order of prompts and all noise.
    """

    updates: int = 100
    batch_size: int = 16
    gradient_steps: int | tuple[int, int] | None = 1
    learning_rate: float = 4e-4
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    lora: lora.LoraConfig = dataclasses.field(default_factory=lora.LoraConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        faults = faults_of(self, ("updates", "batch_size"), ("learning_rate", "max_grad_norm"))
        steps = self.gradient_steps if isinstance(self.gradient_steps, tuple) else (self.gradient_steps or 1,) * 2
        whole = all(isinstance(one, int) and not isinstance(one, bool) for one in steps)
        if len(steps) != 2 or not whole or not 1 <= steps[0] <= steps[1] or self.gradient_steps == 0:
            faults.append(
                "gradient_steps must be a whole number of at least 1, a pair such as (1, 25), or None for all, got "
                f"{self.gradient_steps!r}"
            )
        if faults:
            raise ValueError("; ".join(faults))


def train_draft(
    sampler: DecoderSampler,
    embeds: jax.Array | np.ndarray,
    reward: Reward,
    config: DraftConfig | None = None,
    *,
    mesh: Mesh | None = None,
    log: str | os.PathLike[str] | None = None,
    quiet: bool = False,
) -> TrainedLora:
    """Train a LoRA of the UNet to raise the mean of a differentiable reward.

    An update samples a batch of prompts, and goes up the gradient of the rewards' mean.

    Args:
        sampler: the decoder; its weights do not change.
        embeds: image embeddings `[P, D]`, from the prior for instance. Number p is that of prompt p of the reward.
        reward: differentiable, see `Reward`.
        config: see `DraftConfig`.
        mesh: shards the batch over its axis `data`; the networks are on every device, as always with LoRA.
        log: file of JSON lines to write the metrics to.
        quiet: no progress bar.
    Returns:
        the LoRA, and for each update `update`, `reward`, its `standard_error`, `gradient_norm`, `gradient_steps`. The
        reward is that of the pictures which the update was made from.
    """
    config = DraftConfig() if config is None else config
    embeds = check_embeds(embeds)
    check_texts(reward, len(embeds))
    check_divides(mesh, "batch_size", config.batch_size)
    optimizer = optimizer_of(config.learning_rate, config.max_grad_norm, config.weight_decay)
    changes = lora.init(sampler.params["unet"], config.lora, jax.random.key(config.seed))
    sampler, reward, changes = replicate(mesh, (sampler, as_pytree(reward), changes))
    state = replicate(mesh, optimizer.init(changes))
    update = _update(optimizer, config, mesh)
    rng, metrics = np.random.default_rng(config.seed), MetricsLog(log)
    with tqdm(range(config.updates), desc="draft", unit="update", disable=quiet) as bar:
        bar.set_postfix_str("compiling the first update")
        for number in bar:
            prompts = rng.choice(len(embeds), config.batch_size, replace=len(embeds) < config.batch_size)
            images = np.arange(config.batch_size) + number * config.batch_size
            batch = (embeds[prompts], jnp.asarray(prompts, jnp.int32), image_keys([config.seed] * len(images), images))
            batch = batch if mesh is None else shard_batch(mesh, batch, pictures=False)
            steps = _steps(config, sampler.steps, rng)
            traced = jnp.int32(steps) if isinstance(config.gradient_steps, tuple) else None
            changes, state, rewards, norm = update(changes, state, sampler, reward, batch, traced)
            found = {"reward": np.mean(rewards), "standard_error": standard_error(np.asarray(rewards))}
            row = metrics.add({"update": number, **found, "gradient_norm": norm, "gradient_steps": steps})
            bar.set_postfix(reward=f"{row['reward']:.4f}")
    return TrainedLora(changes, config.lora, metrics.history)


def _steps(config: DraftConfig, steps: int, rng: np.random.Generator) -> int:
    """Return how many of the sampler's steps an update differentiates."""
    given = config.gradient_steps
    if isinstance(given, tuple):
        return int(rng.integers(min(given[0], steps), min(given[1], steps) + 1))
    return steps if given is None else min(given, steps)


def _update(optimizer: optax.GradientTransformation, config: DraftConfig, mesh: Mesh | None) -> Callable[..., Any]:
    """Return the compiled update of changes and the optimizer's state."""

    def of_device(
        changes: lora.Lora, sampler: DecoderSampler, reward: Reward, steps: jax.Array | None, batch: PyTree
    ) -> tuple[lora.Lora, jax.Array]:
        embeds, prompts, keys = batch
        fixed = config.gradient_steps if isinstance(config.gradient_steps, int) else None

        def loss(changes: lora.Lora) -> tuple[jax.Array, jax.Array]:
            changed = sampler.with_lora(changes, config.lora.scale)
            rng = keys if sampler.stochastic else None
            images = changed(changed.noise(keys, len(keys)), embeds, rng, fixed if steps is None else steps)
            rewards = check_rewards(jnp.asarray(reward(images, prompts)), len(prompts))
            return -rewards.mean(), rewards

        gradient, rewards = jax.grad(loss, has_aux=True)(changes)
        return (gradient if mesh is None else jax.lax.pmean(gradient, DATA_AXIS)), rewards

    def update(
        changes: lora.Lora, state: PyTree, sampler: DecoderSampler, reward: Reward, batch: PyTree, steps: PyTree
    ) -> tuple[lora.Lora, PyTree, jax.Array, jax.Array]:
        each = PartitionSpec(DATA_AXIS)
        gradients = sharded(mesh, of_device, (REPLICATED,) * 4 + (each,), (REPLICATED, each))
        gradient, rewards = gradients(changes, sampler, reward, steps, batch)
        updates, state = optimizer.update(gradient, state, changes)
        return optax.apply_updates(changes, updates), state, rewards, optax.tree.norm(gradient)

    return jax.jit(update)
