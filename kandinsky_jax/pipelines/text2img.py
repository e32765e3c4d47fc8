"""CLIP image embedding -> picture, and prompt -> picture.

Reference: diffusers' KandinskyV22Pipeline and KandinskyV22CombinedPipeline.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kandinsky_jax.checkpoint import hub
from kandinsky_jax.pipelines.combined import CombinedPipeline
from kandinsky_jax.pipelines.decoder import DecoderPipeline
from kandinsky_jax.pipelines.options import (
    CombinedExtensionOptions,
    CombinedNoiseOptions,
    CombinedStepOptions,
    DecoderNoiseOptions,
    DecoderOutputOptions,
    DecoderStepOptions,
    ExtensionOptions,
    ImageEmbedsOption,
    NegativeImageEmbedsOption,
    OldCallbackOption,
    PictureOutputOption,
    PriorStepEndOption,
    PromptOption,
    ReturnDictOption,
    StepEndOption,
    takes,
)
from kandinsky_jax.pipelines.outputs import ImageResult


@dataclass(frozen=True)
class DecoderOptions(
    OldCallbackOption,
    ExtensionOptions,
    DecoderOutputOptions,
    DecoderNoiseOptions,
    DecoderStepOptions,
    NegativeImageEmbedsOption,
    ImageEmbedsOption,
):
    """Options of `KandinskyV22Pipeline`, from the last to the first."""


class KandinskyV22Pipeline(DecoderPipeline):
    """Generates pictures from image embeddings.

    Args:
        unet, scheduler, movq: as in diffusers.
    """

    REPOSITORY: ClassVar[str] = hub.DECODER

    @takes(DecoderOptions)
    def __call__(self, options: DecoderOptions) -> ImageResult:
        """Generate pictures.

        Raises:
            ValueError, TypeError: for wrong arguments, before anything is compiled.
        """
        return self._call(options)


@dataclass(frozen=True)
class CombinedOptions(
    CombinedExtensionOptions,
    StepEndOption,
    PriorStepEndOption,
    ReturnDictOption,
    OldCallbackOption,
    PictureOutputOption,
    CombinedNoiseOptions,
    CombinedStepOptions,
    PromptOption,
):
    """Options of `KandinskyV22CombinedPipeline`, from the last to the first."""


class KandinskyV22CombinedPipeline(CombinedPipeline):
    """Generates pictures from prompts. Components: see `CombinedPipeline`."""

    REPOSITORY: ClassVar[str] = hub.DECODER
    DECODER: ClassVar[type[DecoderPipeline]] = KandinskyV22Pipeline
    OPTIONS = CombinedOptions

    @takes(CombinedOptions)
    def __call__(self, options: CombinedOptions) -> ImageResult:
        """Generate pictures.

        Raises:
            ValueError, TypeError: for wrong arguments, before anything is compiled.
        """
        return self._start(options).result()
