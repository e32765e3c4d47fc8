"""prompt -> CLIP image embedding. Reference: diffusers' KandinskyV22PriorPipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kandinsky_jax.diffusion.rng import Generator
from kandinsky_jax.pipelines.base import Callback
from kandinsky_jax.pipelines.outputs import KandinskyPriorPipelineOutput
from kandinsky_jax.pipelines.prior import PriorPipeline


class KandinskyV22PriorPipeline(PriorPipeline):
    """Generates CLIP image embeddings from prompts.

    Args:
        prior, image_encoder, text_encoder, tokenizer, scheduler, image_processor: as in diffusers.
    """

    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        num_inference_steps: int = 25,
        generator: Generator = None,
        latents: Any = None,
        guidance_scale: float = 4.0,
        output_type: str = "pt",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = ("latents",),
    ) -> KandinskyPriorPipelineOutput | tuple[Any, Any]:
        """Generate image embeddings.

        Args:
            prompt: one or more, at most 77 tokens each (longer ones are cut, with a warning).
            negative_prompt: one for each prompt, or one string for all. The prior generates its embedding too, from
                which the decoder is guided away.
            num_images_per_prompt: embeddings per prompt, neighbours in the result.
            num_inference_steps: at least 2.
            generator: see `kandinsky_jax.diffusion.rng.noise_source`.
            latents: initial noise, `[B, D]`; B doubles with negative prompts.
            guidance_scale: guidance is on above 1.
            output_type: "pt" for JAX arrays, "np" for NumPy.
            return_dict: False for a plain tuple.
            callback_on_step_end: `(pipe, step, timestep, tensors) -> tensors` after each step, on NumPy arrays.
            callback_on_step_end_tensor_inputs: which tensors: latents, prompt_embeds, text_encoder_hidden_states,
                text_mask.
        Returns:
            image_embeds and negative_image_embeds, float32 `[B, D]`. Without a negative prompt the latter is the vision
            tower's embedding of zeros.
        """
        return self._call(
            prompt,
            negative_prompt,
            output_type,
            return_dict,
            num_images_per_prompt=num_images_per_prompt,
            num_inference_steps=num_inference_steps,
            generator=generator,
            latents=latents,
            guidance_scale=guidance_scale,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
