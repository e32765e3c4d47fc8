"""Training of the prior.

pictures -> CLIP vision -> image embedding --> loss
captions -> CLIP text ------------------------^
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kandinsky_jax.common.types import PyTree
from kandinsky_jax.diffusion import Network, Params
from kandinsky_jax.pipelines.base import Pipeline
from kandinsky_jax.schedulers import DDPMScheduler
from kandinsky_jax.training.data import Reader
from kandinsky_jax.training.kinds import Kind
from kandinsky_jax.training.losses import normalized_embeds, prior_loss
from kandinsky_jax.training.tasks.diffusion import DiffusionTask

# The noise schedule that the reference trains the prior with.
SCHEDULE = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample")


@dataclass(frozen=True)
class PriorTask(DiffusionTask):
    """Training of the prior; dropped conditions become the empty prompt."""

    kind = Kind.PRIOR
    component = "prior"
    lora_kind = Kind.LORA_PRIOR
    prediction_type = "sample"

    @property
    def module(self) -> nnx.Module:
        return self.pipe.prior_prior

    @property
    def stage(self) -> Pipeline:
        return self.pipe.prior_pipe

    @property
    def encoders(self) -> dict[str, nnx.Module]:
        return {"image_encoder": self.pipe.prior_image_encoder, "text_encoder": self.pipe.prior_text_encoder}

    def alphas_cumprod(self) -> np.ndarray:
        return SCHEDULE.alphas_cumprod

    def reader(self) -> Reader:
        return self.text_reader(processor=self.pipe.prior_image_processor)

    def encode(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        embeds = self.encoded_by("prior_image_encoder", jnp.asarray(batch["clip_pixels"]))
        return {"image_embeds": embeds.astype(jnp.float32)} | self.encode_text(batch["input_ids"], batch["text_mask"])

    def dropped_condition(self) -> dict[str, jax.Array]:
        return self.encode_empty_prompt()

    def clean(self, batch: Mapping[str, jax.Array]) -> jax.Array:
        return batch["image_embeds"]

    def condition(self, module: Any, batch: Mapping[str, jax.Array]) -> PyTree:
        return module.condition(batch["prompt_embeds"], batch["text_encoder_hidden_states"], batch["text_mask"])

    def normalized(self, module: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        return normalized_embeds(module, batch["image_embeds"])

    def loss_of_batch(
        self, network: Network, params: Params, batch: Mapping[str, jax.Array], alphas: jax.Array
    ) -> jax.Array:
        return prior_loss(network, params, **batch, alphas_cumprod=alphas, snr_gamma=self.config.snr_gamma)
