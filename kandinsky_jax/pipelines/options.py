"""CallOptions of the pipelines' calls. Each is written once here; the options of a call are composed of them.

The fields of a dataclass come in the order of its bases from last to first. So the options of a call list their bases
from the call's last argument to its first, and `takes` turns a method that takes such an object into one that takes the
arguments, with their types, defaults and documentation:

    @dataclass(frozen=True)
    class BlurOptions(SeedOption, SizeOption, ImageOption):
        \"\"\"CallOptions of `BlurPipeline`.\"\"\"

    class BlurPipeline(DecoderPipeline):
        @takes(BlurOptions)
        def __call__(self, options: BlurOptions) -> ImageResult:
            ...

    pipe(image, height=128, generator=0)

Names, order and defaults are those of diffusers' pipelines; ours come after them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from kandinsky_jax.diffusion.guidance import Guider
from kandinsky_jax.diffusion.rng import Generator
from kandinsky_jax.pipelines.option_arguments import CallOptions as CallOptions
from kandinsky_jax.pipelines.option_arguments import check_arguments as check_arguments
from kandinsky_jax.pipelines.option_arguments import option_docs as option_docs
from kandinsky_jax.pipelines.option_arguments import takes as takes

Callback: TypeAlias = Callable[[Any, int, int, dict[str, Any]], dict[str, Any]]  # (pipe, step, timestep, tensors)
OldCallback: TypeAlias = Callable[[int, int, Any], None]  # (step, timestep, latents)


# What to generate -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PromptOption(CallOptions):
    """What to generate.

    Args:
        prompt: one or more, at most 77 tokens each (longer ones are cut, with a warning).
    """

    prompt: str | Sequence[str]


@dataclass(frozen=True)
class NegativePromptOption(CallOptions):
    """What to avoid.

    Args:
        negative_prompt: one for each prompt, or one string for all. The prior generates its embedding too, from which
            the decoder is guided away.
    """

    negative_prompt: str | Sequence[str] | None = None


@dataclass(frozen=True)
class ImageEmbedsOption(CallOptions):
    """What a decoder generates.

    Args:
        image_embeds: `[B, D]` or a list of such, from the prior.
    """

    image_embeds: object


@dataclass(frozen=True)
class NegativeImageEmbedsOption(CallOptions):
    """What a decoder avoids.

    Args:
        negative_image_embeds: as many as image_embeds, to be guided away from; None only where guidance is off.
    """

    negative_image_embeds: object


@dataclass(frozen=True)
class ImageOption(CallOptions):
    """The picture to start from.

    Args:
        image: one for all, one for each prompt or embedding, or one for each generated picture; see
            `kandinsky_jax.images`.
    """

    image: object


@dataclass(frozen=True)
class PriorImageOption(CallOptions):
    """The picture whose embedding a prior starts from.

    Args:
        image: one for all, one per prompt, or one per generated embedding: pictures (see `kandinsky_jax.images`), image
            embeddings `[B, D]`, or `[B, 3, S, S]`, which goes into the vision tower as it is. The embedding of a
            negative prompt starts from it too.
    """

    image: object


@dataclass(frozen=True)
class MaskImageOption(CallOptions):
    """What to repaint.

    Args:
        mask_image: one for all, or as many as pictures; white, 1 or true is repainted, and so are the latents next to
            the mask's border.
    """

    mask_image: object


@dataclass(frozen=True)
class HintOption(CallOptions):
    """The layout.

    Args:
        hint: `[3, H, W]` in 0..1, or a depth map of any size; see `kandinsky_jax.images.hints`. One for all, one for
            each prompt or embedding, or one for each generated picture.
    """

    hint: object


# How --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SizeOption(CallOptions):
    """Size of the pictures.

    Args:
        height, width: in pixels, at least 64; rounded up to a multiple of 64.
    """

    height: int = 512
    width: int = 512


@dataclass(frozen=True)
class DecoderStepsOption(CallOptions):
    """Steps of the decoder.

    Args:
        num_inference_steps: of the decoder, at least 1.
    """

    num_inference_steps: int = 100


@dataclass(frozen=True)
class PriorStepsOption(CallOptions):
    """Steps of a prior.

    Args:
        num_inference_steps: of the prior, at least 2.
    """

    num_inference_steps: int = 25


@dataclass(frozen=True)
class GuidanceScaleOption(CallOptions):
    """Classifier-free guidance.

    Args:
        guidance_scale: guidance is on above 1, but for other guiders than classifier-free guidance.
    """

    guidance_scale: float = 4.0


@dataclass(frozen=True)
class CombinedPriorOption(CallOptions):
    """Settings of the prior in a combined call.

    Args:
        prior_guidance_scale, prior_num_inference_steps: the prior's own.
    """

    prior_guidance_scale: float = 4.0
    prior_num_inference_steps: int = 25


@dataclass(frozen=True)
class StrengthOption(CallOptions):
    """How far to depart from the given picture.

    Args:
        strength: the share of the steps that is run, above 0, at most 1; 1 keeps nothing of the picture.
    """

    strength: float = 0.3


@dataclass(frozen=True)
class ImagesPerPromptOption(CallOptions):
    """Results per prompt.

    Args:
        num_images_per_prompt: results for each prompt or embedding, neighbours in the output.
    """

    num_images_per_prompt: int = 1


@dataclass(frozen=True)
class GeneratorOption(CallOptions):
    """Randomness.

    Args:
        generator: a seed, a key, or a `TorchGenerator` for PyTorch's numbers; see `diffusion.rng.noise_source`. In a
            combined call, a `TorchGenerator` continues from the prior to the decoder.
    """

    generator: Generator = None


@dataclass(frozen=True)
class DecoderLatentsOption(CallOptions):
    """Initial noise of the decoder.

    Args:
        latents: `[B, 4, height/8, width/8]`.
    """

    latents: object = None


@dataclass(frozen=True)
class PriorLatentsOption(CallOptions):
    """Initial noise of the prior.

    Args:
        latents: initial noise of the prior, `[B, D]`; B doubles with negative prompts.
    """

    latents: object = None


@dataclass(frozen=True)
class PasteBackOption(CallOptions):
    """Pixels of the kept part.

    Args:
        paste_back: put the pixels of `image` back wherever the mask is black. Otherwise they are the result of MoVQ's
            encoder and decoder.
    """

    paste_back: bool = False


@dataclass(frozen=True)
class GuidanceIntervalOption(CallOptions):
    """Guidance in some of the steps.

    Args:
        guidance_interval: apply guidance only between two fractions of this call's steps, such as (0.4, 1), with any
            guider; a step outside is the conditional evaluation alone. None, as (0, 1), is all steps. Source:
            Kynkaanniemi et al. 2024 (arXiv 2404.07724).
    """

    guidance_interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class GuiderOption(CallOptions):
    """The way to guide.

    Args:
        guider: None is classifier-free guidance by guidance_scale. A name, "rescaled-cfg", "apg", "cfg++", "pag" or
            "autoguidance:model=FOLDER", with settings such as "apg:eta=0,momentum=-0.5", takes guidance_scale too where
            it has no scale of its own. Or an object with the methods of `diffusion.Guider`, whose scale is its own.
    """

    guider: str | Guider | None = None


@dataclass(frozen=True)
class CombinedPriorGuidanceOption(CallOptions):
    """Ways to guide the prior in a combined call.

    Args:
        prior_guider, prior_guidance_interval: the prior's own.
    """

    prior_guider: str | Guider | None = None
    prior_guidance_interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class CacheIntervalOption(CallOptions):
    """Features of the UNet that are kept from step to step.

    Args:
        cache_interval: n; the deep blocks of the UNet run in one of n steps, and in the others their last output is
            used. 1 is every step. Source: DeepCache, Ma et al. 2024 (arXiv 2312.00858), whose first branch this is.
    """

    cache_interval: int = 1


# Results ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PictureOutputOption(CallOptions):
    """Form of the pictures.

    Args:
        output_type: "pil", "np" (float32 `[B, H, W, 3]` in 0..1), "pt" (`[B, 3, H, W]` in 0..1) or "latent"
            (`[B, 4, H/8, W/8]`).
    """

    output_type: str = "pil"


@dataclass(frozen=True)
class EmbedsOutputOption(CallOptions):
    """Form of the embeddings.

    Args:
        output_type: "pt" for JAX arrays, "np" for NumPy.
    """

    output_type: str = "pt"


@dataclass(frozen=True)
class ReturnDictOption(CallOptions):
    """Form of the result.

    Args:
        return_dict: False for a plain tuple.
    """

    return_dict: bool = True


# Callbacks --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepEndOption(CallOptions):
    """Callback after each step.

    Args:
        callback_on_step_end: `(pipe, step, timestep, tensors) -> tensors` after each step, on NumPy arrays.
        callback_on_step_end_tensor_inputs: which tensors, of those in the pipeline's `_callback_tensor_inputs`. For
            inpainting, mask_image is what diffusers calls the keep mask, 1 where the picture is kept.
    """

    callback_on_step_end: Callback | None = None
    callback_on_step_end_tensor_inputs: Sequence[str] | None = ("latents",)


@dataclass(frozen=True)
class PriorStepEndOption(CallOptions):
    """Callback after each step of the prior in a combined call.

    Args:
        prior_callback_on_step_end, prior_callback_on_step_end_tensor_inputs: the same for the prior's steps.
    """

    prior_callback_on_step_end: Callback | None = None
    prior_callback_on_step_end_tensor_inputs: Sequence[str] | None = ("latents",)


@dataclass(frozen=True)
class OldCallbackOption(CallOptions):
    """diffusers' older form of the callback.

    Args:
        callback: `(step, timestep, latents)`, diffusers' older form, called every `callback_steps` steps.
        callback_steps: see callback.
    """

    callback: OldCallback | None = None
    callback_steps: int = 1


@dataclass(frozen=True)
class PriorExtensionOptions(GuidanceIntervalOption, GuiderOption):
    """CallOptions of a prior's call that diffusers does not have; a new one goes here."""


