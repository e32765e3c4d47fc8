"""Picture -> MoVQ latents, noised as far as `strength` says -> the rest of the decoder loop -> picture.

SDEdit (Meng et al. 2021, arXiv 2108.01073). Reference: diffusers' KandinskyV22Img2ImgPipeline.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import jax

from kandinsky_jax.checkpoint import hub
from kandinsky_jax.diffusion.rng import Generator
from kandinsky_jax.pipelines import checks
from kandinsky_jax.pipelines.base import Callback, OldCallback
from kandinsky_jax.pipelines.decoder import DecoderInputs, DecoderPipeline, DecoderRequest
from kandinsky_jax.pipelines.outputs import ImagePipelineOutput
from kandinsky_jax.schedulers.base import linear_combination


class Img2ImgBase(DecoderPipeline):
    """Base of the decoders that start from a picture's latents."""

    def _inputs(self, request: DecoderRequest, noise: jax.Array) -> DecoderInputs:
        assert request.image is not None
        picture = self._encode(request.image)
        return DecoderInputs(linear_combination(request.schedule.levels[:1], picture, noise), request.hint)


class KandinskyV22Img2ImgPipeline(Img2ImgBase):
    """Generates variations of pictures, guided by image embeddings.

    Args:
        unet, scheduler, movq: as in diffusers.
    """

    REPOSITORY: ClassVar[str] = hub.DECODER

    def __call__(
        self,
        image_embeds: Any,
        image: Any,
        negative_image_embeds: Any,
        height: int = 512,
        width: int = 512,
        num_inference_steps: int = 100,
        guidance_scale: float = 4.0,
        strength: float = 0.3,
        num_images_per_prompt: int = 1,
        generator: Generator = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = ("latents",),
        guidance_interval: tuple[float, float] | None = None,
        callback: OldCallback | None = None,
        callback_steps: int = 1,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate variations of pictures.

        Args:
            image: one for all, one per embedding, or one per generated picture; see `kandinsky_jax.images`.
            strength: the share of the steps that is run, above 0, at most 1; 1 keeps nothing of the picture.
            the others: see `KandinskyV22Pipeline`.
        """
        return self._call(
            image_embeds,
            negative_image_embeds,
            image=image,
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
