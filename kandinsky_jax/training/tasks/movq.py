"""Training of MoVQ, by reconstruction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from PIL import Image

from kandinsky_jax import images
from kandinsky_jax.common.types import PyTree
from kandinsky_jax.diffusion import Network, Params
from kandinsky_jax.diffusion.calls import call
from kandinsky_jax.pipelines import KandinskyV22Pipeline, Pipeline
from kandinsky_jax.training.config import Config
from kandinsky_jax.training.data import Captioned, Reader
from kandinsky_jax.training.kinds import Kind
from kandinsky_jax.training.losses import movq_loss
from kandinsky_jax.training.tasks.base import (
    Draw,
    Loss,
    TrainingTask,
    contact_sheet,
    first_readable,
    reader_of,
    to_movq_pixels,
)

SHOWN = 8  # pictures of a contact sheet


@dataclass(frozen=True)
class MoVQTask(TrainingTask):
    """Training of a decoder's MoVQ; its UNet does not change."""

    kind = Kind.MOVQ

    @classmethod
    def load(cls, config: Config) -> Pipeline:
        return KandinskyV22Pipeline.from_pretrained(config.model, dtype="float32")

    @property
    def modules(self) -> dict[str, nnx.Module]:
        return {"movq": self.pipe.movq}

    def initial(self, key: jax.Array) -> PyTree:
        return Network.split(self.pipe.movq)[1]

    def weights(self, trained: PyTree) -> dict[str, Params]:
        return {"movq": trained}

    def reader(self) -> Reader:
        return reader_of(self.config)

    def encode(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        return {"pixels": to_movq_pixels(batch["pixels"])}

    def draw(self) -> Draw:
        share = self.config.quantized_share

        def draw(batch: Mapping[str, jax.Array], key: jax.Array) -> dict[str, jax.Array]:
            return {**batch, "quantized": jax.random.bernoulli(key, share, (len(batch["pixels"]),))}

        return draw

    def loss(self) -> Loss:
        network = Network.split(self.pipe.movq)[0]

        def loss(trained: PyTree, batch: Mapping[str, jax.Array]) -> jax.Array:
            return movq_loss(network, trained, batch["pixels"], batch["quantized"])

        return loss

    def sample(self, items: Sequence[Captioned]) -> Image.Image:
        read = [row["pixels"] for row in first_readable(self.reader(), items, SHOWN)]
        network, params = Network.split(self.pipe.movq)
        latents = call(network, params, to_movq_pixels(np.stack(read)), method="encode")
        decoded = images.from_network(call(network, params, latents, method="decode"))
        return contact_sheet([[Image.fromarray(x) for x in read], images.to_output(decoded, "pil")])

    def export(self, target: Path, trained: PyTree, items: Sequence[Captioned]) -> None:
        self.pipe.save_pretrained(target, overwrite=True)
