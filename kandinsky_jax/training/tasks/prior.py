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

from kandinsky_jax.checkpoint.tokenizer import tokenize
from kandinsky_jax.common.types import PyTree
from kandinsky_jax.diffusion import Network, Params
from kandinsky_jax.pipelines.base import Pipeline
from kandinsky_jax.schedulers import DDPMScheduler
from kandinsky_jax.training.data import Reader
from kandinsky_jax.training.kinds import Kind
from kandinsky_jax.training.losses import normalized_embeds, prior_loss
from kandinsky_jax.training.tasks.base import reader_of
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

    @property
    def _text_length(self) -> int:
        return self.pipe.prior_text_encoder.config.max_position_embeddings

    def reader(self) -> Reader:
        length = self.config.text_length or self._text_length
        return reader_of(
            self.config, self.pipe.prior_image_processor, tokenizer=self.pipe.prior_tokenizer, length=length
        )

    def encode(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        embeds = self.encoded_by("prior_image_encoder", jnp.asarray(batch["clip_pixels"]))
        return {"image_embeds": embeds.astype(jnp.float32)} | self._text(batch["input_ids"], batch["text_mask"])

    def _text(self, ids: np.ndarray, mask: np.ndarray) -> dict[str, jax.Array]:
        output = self.encoded_by("prior_text_encoder", jnp.asarray(ids))
        return {
            "prompt_embeds": output.text_embeds,
            "text_encoder_hidden_states": output.last_hidden_state,
            "text_mask": jnp.asarray(mask),
        }

    def dropped_condition(self) -> dict[str, jax.Array]:
        ids, mask = tokenize(self.pipe.prior_tokenizer, [""], self._text_length)
        length = self.config.text_length
        return self._text(ids[:, :length], mask[:, :length])

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
