"""CLIP image embedding -> picture. Reference: diffusers' KandinskyV22Pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from kandinsky_jax.checkpoint import hub
from kandinsky_jax.diffusion.rng import Generator
from kandinsky_jax.pipelines import checks
from kandinsky_jax.pipelines.base import Callback, OldCallback
from kandinsky_jax.pipelines.decoder import DecoderPipeline
from kandinsky_jax.pipelines.outputs import ImagePipelineOutput


class KandinskyV22Pipeline(DecoderPipeline):
    """Generates pictures from image embeddings.

    Args:
        unet, scheduler, movq: as in diffusers.
    """

    REPOSITORY: ClassVar[str] = hub.DECODER

    def __call__(
        self,
        image_embeds: Any,
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
        guidance_interval: tuple[float, float] | None = None,
        callback: OldCallback | None = None,
        callback_steps: int = 1,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate pictures.

        Args:
            image_embeds: `[B, D]` or a list of such, from the prior.
            negative_image_embeds: as many, to be guided away from; None only where guidance is off.
            height, width: in pixels, at least 64; rounded up to a multiple of 64.
            num_inference_steps: at least 1.
            guidance_scale: guidance is on above 1.
            num_images_per_prompt: pictures per embedding, neighbours in the result.
            generator: see `kandinsky_jax.diffusion.rng.noise_source`.
            latents: initial noise, `[B, 4, height/8, width/8]`.
            output_type: "pil", "np" (float32 `[B, H, W, 3]` in 0..1), "pt" (`[B, 3, H, W]` in 0..1) or "latent"
                (`[B, 4, H/8, W/8]`).
            return_dict: False for a plain tuple.
            callback_on_step_end: `(pipe, step, timestep, tensors) -> tensors` after each step, on NumPy arrays.
            callback_on_step_end_tensor_inputs: which tensors: latents, image_embeds, negative_image_embeds.
            guidance_interval: apply guidance only between two fractions of this call's steps, such as (0.4, 1); a step
                outside costs half as much. None, as (0, 1), is guidance at every step.
            callback: `(step, timestep, latents)`, diffusers' older form, called every `callback_steps` steps.
        Raises:
            ValueError, TypeError: for wrong arguments, before anything is compiled.
        """
        return self._call(
            image_embeds,
            negative_image_embeds,
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
