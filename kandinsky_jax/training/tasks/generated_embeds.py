"""Image embeddings that the prior generates from captions: what a decoder is conditioned on at inference."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from kandinsky_jax.checkpoint.recommended_settings import USUAL_PRIOR_STEPS, USUAL_SCALE
from kandinsky_jax.diffusion import PRIOR_STREAM, ClassifierFreeGuidance, noise_source
from kandinsky_jax.diffusion.calls import call, condition
from kandinsky_jax.diffusion.rng import image_keys
from kandinsky_jax.pipelines.base import is_guided
from kandinsky_jax.pipelines.denoising import LoopInputs, denoise_batches
from kandinsky_jax.training.run_record import weights_digest
from kandinsky_jax.training.tasks.diffusion import DiffusionTask, unpadded


class EmbedsGenerator:
    """Generates the embeddings that the prior's pipeline does, with its scheduler and 25 steps.

    Guidance is away from the empty prompt, by the scale that the model recommends, else 4. The noise of a caption
    depends on the seed and its tokens alone: it is the same in every batch, epoch and process.

    Args:
        task: whose pipeline and configuration are used.
    Raises:
        CheckpointError: where the model's recommended settings are not valid.
    """

    def __init__(self, task: DiffusionTask):
        recommended = task.pipe.recommended_settings.prior_guidance_scale
        self.scale = USUAL_SCALE if recommended is None else float(recommended)
        self._task, self._seed = task, task.config.seed
        self._schedule = task.pipe.prior_scheduler.schedule(USUAL_PRIOR_STEPS)
        self._empty = task.encode_empty_prompt() if is_guided(self.scale) else None

    @property
    def settings(self) -> dict[str, object]:
        """What determines the embeddings besides captions and weights."""
        columns = {name: column for name, column in self._schedule.table._asdict().items() if name != "levels"}
        schedule = weights_digest(columns)  # levels were no part of it, and follow from the rest
        return {"seed": self._seed, "guidance_scale": self.scale, "schedule": schedule}

    def __call__(self, ids: np.ndarray, mask: np.ndarray) -> jax.Array:
        """Generate an embedding for each caption, float32 `[B, D]`; compiled once per shape.

        Args:
            ids, mask: of `Reader`, `[B, T]`.
        """
        text = self._task.encode_text(ids, mask)
        network, params = self._task.split("prior_prior")
        inputs = LoopInputs(*condition(network, params, _arguments(text), self._uncond(text)))
        source = noise_source(caption_keys(self._seed, ids, mask), len(ids), PRIOR_STREAM)
        noise = source.initial((len(ids), self._task.pipe.prior_prior.config.embedding_dim))
        guider = None if self._empty is None else ClassifierFreeGuidance(jnp.float32(self.scale))
        [sample] = denoise_batches(
            network,
            params,
            lambda: ([inputs], guider),
            self._schedule,
            [x * self._schedule.init_noise_sigma for x in noise],
            source,
        )
        return call(network, params, sample, method="post_process_latents").astype(jnp.float32)

    def _uncond(self, text: Mapping[str, jax.Array]) -> dict[str, jax.Array] | None:
        """Return the empty prompt in the shapes of a batch, None where guidance is off."""
        if self._empty is None:
            return None
        empty = unpadded(self._empty, text)
        return _arguments({name: jnp.broadcast_to(empty[name], array.shape) for name, array in text.items()})


def _arguments(text: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Return encoded captions by the names that the prior's `condition` has for them."""
    return {
        "proj_embedding": text["prompt_embeds"],
        "encoder_hidden_states": text["text_encoder_hidden_states"],
        "attention_mask": text["text_mask"],
    }


def caption_keys(seed: int, ids: np.ndarray, mask: np.ndarray) -> jax.Array:
    """Return a key for each caption `[B]`: of its tokens without padding, however long that is.

    They are what a pipeline takes as `generator`. Captions of equal tokens have equal keys.
    """
    return image_keys([seed] * len(ids), [_number(row[shown]) for row, shown in zip(ids, mask, strict=True)])


def _number(tokens: np.ndarray) -> int:
    """Return 31 bits of the CRC-32 of token ids, since the number of an image is an int32."""
    return zlib.crc32(tokens.astype("<i4").tobytes()) & 0x7FFFFFFF
