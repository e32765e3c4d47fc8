"""Picture -> latents, noised as far as `strength` says -> the rest of the decoder's steps -> picture.

Reference: diffusers' KandinskyV22Img2ImgPipeline and KandinskyV22Img2ImgCombinedPipeline.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import numpy as np

from kandinsky_jax.checkpoint import hub
from kandinsky_jax.pipelines.combined import CombinedPipeline
from kandinsky_jax.pipelines.decoder import DecoderInputs, DecoderPipeline, DecoderRequest
from kandinsky_jax.pipelines.options import (
    CombinedExtensionOptions,
    CombinedNoiseOptions,
    CombinedStepOptions,
    DecoderOutputOptions,
    DecoderStepOptions,
    ExtensionOptions,
    GeneratorOption,
    ImageEmbedsOption,
    ImageOption,
    ImagesPerPromptOption,
    NegativeImageEmbedsOption,
    OldCallbackOption,
    PictureOutputOption,
    PriorStepEndOption,
    PromptOption,
    ReturnDictOption,
    StepEndOption,
    StrengthOption,
    takes,
)
from kandinsky_jax.pipelines.outputs import ImageResult
from kandinsky_jax.schedulers.base import linear_combination


class Img2ImgBase(DecoderPipeline):
    """Base of the decoders that start from a picture's latents."""

    def _inputs(
        self, request: DecoderRequest, noise: jax.Array, cond: np.ndarray, uncond: np.ndarray | None
    ) -> DecoderInputs:
        assert request.image is not None
        start = linear_combination(request.schedule.levels[:1], self._encode(request.image), noise)
        return DecoderInputs(start, cond, uncond, request.hint)


@dataclass(frozen=True)
class Img2ImgOptions(
    OldCallbackOption,
    ExtensionOptions,
    DecoderOutputOptions,
    GeneratorOption,
    ImagesPerPromptOption,
    StrengthOption,
    DecoderStepOptions,
    NegativeImageEmbedsOption,
    ImageOption,
    ImageEmbedsOption,
):
    """Options of `KandinskyV22Img2ImgPipeline`, from the last to the first."""


class KandinskyV22Img2ImgPipeline(Img2ImgBase):
    """Generates variations of pictures, guided by image embeddings.

    Args:
        unet, scheduler, movq: as in diffusers.
    """

    REPOSITORY: ClassVar[str] = hub.DECODER

    @takes(Img2ImgOptions)
    def __call__(self, options: Img2ImgOptions) -> ImageResult:
        """Generate variations of pictures.

        Raises:
            ValueError, TypeError: for wrong arguments, before anything is compiled.
        """
        return self._call(options)


@dataclass(frozen=True)
class Img2ImgCombinedOptions(
    CombinedExtensionOptions,
    StepEndOption,
    PriorStepEndOption,
    ReturnDictOption,
    OldCallbackOption,
    PictureOutputOption,
    CombinedNoiseOptions,
    StrengthOption,
    CombinedStepOptions,
    ImageOption,
    PromptOption,
):
    """Options of `KandinskyV22Img2ImgCombinedPipeline`, from the last to the first."""


class KandinskyV22Img2ImgCombinedPipeline(CombinedPipeline):
    """Generates variations of pictures, guided by prompts. Components: see `CombinedPipeline`."""

    REPOSITORY: ClassVar[str] = hub.DECODER
    DECODER: ClassVar[type[DecoderPipeline]] = KandinskyV22Img2ImgPipeline
    OPTIONS = Img2ImgCombinedOptions

    @takes(Img2ImgCombinedOptions)
    def __call__(self, options: Img2ImgCombinedOptions) -> ImageResult:
        """Generate variations of pictures.

        Raises:
            ValueError, TypeError: for wrong arguments, before anything is compiled.
        """
        return self._start(options).result()
