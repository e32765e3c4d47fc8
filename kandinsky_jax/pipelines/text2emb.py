"""prompt -> CLIP image embedding. Reference: diffusers' KandinskyV22PriorPipeline."""

from __future__ import annotations

from kandinsky_jax.pipelines.options import PriorOptions, takes
from kandinsky_jax.pipelines.outputs import PriorResult
from kandinsky_jax.pipelines.prior import PriorPipeline


class KandinskyV22PriorPipeline(PriorPipeline):
    """Generates CLIP image embeddings from prompts.

    Args:
        prior, image_encoder, text_encoder, tokenizer, scheduler, image_processor: as in diffusers.
    """

    @takes(PriorOptions)
    def __call__(self, options: PriorOptions) -> PriorResult:
        """Generate image embeddings.

        Returns:
            image_embeds and negative_image_embeds, float32 `[B, D]`. Without a negative prompt the latter is the vision
            tower's embedding of zeros.
        """
        return self._call(options)
