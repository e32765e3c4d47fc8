"""What training a LoRA by a reward has in common, whatever the gradient."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kandinsky_jax import lora
from kandinsky_jax.checkpoint import lora_files
from kandinsky_jax.common.types import PyTree
from kandinsky_jax.parallel.mesh import DATA_AXIS

T = TypeVar("T", jax.Array, np.ndarray)
Function = TypeVar("Function", bound=Callable[..., object])
Metrics = dict[str, float]


class TrainedLora(NamedTuple):
    """The result of `train_draft` and `train_ddpo`."""

    changes: lora.Lora
    config: lora.LoraConfig
    history: list[Metrics]  # of each update or epoch

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the file that `load_lora_weights` of our pipelines and of diffusers' reads; return its path."""
        return lora_files.write(folder, {"unet": lora.layer_changes(self.changes, self.config.scale)})


def as_pytree(function: Function) -> Function:
    """Return a function as a pytree of its arrays, fit to be an argument of a compiled program.

    One that is a pytree of arrays stays; another one is made a pytree without leaves.
    """
    is_leaf = any(leaf is function for leaf in jax.tree.leaves(function))
    return jax.tree_util.Partial(function) if is_leaf else function  # type: ignore[return-value]


def optimizer_of(learning_rate: float, max_grad_norm: float, weight_decay: float) -> optax.GradientTransformation:
    """Return AdamW after clipping by the norm of all gradients."""
    return optax.chain(optax.clip_by_global_norm(max_grad_norm), optax.adamw(learning_rate, weight_decay=weight_decay))


def replicate(mesh: Mesh | None, tree: PyTree) -> PyTree:
    """Copy arrays to every device of a mesh; no-op without one."""
    return tree if mesh is None else jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def check_divides(mesh: Mesh | None, name: str, size: int) -> None:
    """Raise ValueError for a batch that cannot be sharded evenly."""
    devices = 1 if mesh is None else mesh.shape[DATA_AXIS]
    if size % devices:
        raise ValueError(f"{name}={size} cannot be divided over {devices} devices; make it a multiple of {devices}")


def check_embeds(embeds: jax.Array | np.ndarray) -> jax.Array:
    """Return image embeddings `[P, D]` as an array."""
    embeds = jnp.asarray(embeds)
    if embeds.ndim != 2 or not len(embeds):
        raise ValueError(
            f"embeds have the shape {list(embeds.shape)}; needed are image embeddings [P, D], one a prompt"
        )
    return embeds


def check_rewards(rewards: T, count: int) -> T:
    """Return rewards, if there is one for each picture."""
    if rewards.shape != (count,):
        raise ValueError(f"the reward returned the shape {list(rewards.shape)}; needed is {[count]}, one a picture")
    return rewards


def check_finite(rewards: np.ndarray) -> np.ndarray:
    """Return the rewards of the first pictures, if all are numbers."""
    if odd := int(np.sum(~np.isfinite(rewards))):
        raise ValueError(f"the reward of {odd} of {len(rewards)} pictures is not finite; needed is a number for each")
    return rewards


def standard_error(values: np.ndarray) -> float:
    """Return the standard error of the mean of numbers `[N]`; 0 for a single one."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


class MetricsLog:
    """Metrics of each update or epoch: kept, and appended to a file of JSON lines if there is one.

    Args:
        path: of the file, which is emptied first; None for none.
    """

    def __init__(self, path: str | os.PathLike[str] | None):
        self.history: list[Metrics] = []
        self._path = None if path is None else Path(path)
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text("")

    def add(self, metrics: Mapping[str, object]) -> Metrics:
        """Add the metrics of one update or epoch, scalars, and return them as Python's numbers."""
        row = {name: float(value) for name, value in metrics.items()}  # type: ignore[arg-type]
        self.history.append(row)
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        return row


def faults_of(config: object, at_least_one: tuple[str, ...], positive: tuple[str, ...]) -> list[str]:
    """Return what is wrong with numbers of a configuration.

    Args:
        at_least_one: names of whole numbers from 1 on.
        positive: names of numbers above 0.
    """
    faults = []
    for name in at_least_one:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            faults.append(f"{name} must be a whole number of at least 1, got {value!r}")
    for name in positive:
        if not 0 < getattr(config, name) < np.inf:
            faults.append(f"{name} must be a number above 0, got {getattr(config, name)!r}")
    return faults
