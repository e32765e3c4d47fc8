"""Picture and mask -> latents; every step sees the kept part, which is put back after it -> picture.

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

from kandinsky_jax.checkpoint import hub
from kandinsky_jax.diffusion import Network
from kandinsky_jax.diffusion.inpainting import Blend, latent_repaint_mask
from kandinsky_jax.diffusion.rng import Generator
from kandinsky_jax.pipelines import checks
from kandinsky_jax.pipelines.base import Callback, OldCallback
from kandinsky_jax.pipelines.decoder import DecoderInputs, DecoderPipeline, DecoderRequest
from kandinsky_jax.pipelines.denoising import LoopInputs
from kandinsky_jax.pipelines.outputs import ImagePipelineOutput
from kandinsky_jax.schedulers import MAX_STEPS


@dataclass(frozen=True, kw_only=True)
class InpaintInputs(DecoderInputs):
    """Inputs of an inpainting loop: the picture's latents, and which of them are kept."""

    blend: Blend
    doubled: bool  # whether guidance doubles the batch of the tensors that a callback sees

    def tensors(self) -> dict[str, np.ndarray]:
        keep_mask = np.asarray(self.blend.keep).transpose(0, 3, 1, 2)  # [B, 1, h, w]
        masked = np.asarray(self.blend.picture).transpose(0, 3, 1, 2) * keep_mask  # [B, 4, h, w]
        repeats = (2 if self.doubled else 1, 1, 1, 1)
        return {"masked_image": np.tile(masked, repeats), "mask_image": np.tile(keep_mask, repeats)}

    def loop_inputs(self, network: Network, params: Any, tensors: Mapping[str, Any], guided: bool) -> LoopInputs:
        images, embeds = len(self.start), self.embeds(tensors, guided)
        masked, keep_mask = (
            checks.callback_tensor(tensors[name], name, images).astype(np.float32).transpose(0, 2, 3, 1)
            for name in ("masked_image", "mask_image")
        )
        # A callback that turns guidance on or off may have resized the batch of some tensors and not of others.
        channels = [np.tile(x, (2, 1, 1, 1))[-len(embeds) :] for x in (masked, keep_mask)]
        condition = self.condition(network, params, embeds, channels=np.concatenate(channels, axis=-1))
        return LoopInputs(condition, self._blend(keep_mask))

    def finish(self, sample: jax.Array, tensors: Mapping[str, Any]) -> jax.Array:
        # The last step did this, but a callback may have changed the sample since.
        keep_mask = np.asarray(tensors["mask_image"], np.float32).transpose(0, 2, 3, 1)
        return _put_back(self._blend(keep_mask), np.int32(MAX_STEPS - 1), sample)

    def _blend(self, keep_mask: np.ndarray) -> Blend:
        return self.blend._replace(keep=jnp.asarray(keep_mask[: len(self.blend.keep)]))


@jax.jit
def _put_back(blend: Blend, row: jax.Array, sample: jax.Array) -> jax.Array:
    return blend(row, sample)


class KandinskyV22InpaintPipeline(DecoderPipeline):
    """Inpaints pictures, guided by image embeddings.

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
        """Repaint the masked part of pictures.

        Args:
            image: one for all, one per embedding, or one per generated picture; see `kandinsky_jax.images`.
            mask_image: one for all, or as many as pictures; white, 1 or true is repainted, and so are the latents next
                to the mask's border.
            callback_on_step_end_tensor_inputs: also masked_image and, as diffusers calls the keep mask (1 where the
                picture is kept), mask_image.
            paste_back: put the pixels of `image` back wherever the mask is black. Otherwise they are the result of
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

    def _inputs(self, request: DecoderRequest, noise: jax.Array) -> InpaintInputs:
        assert request.image is not None
        assert request.repaint_mask is not None
        repaint_mask = latent_repaint_mask(request.repaint_mask, request.h, request.w)
        for i in np.flatnonzero(~repaint_mask.any(axis=(1, 2)) & request.repaint_mask.any(axis=(1, 2))):
            warnings.warn(
                f"mask_image of image {i} repaints nothing: its white parts are smaller than a latent, which has "
                f"{self.movq.config.scale_factor} x {self.movq.config.scale_factor} pixels; widen them",
                stacklevel=2,
            )
        blend = Blend(
            picture=self._encode(request.image),
            noise=noise,
            keep=jnp.asarray((~repaint_mask).astype(np.float32)[..., None]),
            levels=jnp.asarray(self._levels(request)),
        )
        return InpaintInputs(start=noise * request.schedule.init_noise_sigma, blend=blend, doubled=request.scale > 1)

    def _levels(self, request: DecoderRequest) -> np.ndarray:
        """Return the kept part's signal and noise after each step: as the next step has them, clean after the last."""
        levels = np.tile(np.array([1, 0], np.float32), (MAX_STEPS, 1))
        later = request.schedule.levels[1:]
        levels[: len(later)] = later
        return levels
