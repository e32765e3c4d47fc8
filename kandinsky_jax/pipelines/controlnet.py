"""Depth hint -> extra input channels of the UNet at every step -> picture, starting from noise or from a picture.

Reference: diffusers' KandinskyV22ControlnetPipeline and KandinskyV22ControlnetImg2ImgPipeline.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from kandinsky_jax.checkpoint import hub
from kandinsky_jax.diffusion.rng import Generator
from kandinsky_jax.pipelines import checks
from kandinsky_jax.pipelines.base import Callback, OldCallback
from kandinsky_jax.pipelines.decoder import DecoderPipeline
from kandinsky_jax.pipelines.img2img import Img2ImgBase
from kandinsky_jax.pipelines.outputs import ImagePipelineOutput


class KandinskyV22ControlnetPipeline(DecoderPipeline):
    """Generates pictures from image embeddings, with a layout from depth hints.

    Args:
        unet, scheduler, movq: as in diffusers.
    """

    REPOSITORY: ClassVar[str] = hub.CONTROLNET

    def __call__(
        self,
        image_embeds: Any,
        negative_image_embeds: Any,
        hint: Any,
        height: int = 512,
        width: int = 512,
        num_inference_steps: int = 100,
        guidance_scale: float = 4.0,
        num_images_per_prompt: int = 1,
        generator: Generator = None,
        latents: Any = None,
        output_type: str = "pil",
        callback: OldCallback | None = None,
        callback_steps: int = 1,
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = ("latents",),
        guidance_interval: tuple[float, float] | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate pictures.

        Args:
            hint: `[3, H, W]` in 0..1, or a depth map of any size; see `kandinsky_jax.images.hints`. One for all, one
                per embedding, or one per generated picture.
            the others: see `KandinskyV22Pipeline`.
        """
        return self._call(
            image_embeds,
            negative_image_embeds,
            hint=hint,
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
        )


class KandinskyV22ControlnetImg2ImgPipeline(Img2ImgBase):
    """Generates variations of pictures from image embeddings, with a layout from depth hints.

    Args:
        unet, scheduler, movq: as in diffusers.
    """

    REPOSITORY: ClassVar[str] = hub.CONTROLNET

    def __call__(
        self,
        image_embeds: Any,
        image: Any,
        negative_image_embeds: Any,
        hint: Any,
        height: int = 512,
        width: int = 512,
        num_inference_steps: int = 100,
        guidance_scale: float = 4.0,
        strength: float = 0.3,
        num_images_per_prompt: int = 1,
        generator: Generator = None,
        output_type: str = "pil",
        callback: OldCallback | None = None,
        callback_steps: int = 1,
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = ("latents",),
        guidance_interval: tuple[float, float] | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate variations of pictures.

        Args:
            image, strength: see `KandinskyV22Img2ImgPipeline`.
            hint, callback, callback_steps: see `KandinskyV22ControlnetPipeline`.
            the others: see `KandinskyV22Pipeline`.
        """
        return self._call(
            image_embeds,
            negative_image_embeds,
            image=image,
            hint=hint,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            strength=strength,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            output_type=output_type,
            return_dict=return_dict,
            callback_on_step_end=checks.old_callback(callback, callback_steps, callback_on_step_end),
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
