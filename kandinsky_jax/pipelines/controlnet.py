"""Depth hint -> extra input channels of the UNet at every step -> picture, starting from noise or from a picture.

Reference: diffusers' KandinskyV22ControlnetPipeline and KandinskyV22ControlnetImg2ImgPipeline. diffusers has no
combined pipelines for controlnets; these are modelled on its other combined pipelines.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kandinsky_jax.checkpoint import hub
from kandinsky_jax.pipelines.combined import CombinedPipeline
from kandinsky_jax.pipelines.decoder import DecoderPipeline
from kandinsky_jax.pipelines.img2img import Img2ImgBase
from kandinsky_jax.pipelines.options import (
    CombinedExtensionOptions,
    CombinedNoiseOptions,
    CombinedOutputOptions,
    CombinedStepOptions,
    DecoderNoiseOptions,
    DecoderStepOptions,
    ExtensionOptions,
    GeneratorOption,
    HintOption,
    ImageEmbedsOption,
    ImageOption,
    ImagesPerPromptOption,
    NegativeImageEmbedsOption,
    OldCallbackOption,
    PictureOutputOption,
    PromptOption,
    ReturnDictOption,
    StepEndOption,
    StrengthOption,
    takes,
)
from kandinsky_jax.pipelines.outputs import ImageResult


@dataclass(frozen=True)
class ControlnetOptions(
    ExtensionOptions,
    StepEndOption,
    ReturnDictOption,
    OldCallbackOption,
    PictureOutputOption,
    DecoderNoiseOptions,
    DecoderStepOptions,
    HintOption,
    NegativeImageEmbedsOption,
    ImageEmbedsOption,
):
    """Options of `KandinskyV22ControlnetPipeline`, from the last to the first."""


class KandinskyV22ControlnetPipeline(DecoderPipeline):
    """Generates pictures from image embeddings, with a layout from depth hints.

    Args:
        unet, scheduler, movq: as in diffusers.
    """

    REPOSITORY: ClassVar[str] = hub.CONTROLNET

    @takes(ControlnetOptions)
    def __call__(self, options: ControlnetOptions) -> ImageResult:
        """Generate pictures with a layout.

        Raises:
            ValueError, TypeError: for wrong arguments, before anything is compiled.
        """
        return self._call(options)


@dataclass(frozen=True)
class ControlnetImg2ImgOptions(
    ExtensionOptions,
    StepEndOption,
    ReturnDictOption,
    OldCallbackOption,
    PictureOutputOption,
    GeneratorOption,
    ImagesPerPromptOption,
    StrengthOption,
    DecoderStepOptions,
    HintOption,
    NegativeImageEmbedsOption,
    ImageOption,
    ImageEmbedsOption,
):
    """Options of `KandinskyV22ControlnetImg2ImgPipeline`, from the last to the first."""


class KandinskyV22ControlnetImg2ImgPipeline(Img2ImgBase):
    """Generates variations of pictures from image embeddings, with a layout from depth hints.

    Args:
        unet, scheduler, movq: as in diffusers.
    """

    REPOSITORY: ClassVar[str] = hub.CONTROLNET

    @takes(ControlnetImg2ImgOptions)
    def __call__(self, options: ControlnetImg2ImgOptions) -> ImageResult:
        """Generate variations of pictures with a layout.

        Raises:
            ValueError, TypeError: for wrong arguments, before anything is compiled.
        """
        return self._call(options)


@dataclass(frozen=True)
class ControlnetCombinedOptions(
    OldCallbackOption,
    CombinedExtensionOptions,
    CombinedOutputOptions,
    CombinedNoiseOptions,
    CombinedStepOptions,
    HintOption,
    PromptOption,
):
    """Options of `KandinskyV22ControlnetCombinedPipeline`, from the last to the first."""


class KandinskyV22ControlnetCombinedPipeline(CombinedPipeline):
    """Generates pictures from prompts, with a layout from depth hints. Components: see `CombinedPipeline`."""

    REPOSITORY: ClassVar[str] = hub.CONTROLNET
    DECODER: ClassVar[type[DecoderPipeline]] = KandinskyV22ControlnetPipeline
    OPTIONS = ControlnetCombinedOptions

    @takes(ControlnetCombinedOptions)
    def __call__(self, options: ControlnetCombinedOptions) -> ImageResult:
        """Generate pictures with a layout.

        Raises:
            ValueError, TypeError: for wrong arguments, before anything is compiled.
        """
        return self._start(options).result()


@dataclass(frozen=True)
class ControlnetImg2ImgCombinedOptions(
    OldCallbackOption,
    CombinedExtensionOptions,
    CombinedOutputOptions,
    CombinedNoiseOptions,
    StrengthOption,
    CombinedStepOptions,
    HintOption,
    ImageOption,
    PromptOption,
):
    """Options of `KandinskyV22ControlnetImg2ImgCombinedPipeline`, from the last to the first."""


class KandinskyV22ControlnetImg2ImgCombinedPipeline(CombinedPipeline):
    """Generates variations of pictures, guided by prompts and depth hints. Components: see `CombinedPipeline`."""

    REPOSITORY: ClassVar[str] = hub.CONTROLNET
    DECODER: ClassVar[type[DecoderPipeline]] = KandinskyV22ControlnetImg2ImgPipeline
    OPTIONS = ControlnetImg2ImgCombinedOptions

    @takes(ControlnetImg2ImgCombinedOptions)
    def __call__(self, options: ControlnetImg2ImgCombinedOptions) -> ImageResult:
        """Generate variations of pictures with a layout.

        Raises:
            ValueError, TypeError: for wrong arguments, before anything is compiled.
        """
        return self._start(options).result()