@dataclass(frozen=True)
class PriorOptions(
    PriorExtensionOptions,
    StepEndOption,
    ReturnDictOption,
    EmbedsOutputOption,
    GuidanceScaleOption,
    PriorLatentsOption,
    GeneratorOption,
    PriorStepsOption,
    ImagesPerPromptOption,
    NegativePromptOption,
    PromptOption,
):
    """Options of `KandinskyV22PriorPipeline`, from the last to the first."""


# What several calls have in common, in the order of their arguments ----------------------------------------------


@dataclass(frozen=True)
class ExtensionOptions(GuiderOption, GuidanceIntervalOption, CacheIntervalOption):
    """CallOptions of every decoder and combined call that diffusers does not have; a new one goes here."""


@dataclass(frozen=True)
class CombinedExtensionOptions(CombinedPriorGuidanceOption, ExtensionOptions):
    """The same of combined calls."""


@dataclass(frozen=True)
class DecoderStepOptions(GuidanceScaleOption, DecoderStepsOption, SizeOption):
    """height, width, num_inference_steps, guidance_scale."""


@dataclass(frozen=True)
class DecoderNoiseOptions(DecoderLatentsOption, GeneratorOption, ImagesPerPromptOption):
    """num_images_per_prompt, generator, latents."""


@dataclass(frozen=True)
class DecoderOutputOptions(StepEndOption, ReturnDictOption, PictureOutputOption):
    """output_type, return_dict, callback_on_step_end, callback_on_step_end_tensor_inputs."""


@dataclass(frozen=True)
class CombinedStepOptions(GuidanceScaleOption, DecoderStepsOption, NegativePromptOption):
    """negative_prompt, num_inference_steps, guidance_scale."""


@dataclass(frozen=True)
class CombinedNoiseOptions(PriorLatentsOption, GeneratorOption, CombinedPriorOption, SizeOption, ImagesPerPromptOption):
    """num_images_per_prompt, height, width, the prior's settings, generator, latents."""


@dataclass(frozen=True)
class CombinedOutputOptions(StepEndOption, PriorStepEndOption, ReturnDictOption, PictureOutputOption):
    """output_type, return_dict, the callbacks of both stages."""
