"""Diffusion-DPO of the prior and the decoder: pairs of pictures for one caption, of which one is preferred.

The data, encoders and sample pictures are those of the task that trains the network itself, twice. The decoder is
conditioned on the embedding that the prior generates from the caption, since that is what both pictures of a pair have
in common, and what it will see. The loss is `training.dpo`'s; the reference is the network as it was loaded.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kandinsky_jax.diffusion import Network, Params, split_output
from kandinsky_jax.training.data import Captioned, Reader, Skipped
from kandinsky_jax.training.dpo import dpo_loss
from kandinsky_jax.training.kinds import Kind
from kandinsky_jax.training.losses import diffuse
from kandinsky_jax.training.tasks.base import Loss, to_movq_pixels
from kandinsky_jax.training.tasks.decoder import DecoderTask
from kandinsky_jax.training.tasks.diffusion import DiffusionTask
from kandinsky_jax.training.tasks.generated_embeds import EmbedsGenerator
from kandinsky_jax.training.tasks.prior import PriorTask


@dataclass(frozen=True)
class DPOTask(DiffusionTask):
    """What Diffusion-DPO changes in the training of a diffusion network."""

    clean_name: ClassVar[str]  # of what is diffused, in an encoded batch; of the other picture with "rejected_" before

    def __post_init__(self) -> None:
        if self.config.snr_gamma is not None:
            raise ValueError(f"snr_gamma is of no use for {self.kind}: its losses are not weighted; leave it out")

    def usable(self, items: Sequence[Captioned], skipped: Skipped) -> list[Captioned]:
        for item in items:
            if item.rejected is None:
                skipped.add(f"{item.name}: it has no rejected_file_name (in Parquet rejected_image), as pairs need")
        return super().usable([item for item in items if item.rejected is not None], skipped)

    def frozen_of(self, params: Params) -> Params:
        """Return the reference's parameters, in the dtype of computation."""
        return jax.tree.map(lambda leaf: leaf.astype(self.config.optimizer.dtype), params)

    def loss(self) -> Loss:
        network, beta = Network.split(self.module)[0], self.config.dpo.beta
        alphas = jnp.asarray(self.alphas_cumprod(), jnp.float32)

        def loss(trained: Params, batch: Mapping[str, jax.Array], frozen: Params) -> jax.Array:
            both = self.both_pictures(batch)
            errors = self.errors(network, trained, both, alphas).reshape(2, -1)
            reference = jax.lax.stop_gradient(self.errors(network, frozen, both, alphas)).reshape(2, -1)
            return dpo_loss(errors[0], errors[1], reference[0], reference[1], beta)

        return loss

    def both_pictures(self, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Return a batch `[2B, ...]`: the preferred pictures, then the rejected ones, alike in everything else."""
        rejected = f"rejected_{self.clean_name}"
        others = {**batch, self.clean_name: batch[rejected]}
        return {name: jnp.concatenate([x, others[name]]) for name, x in batch.items() if name != rejected}

    def errors(self, network: Network, params: Params, batch: Mapping[str, jax.Array], alphas: jax.Array) -> jax.Array:
        """Compute the mean squared error of each example's prediction, float32 `[B]`."""
        module = network.bind(params)
        clean = self.normalized(module, batch)
        noisy = diffuse(alphas, clean, batch["noise"], batch["timesteps"])
        output = module(noisy, batch["timesteps"], self.condition(module, batch))
        found, _ = split_output(output, clean.shape[-1])
        target = batch["noise"] if self.prediction_type == "epsilon" else clean
        return jnp.square(found - target).mean(axis=tuple(range(1, clean.ndim)))


@dataclass(frozen=True)
class DPODecoderTask(DPOTask, DecoderTask):
    """Diffusion-DPO of the decoder's UNet, given the embeddings that the prior generates from the captions."""

    kind = Kind.DPO_DECODER
    lora_kind = Kind.DPO_DECODER
    clean_name = "latents"

    @functools.cached_property
    def _generator(self) -> EmbedsGenerator:
        return EmbedsGenerator(self)

    @property
    def encoders(self) -> dict[str, nnx.Module]:
        return {"text_encoder": self.pipe.prior_text_encoder, "prior": self.pipe.prior_prior, "movq": self.pipe.movq}

    @property
    def encoding_settings(self) -> dict[str, object]:
        return {"pairs": True} | self._generator.settings

    @property
    def further_settings(self) -> dict[str, object]:
        names = ("guidance_scale", "schedule")
        return {f"{name} of the embeddings": self._generator.settings[name] for name in names}

    def reader(self) -> Reader:
        return self.text_reader(hints=self.takes_hint, pairs=True)

    def encode_embeds(self, batch: Mapping[str, np.ndarray]) -> jax.Array:
        return self._generator(batch["input_ids"], batch["text_mask"])

    def encode(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        rejected = self.encoded_by("movq", to_movq_pixels(batch["rejected_pixels"]), method="encode")
        return super().encode(batch) | {"rejected_latents": rejected.astype(jnp.float32)}


@dataclass(frozen=True)
class DPOPriorTask(DPOTask, PriorTask):
    """Diffusion-DPO of the prior, which learns whose embedding to generate."""

    kind = Kind.DPO_PRIOR
    lora_kind = Kind.DPO_PRIOR
    clean_name = "image_embeds"

    @property
    def encoding_settings(self) -> dict[str, object]:
        return {"pairs": True}

    def reader(self) -> Reader:
        return self.text_reader(processor=self.pipe.prior_image_processor, pairs=True)

    def encode(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        rejected = self.encoded_by("prior_image_encoder", jnp.asarray(batch["rejected_clip_pixels"]))
        return super().encode(batch) | {"rejected_image_embeds": rejected.astype(jnp.float32)}
