"""Training of CLIP's two towers, by matching pictures and captions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kandinsky_jax.common.types import PyTree
from kandinsky_jax.diffusion import Network, Params
from kandinsky_jax.diffusion.calls import call
from kandinsky_jax.pipelines import KandinskyV22PriorPipeline, Pipeline
from kandinsky_jax.training.config import Config
from kandinsky_jax.training.data import Captioned, Reader
from kandinsky_jax.training.kinds import Kind
from kandinsky_jax.training.losses import clip_loss
from kandinsky_jax.training.tasks.base import (
    Loss,
    TrainingTask,
    first_readable,
    reader_of,
)

# Radford et al. 2021, section 2.5: an initial temperature of 0.07.
FIRST_LOGIT_SCALE = float(np.log(1 / 0.07))
ENCODED_AT_ONCE = 64


@dataclass(frozen=True)
class CLIPTask(TrainingTask):
    """Training of CLIP's two towers; of the prior only the statistics of image embeddings change."""

    kind = Kind.CLIP

    @classmethod
    def load(cls, config: Config) -> Pipeline:
        return KandinskyV22PriorPipeline.from_pretrained(config.prior or config.model, dtype="float32")

    @property
    def modules(self) -> dict[str, nnx.Module]:
        return {"text_encoder": self.pipe.text_encoder, "image_encoder": self.pipe.image_encoder}

    def initial(self, key: jax.Array) -> PyTree:
        params = {name: Network.split(module)[1] for name, module in self.modules.items()}
        return params | {"logit_scale": jnp.float32(FIRST_LOGIT_SCALE)}

    def weights(self, trained: PyTree) -> dict[str, Params]:
        return {name: trained[name] for name in self.modules}

    def reader(self) -> Reader:
        pipe = self.pipe
        length = self.config.text_length or pipe.text_encoder.config.max_position_embeddings
        return reader_of(self.config, pipe.image_processor, tokenizer=pipe.tokenizer, length=length)

    def encode(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        return {name: jnp.asarray(batch[name]) for name in ("input_ids", "clip_pixels")}

    def loss(self) -> Loss:
        networks = {name: Network.split(module)[0] for name, module in self.modules.items()}

        def loss(trained: PyTree, batch: Mapping[str, jax.Array]) -> jax.Array:
            return clip_loss(networks, trained, **batch)

        return loss

    def sample(self, items: Sequence[Captioned]) -> None:
        return None

    def export(self, target: Path, trained: PyTree, items: Sequence[Captioned]) -> None:
        embeds = self._embeds(items)
        prior = self.pipe.prior
        prior.clip_mean[...] = jnp.asarray(embeds.mean(0, keepdims=True), prior.clip_mean.dtype)
        prior.clip_std[...] = jnp.asarray(embeds.std(0, keepdims=True), prior.clip_std.dtype)
        self.pipe.save_pretrained(target, overwrite=True)

    def _embeds(self, items: Sequence[Captioned]) -> np.ndarray:
        """Compute the image embeddings of all pictures, `[N, D]`."""
        reader = self.reader()
        network, params = Network.split(self.pipe.image_encoder)
        found = []
        for start in range(0, len(items), ENCODED_AT_ONCE):
            if read := first_readable(reader, items[start : start + ENCODED_AT_ONCE], ENCODED_AT_ONCE):
                pixels = np.stack([row["clip_pixels"] for row in read])
                found.append(np.asarray(call(network, params, jnp.asarray(pixels))))
        return np.concatenate(found)
