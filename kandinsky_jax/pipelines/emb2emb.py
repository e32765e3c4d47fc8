"""prompt and picture -> CLIP image embedding. Reference: diffusers' KandinskyV22PriorEmb2EmbPipeline."""

from __future__ import annotations

from dataclasses import dataclass

from kandinsky_jax.pipelines.options import (
    EmbedsOutputOption,
    GeneratorOption,
    GuidanceScaleOption,
    ImagesPerPromptOption,
    NegativePromptOption,
    PriorExtensionOptions,
    PriorImageOption,
    PriorStepsOption,
    PromptOption,
    ReturnDictOption,
    StepEndOption,
    StrengthOption,
    takes,
)
from kandinsky_jax.pipelines.outputs import PriorResult
from kandinsky_jax.pipelines.prior import PriorPipeline


@dataclass(frozen=True)
class Emb2EmbOptions(
    PriorExtensionOptions,
    StepEndOption,
    ReturnDictOption,
    EmbedsOutputOption,
    GuidanceScaleOption,
    GeneratorOption,
    PriorStepsOption,
    ImagesPerPromptOption,
    NegativePromptOption,
    StrengthOption,
    PriorImageOption,
    PromptOption,
):
    """Options of `KandinskyV22PriorEmb2EmbPipeline`, from the last to the first."""


class KandinskyV22PriorEmb2EmbPipeline(PriorPipeline):
    """Moves a picture's CLIP image embedding towards a prompt.

    Args:
        prior, image_encoder, text_encoder, tokenizer, scheduler, image_processor: as in diffusers.
    """

    @takes(Emb2EmbOptions)
    def __call__(self, options: Emb2EmbOptions) -> PriorResult:
        """Generate image embeddings, starting from that of a picture.

        Returns:
            image_embeds and negative_image_embeds, float32 `[B, D]`, as `KandinskyV22PriorPipeline` does.
        """
        if options.image is None:
            raise TypeError("image is None; needed is a picture or an image embedding to start from")
        return self._call(options)
