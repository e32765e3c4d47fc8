"""Training of the decoder's UNet.

pictures -> MoVQ latents ------------------> loss
pictures -> CLIP vision -> image embedding --^
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from kandinsky_jax.checkpoint import hub
from kandinsky_jax.common.types import PyTree
from kandinsky_jax.diffusion import Network, Params
from kandinsky_jax.pipelines.base import Pipeline
from kandinsky_jax.training.data import Captioned, Reader, Skipped
from kandinsky_jax.training.kinds import Kind
from kandinsky_jax.training.losses import decoder_condition, decoder_loss
from kandinsky_jax.training.tasks.base import first_readable, reader_of, to_movq_pixels
from kandinsky_jax.training.tasks.diffusion import DiffusionTask


@dataclass(frozen=True)
class DecoderTask(DiffusionTask):
    """Training of the decoder's UNet; dropped conditions become the vision tower's embedding of zeros.

    An inpainting UNet gets a random mask for each picture: a rectangle, or, for one in eight, the whole picture.
    """

    kind = Kind.DECODER
    component = "unet"
    lora_kind = Kind.LORA_DECODER
    prediction_type = "epsilon"

    @property
    def module(self) -> nnx.Module:
        return self.pipe.unet

    @property
    def stage(self) -> Pipeline:
        return self.pipe.decoder_pipe

    @property
    def encoders(self) -> dict[str, nnx.Module]:
        return {"image_encoder": self.pipe.prior_image_encoder, "movq": self.pipe.movq}

    @property
    def _inpaints(self) -> bool:
        return self.pipe.decoder_pipe.REPOSITORY == hub.INPAINT

    @property
    def takes_hint(self) -> bool:
        """Whether the UNet takes a depth map."""
        return self.pipe.unet.config.takes_hint

    def alphas_cumprod(self) -> np.ndarray:
        return self.pipe.scheduler.alphas_cumprod

    def reader(self) -> Reader:
        return reader_of(self.config, self.pipe.prior_image_processor, hints=self.takes_hint)

    def usable(self, items: Sequence[Captioned], skipped: Skipped) -> list[Captioned]:
        found = [item for item in items if item.hint is not None or not self.takes_hint]
        for item in items:
            if item.hint is None and self.takes_hint:
                skipped.add(f"{item.name}: it has no hint, which this UNet takes")
        return found

    def encode(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        latents = self.encoded_by("movq", to_movq_pixels(batch["pixels"]), method="encode")
        found = {"image_embeds": self.encode_embeds(batch), "latents": latents.astype(jnp.float32)}
        return found | ({"hint": jnp.asarray(batch["hint"])} if self.takes_hint else {})

    def encode_embeds(self, batch: Mapping[str, np.ndarray]) -> jax.Array:
        """Return the image embeddings of a batch of the reader, float32 `[B, D]`."""
        return self.encoded_by("prior_image_encoder", jnp.asarray(batch["clip_pixels"])).astype(jnp.float32)

    def dropped_condition(self) -> dict[str, jax.Array]:
        return {"image_embeds": self.pipe.prior_pipe.get_zero_embed().astype(jnp.float32)}

    def clean(self, batch: Mapping[str, jax.Array]) -> jax.Array:
        return batch["latents"]

    def draw_also(self, batch: Mapping[str, jax.Array], key: jax.Array) -> dict[str, jax.Array]:
        if not self._inpaints:
            return {}
        return {"repaint_mask": random_repaint_masks(jax.random.fold_in(key, 3), *batch["latents"].shape[:3])}

    def condition(self, module: Any, batch: Mapping[str, jax.Array]) -> PyTree:
        arrays = ("latents", "image_embeds", "hint", "repaint_mask")
        return decoder_condition(module, **{name: batch[name] for name in arrays if name in batch})

    def normalized(self, module: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        return batch["latents"]

    def loss_of_batch(
        self, network: Network, params: Params, batch: Mapping[str, jax.Array], alphas: jax.Array
    ) -> jax.Array:
        return decoder_loss(network, params, **batch, alphas_cumprod=alphas, snr_gamma=self.config.snr_gamma)

    def sample_pictures(self, items: Sequence[Captioned], count: int) -> dict[str, np.ndarray | list[Image.Image]]:
        if not (self._inpaints or self.takes_hint):
            return {}
        found = first_readable(reader_of(self.config, hints=self.takes_hint), items, count)
        rows = [found[i % len(found)] for i in range(count)]
        if self.takes_hint:
            return {"hint": np.stack([row["hint"] for row in rows])}
        side = self.config.resolution
        repaint_mask = np.zeros((side, side), bool)
        repaint_mask[side // 4 : -side // 4, side // 4 : -side // 4] = True
        return {"image": [Image.fromarray(row["pixels"]) for row in rows], "mask_image": repaint_mask}


def random_repaint_masks(key: jax.Array, batch: int, height: int, width: int) -> jax.Array:
    """Sample rectangles to repaint, 1 inside, float32 `[B, h, w, 1]`; one in eight is the whole picture."""
    of_corner, of_whole = jax.random.split(key)
    inside = []
    for axis, side in enumerate((height, width)):
        ends = jax.random.randint(jax.random.fold_in(of_corner, axis), (2, batch), 0, side)
        at = jnp.arange(side)
        inside.append((at >= ends.min(0)[:, None]) & (at <= ends.max(0)[:, None]))  # [B, side]
    rectangle = inside[0][:, :, None] & inside[1][:, None, :]
    whole = jax.random.bernoulli(of_whole, 1 / 8, (batch, 1, 1))
    return (rectangle | whole).astype(jnp.float32)[..., None]
