"""Picture and mask -> latents, the kept part beside them at every step and put back after it -> picture.

Reference: diffusers' KandinskyV22InpaintPipeline.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from kandinsky_jax import hub
from kandinsky_jax.noise import Generator
from kandinsky_jax.pipelines import checks
from kandinsky_jax.pipelines.base import Callback, OldCallback
from kandinsky_jax.pipelines.decoder import DecoderPipeline, Order, Scene
from kandinsky_jax.pipelines.outputs import ImagePipelineOutput
from kandinsky_jax.sampling import Blend, Lane, Network
from kandinsky_jax.schedulers import ROWS


@dataclass(frozen=True, kw_only=True)
class Hole(Scene):
    """A picture with a part to repaint."""

    blend: Blend
    doubled: bool  # whether guidance doubles the rows

    def tensors(self) -> dict[str, np.ndarray]:
        keep = np.asarray(self.blend.keep).transpose(0, 3, 1, 2)  # [B, 1, h, w]
        masked = np.asarray(self.blend.picture).transpose(0, 3, 1, 2) * keep  # [B, 4, h, w]
        rows = 1 + self.doubled
        return {"masked_image": np.tile(masked, (rows, 1, 1, 1)), "mask_image": np.tile(keep, (rows, 1, 1, 1))}

    def lane(self, network: Network, params: Any, tensors: Mapping[str, Any], guided: bool) -> Lane:
        images, embeds = len(self.start), self.embeds(tensors, guided)
        masked, keep = (
            checks.halves(tensors[name], name, images).astype(np.float32).transpose(0, 2, 3, 1)
            for name in ("masked_image", "mask_image")
        )
        # A callback that turns guidance on or off may have halved or doubled some of the tensors, and not the others.
        both = [np.tile(x, (2, 1, 1, 1))[-len(embeds) :] for x in (masked, keep)]
        condition = self.condition(network, params, embeds, channels=np.concatenate(both, axis=-1))
        return Lane(condition, self._blend(keep))

    def finish(self, sample: jax.Array, tensors: Mapping[str, Any]) -> jax.Array:
        # The last step has done this already, but a callback may have changed the sample since.
        keep = np.asarray(tensors["mask_image"], np.float32).transpose(0, 2, 3, 1)
        return _put_back(self._blend(keep), np.int32(ROWS - 1), sample)

    def _blend(self, keep: np.ndarray) -> Blend:
        return self.blend._replace(keep=jnp.asarray(keep[: len(self.blend.keep)]))


@jax.jit
def _put_back(blend: Blend, row: jax.Array, sample: jax.Array) -> jax.Array:
    return blend(row, sample)


class KandinskyV22InpaintPipeline(DecoderPipeline):
    """Repaints a part of pictures after image embeddings.

    Args:
        unet, scheduler, movq: as in diffusers.
    """

    REPOSITORY: ClassVar[str] = hub.INPAINT
    _callback_tensor_inputs = (*DecoderPipeline._callback_tensor_inputs, "masked_image", "mask_image")

    def __call__(
        self,
        image_embeds: Any,
        image: Any,
        mask_image: Any,
        negative_image_embeds: Any,
        height: int = 512,
        width: int = 512,
        num_inference_steps: int = 100,
        guidance_scale: float = 4.0,
        num_images_per_prompt: int = 1,
        generator: Generator = None,
        latents: Any = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = ("latents",),
        paste_back: bool = False,
        guidance_interval: tuple[float, float] | None = None,
        callback: OldCallback | None = None,
        callback_steps: int = 1,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Repaint a part of pictures.

        Args:
            image: one for all, one per embedding, or one per picture drawn; see `kandinsky_jax.images`.
            mask_image: as many; white, 1 or true is repainted. Latents beside the mask's border are repainted too.
            callback_on_step_end_tensor_inputs: also masked_image and mask_image (1: kept).
            paste_back: put the pixels of `image` back wherever the mask is black. Without it, they have gone through
                MoVQ's encoder and decoder.
            the others: see `KandinskyV22Pipeline`.
        """
        return self._call(
            image_embeds,
            negative_image_embeds,
            image=image,
            mask_image=mask_image,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            latents=latents,
            output_type=output_type,
            return_dict=return_dict,
            callback_on_step_end=checks.old_callback(callback, callback_steps, callback_on_step_end),
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            paste_back=paste_back,
        )

    def _scene(self, order: Order, noise: jax.Array) -> Hole:
        assert order.image is not None
        assert order.mask is not None
        keep = kept_latents(order.mask, order.h, order.w)
        for i in np.flatnonzero(keep.all(axis=(1, 2)) & order.mask.any(axis=(1, 2))):
            warnings.warn(
                f"mask_image of image {i} repaints nothing: its white parts are smaller than a latent, which has "
                f"{self.movq.config.scale_factor} x {self.movq.config.scale_factor} pixels; widen them",
                stacklevel=2,
            )
        blend = Blend(
            picture=self._encode(order.image),
            noise=noise,
            keep=jnp.asarray(keep[..., None]),
            levels=jnp.asarray(self._levels(order)),
        )
        return Hole(start=noise * order.schedule.init_noise_sigma, blend=blend, doubled=order.scale > 1)

    def _levels(self, order: Order) -> np.ndarray:
        """The kept part after each row: as noisy as the next step wants its sample, clean after the last."""
        levels = np.tile(np.array([1, 0], np.float32), (ROWS, 1))
        later = order.schedule.levels[1:]
        levels[: len(later)] = later
        return levels


def kept_latents(mask: np.ndarray, h: int, w: int) -> np.ndarray:
    """Which latents are kept, float32 `[B, h, w]`, for masks `[B, H, W]` that are true where the picture is repainted.

    As the reference: of each latent's pixels the first one counts, and a repainted latent takes six neighbours along:
    up, left, up-left, down, right, down-right (not the two others on the diagonals).
    """
    _, height, width = mask.shape
    hole = mask[:, np.arange(h) * height // h][:, :, np.arange(w) * width // w]  # [B, h, w]
    wide = np.pad(hole, ((0, 0), (1, 1), (1, 1)))
    grown = hole.copy()
    for down, right in ((0, 1), (1, 0), (0, 0), (2, 1), (1, 2), (2, 2)):
        grown |= wide[:, down : down + h, right : right + w]
    return (~grown).astype(np.float32)
