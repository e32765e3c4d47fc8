"""prompt and picture -> CLIP image embedding. Reference: diffusers' KandinskyV22PriorEmb2EmbPipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kandinsky_jax.diffusion.rng import Generator
from kandinsky_jax.pipelines.base import Callback
from kandinsky_jax.pipelines.outputs import KandinskyPriorPipelineOutput
from kandinsky_jax.pipelines.prior import PriorPipeline


class KandinskyV22PriorEmb2EmbPipeline(PriorPipeline):
    """Moves a picture's CLIP image embedding towards a prompt.

    Args:
        prior, image_encoder, text_encoder, tokenizer, scheduler, image_processor: as in diffusers.
    """

    def __call__(
        self,
        prompt: str | Sequence[str],
        image: Any,
        strength: float = 0.3,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        num_inference_steps: int = 25,
        generator: Generator = None,
        guidance_scale: float = 4.0,
        output_type: str = "pt",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = ("latents",),
    ) -> KandinskyPriorPipelineOutput | tuple[Any, Any]:
        """Generate image embeddings, starting from that of a picture.

        Args:
            image: one for all, one per prompt, or one per generated embedding: pictures (see `kandinsky_jax.images`),
                image embeddings `[B, D]`, or `[B, 3, S, S]`, which goes into the vision tower as it is.
            strength: the share of the steps that is run, above 0, at most 1.
            the others: see `KandinskyV22PriorPipeline`. The embedding of a negative prompt starts from the picture's
                too.
        """
        if image is None:
            raise TypeError("image is None; needed is a picture or an image embedding to start from")
        return self._call(
            prompt,
            negative_prompt,
            output_type,
            return_dict,
            image=image,
            strength=strength,
            num_images_per_prompt=num_images_per_prompt,
            num_inference_steps=num_inference_steps,
            generator=generator,
            guidance_scale=guidance_scale,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
