"""Training of LoRA: low-rank changes of the network that another task would train fully."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from PIL import Image

from kandinsky_jax import lora
from kandinsky_jax.checkpoint import lora_files
from kandinsky_jax.diffusion import Network, Params
from kandinsky_jax.pipelines import Pipeline
from kandinsky_jax.training.config import Config
from kandinsky_jax.training.data import Captioned, Reader, Skipped
from kandinsky_jax.training.kinds import Kind
from kandinsky_jax.training.tasks.base import Draw, Loss, TrainingTask
from kandinsky_jax.training.tasks.diffusion import DiffusionTask


@dataclass(frozen=True)
class LoraTask(TrainingTask):
    """Training of low-rank changes (`kandinsky_jax.lora`) of a diffusion network, which is frozen.

    Args:
        full: the task that would train the network itself; its data, loss and samples are used.
    """

    full: DiffusionTask

    @property
    def kind(self) -> Kind:  # type: ignore[override]
        return self.full.lora_kind

    @classmethod
    def load(cls, config: Config) -> Pipeline:
        return DiffusionTask.load(config)

    @property
    def modules(self) -> dict[str, nnx.Module]:
        return self.full.modules

    @property
    def networks(self) -> dict[str, nnx.Module]:
        return self.full.networks

    def offload(self, networks: Mapping[str, nnx.Module]) -> None:
        self.full.offload(networks)

    def initial(self, key: jax.Array) -> lora.Lora:
        return self.initial_of(Network.split(self.full.module)[1], key)

    def initial_of(self, params: Params, key: jax.Array) -> lora.Lora:
        """Return the initial changes, for a network with these parameters."""
        return lora.init(params, self.config.lora, key)

    def frozen(self) -> Params:
        return self.frozen_of(Network.split(self.full.module)[1])

    def frozen_of(self, params: Params) -> Params:
        """Return a network's parameters as the loss needs them: float32 where changes are added to them."""
        layers = lora.layers(params, self.config.lora)
        changed = {lora.parameter_of(name, leaf.ndim) for name, leaf in layers.items()}
        dtype = self.config.optimizer.dtype
        return lora.unflat({n: x if n in changed else x.astype(dtype) for n, x in lora.flat(params).items()})

    def weights(self, trained: lora.Lora) -> dict[str, Params]:
        params = Network.split(self.full.module)[1]
        return {self.full.component: lora.merged(params, trained, self.config.lora.scale)}

    def reader(self) -> Reader:
        return self.full.reader()

    def usable(self, items: Sequence[Captioned], skipped: Skipped) -> list[Captioned]:
        return self.full.usable(items, skipped)

    def encode(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        return self.full.encode(batch)

    def draw(self) -> Draw:
        return self.full.draw()

    @property
    def further_settings(self) -> dict[str, object]:
        return self.full.further_settings

    @property
    def uses_average(self) -> bool:
        return self.full.uses_average

    def loss(self) -> Loss:
        loss_of_params, scale, dtype = self.full.loss(), self.config.lora.scale, self.config.optimizer.dtype
        params = Network.split(self.full.module)[1]
        takes_frozen = jax.eval_shape(self.full.frozen_of, params) is not None

        def merged(frozen: Params, changes: lora.Lora) -> Params:
            return computed(lora.merged(frozen, changes, scale))  # added in float32

        def computed(params: Params) -> Params:
            return jax.tree.map(lambda x: x.astype(dtype), params)

        def loss(
            trained: lora.Lora, batch: Mapping[str, jax.Array], frozen: Params, average: lora.Lora | None = None
        ) -> jax.Array:
            further = [computed(frozen)] if takes_frozen else []
            further += [] if average is None else [merged(frozen, average)]
            return loss_of_params(merged(frozen, trained), batch, *further)

        return loss

    def sample(self, items: Sequence[Captioned]) -> Image.Image:
        return self.full.sample(items)

    def export(self, target: Path, trained: lora.Lora, items: Sequence[Captioned]) -> None:
        for left in target.glob(f".{lora.FILE}.*"):  # of a killed process
            left.unlink(missing_ok=True)
        changes = lora.layer_changes(trained, self.config.lora.scale)
        lora_files.write(target, {self.full.component: changes})
