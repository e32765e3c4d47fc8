"""prompt and depth hint -> picture: a prior and a controlnet decoder in one call.

diffusers has no combined pipelines for controlnets; these are modelled on its other combined pipelines.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from kandinsky_jax.checkpoint import hub
from kandinsky_jax.diffusion.rng import Generator
from kandinsky_jax.pipelines.base import Callback
from kandinsky_jax.pipelines.combined import CombinedPipeline
from kandinsky_jax.pipelines.controlnet import (
    KandinskyV22ControlnetImg2ImgPipeline,
    KandinskyV22ControlnetPipeline,
)
from kandinsky_jax.pipelines.decoder import DecoderPipeline
from kandinsky_jax.pipelines.outputs import ImagePipelineOutput


class KandinskyV22ControlnetCombinedPipeline(CombinedPipeline):
    """Generates pictures from prompts, with a layout from depth hints. Components: see `CombinedPipeline`."""

    REPOSITORY: ClassVar[str] = hub.CONTROLNET
    DECODER: ClassVar[type[DecoderPipeline]] = KandinskyV22ControlnetPipeline

    def __call__(
        self,
        prompt: str | Sequence[str],
        hint: Any,
        negative_prompt: str | Sequence[str] | None = None,
        num_inference_steps: int = 100,
        guidance_scale: float = 4.0,
        num_images_per_prompt: int = 1,
        height: int = 512,
        width: int = 512,
        prior_guidance_scale: float = 4.0,
        prior_num_inference_steps: int = 25,
        generator: Generator = None,
        latents: Any = None,
        output_type: str = "pil",
        return_dict: bool = True,
        prior_callback_on_step_end: Callback | None = None,
        prior_callback_on_step_end_tensor_inputs: Sequence[str] | None = ("latents",),
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = ("latents",),
        guidance_interval: tuple[float, float] | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate pictures.

        Args:
            hint: see `KandinskyV22ControlnetPipeline`; one for all, one per prompt, or one per picture.
            the others: see `KandinskyV22CombinedPipeline`.
        """
        return self.generate(
            prompt,
            hint=hint,
            negative_prompt=negative_prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            num_images_per_prompt=num_images_per_prompt,
            height=height,
            width=width,
            prior_guidance_scale=prior_guidance_scale,
            prior_num_inference_steps=prior_num_inference_steps,
            generator=generator,
            latents=latents,
            output_type=output_type,
            return_dict=return_dict,
            prior_callback_on_step_end=prior_callback_on_step_end,
            prior_callback_on_step_end_tensor_inputs=prior_callback_on_step_end_tensor_inputs,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        ).result()


class KandinskyV22ControlnetImg2ImgCombinedPipeline(CombinedPipeline):
    """Generates variations of pictures, guided by prompts and depth hints. Components: see `CombinedPipeline`."""

    REPOSITORY: ClassVar[str] = hub.CONTROLNET
    DECODER: ClassVar[type[DecoderPipeline]] = KandinskyV22ControlnetImg2ImgPipeline

    def __call__(
        self,
        prompt: str | Sequence[str],
        image: Any,
        hint: Any,
        negative_prompt: str | Sequence[str] | None = None,
        num_inference_steps: int = 100,
        guidance_scale: float = 4.0,
        strength: float = 0.3,
        num_images_per_prompt: int = 1,
        height: int = 512,
        width: int = 512,
        prior_guidance_scale: float = 4.0,
        prior_num_inference_steps: int = 25,
        generator: Generator = None,
        latents: Any = None,
        output_type: str = "pil",
        return_dict: bool = True,
        prior_callback_on_step_end: Callback | None = None,
        prior_callback_on_step_end_tensor_inputs: Sequence[str] | None = ("latents",),
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = ("latents",),
        guidance_interval: tuple[float, float] | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate variations of pictures.

        Args:
            image, strength: see `KandinskyV22Img2ImgPipeline`.
            hint: see `KandinskyV22ControlnetPipeline`.
            the others: see `KandinskyV22CombinedPipeline`.
        """
        return self.generate(
            prompt,
            image=image,
            hint=hint,
            negative_prompt=negative_prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            strength=strength,
            num_images_per_prompt=num_images_per_prompt,
            height=height,
            width=width,
            prior_guidance_scale=prior_guidance_scale,
            prior_num_inference_steps=prior_num_inference_steps,
            generator=generator,
            latents=latents,
            output_type=output_type,
            return_dict=return_dict,
            prior_callback_on_step_end=prior_callback_on_step_end,
            prior_callback_on_step_end_tensor_inputs=prior_callback_on_step_end_tensor_inputs,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        ).result()
