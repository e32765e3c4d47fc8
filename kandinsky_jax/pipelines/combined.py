"""prompt -> picture: a prior and a decoder in one call, for every mode of the decoder.

Reference: diffusers' KandinskyV22CombinedPipeline, KandinskyV22Img2ImgCombinedPipeline and
KandinskyV22InpaintCombinedPipeline. Those for controlnets are in `combined_controlnet`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

from kandinsky_jax.checkpoint import CheckpointError, hub
from kandinsky_jax.diffusion.rng import Generator
from kandinsky_jax.images import CLIPImageProcessor
from kandinsky_jax.models import (
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
    PriorTransformer,
    UNet2DConditionModel,
    VQModel,
)
from kandinsky_jax.pipelines import checks
from kandinsky_jax.pipelines.base import Callback, OldCallback, Pipeline
from kandinsky_jax.pipelines.decoder import DecoderPipeline, PendingImages
from kandinsky_jax.pipelines.img2img import KandinskyV22Img2ImgPipeline
from kandinsky_jax.pipelines.inpaint import KandinskyV22InpaintPipeline
from kandinsky_jax.pipelines.loading import LoadOptions, describe
from kandinsky_jax.pipelines.outputs import ImagePipelineOutput
from kandinsky_jax.pipelines.text2emb import KandinskyV22PriorPipeline
from kandinsky_jax.pipelines.text2img import KandinskyV22Pipeline
from kandinsky_jax.schedulers import Scheduler

if TYPE_CHECKING:
    from transformers import CLIPTokenizer


def _component(pipe: str, name: str) -> Any:
    """Return a property that forwards to a component of one of the two pipelines."""

    def get(self: Any) -> Any:
        return getattr(getattr(self, pipe), name)

    def put(self: Any, value: Any) -> None:
        setattr(getattr(self, pipe), name, value)

    return property(get, put)


class CombinedPipeline(Pipeline):
    """Base of the combined pipelines: the prior's components are named `prior_...`, the decoder's as in the decoder.

    Args:
        unet, scheduler, movq, prior_prior, prior_image_encoder, prior_text_encoder, prior_tokenizer, prior_scheduler,
        prior_image_processor: as in diffusers.
    """

    DECODER: ClassVar[type[DecoderPipeline]]

    prior_pipe: KandinskyV22PriorPipeline
    decoder_pipe: Any

    unet = _component("decoder_pipe", "unet")
    scheduler = _component("decoder_pipe", "scheduler")
    movq = _component("decoder_pipe", "movq")
    prior_prior = _component("prior_pipe", "prior")
    prior_image_encoder = _component("prior_pipe", "image_encoder")
    prior_text_encoder = _component("prior_pipe", "text_encoder")
    prior_tokenizer = _component("prior_pipe", "tokenizer")
    prior_scheduler = _component("prior_pipe", "scheduler")
    prior_image_processor = _component("prior_pipe", "image_processor")

    guidance_scale = _component("decoder_pipe", "guidance_scale")
    _guidance_scale = guidance_scale
    prior_guidance_scale = _component("prior_pipe", "guidance_scale")
    num_timesteps = _component("decoder_pipe", "num_timesteps")
    prior_num_timesteps = _component("prior_pipe", "num_timesteps")

    def __init__(
        self,
        unet: UNet2DConditionModel,
        scheduler: Scheduler,
        movq: VQModel,
        prior_prior: PriorTransformer,
        prior_image_encoder: CLIPVisionModelWithProjection,
        prior_text_encoder: CLIPTextModelWithProjection,
        prior_tokenizer: CLIPTokenizer,
        prior_scheduler: Scheduler,
        prior_image_processor: CLIPImageProcessor,
    ):
        decoder: dict[str, Any] = {"unet": unet, "scheduler": scheduler, "movq": movq}
        prior = {
            "prior": prior_prior,
            "image_encoder": prior_image_encoder,
            "text_encoder": prior_text_encoder,
            "tokenizer": prior_tokenizer,
            "scheduler": prior_scheduler,
            "image_processor": prior_image_processor,
        }
        self.prior_pipe = KandinskyV22PriorPipeline(**prior)
        self.decoder_pipe = self.DECODER(**decoder)
        self._register(**decoder, **{f"prior_{name}": part for name, part in prior.items()})

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        prior: str | os.PathLike[str] | None = None,
        prior_revision: str | None = None,
        **arguments: Any,
    ) -> Self:
        """Load a decoder and its prior, or a combined pipeline that was saved as one.

        Args:
            name: "tiny" (embedded), a folder, or a Hub repository; of a decoder, or saved by `save_pretrained`.
            prior: folder or Hub repository of the prior. None finds it: see `kandinsky_jax.checkpoint.hub.find_prior`.
            prior_revision: of the prior's Hub repository.
            arguments: see `Pipeline.from_pretrained`.
        """
        return super().from_pretrained(name, prior=prior, prior_revision=prior_revision, **arguments)

    @classmethod
    def _open(cls, name: str | os.PathLike[str], options: LoadOptions, components: Mapping[str, Any]) -> Any:
        given = dict(components)
        prior, prior_revision = given.pop("prior", None), given.pop("prior_revision", None)
        folder = hub.resolve(name, cls.REPOSITORY, **vars(options.hub))
        if any(part.startswith("prior_") for part in hub.components(folder)):
            if prior is not None:
                raise CheckpointError(f"{folder} has a prior of its own, so that prior={prior} has no place in it")
            return [describe(cls, folder, options, given)]
        where = vars(options.hub) | {"revision": prior_revision, "subfolder": None}
        prior_folder = hub.find_prior(folder, prior, **where)
        ready = {k.removeprefix("prior_"): v for k, v in given.items() if k.startswith("prior_")}
        own = {k: v for k, v in given.items() if not k.startswith("prior_")}
        return [
            describe(KandinskyV22PriorPipeline, prior_folder, options, ready, "prior_"),
            describe(cls.DECODER, folder, options, own),
        ]

    def _held(self) -> dict[str, Any]:
        return self.decoder_pipe._held() | {f"prior_{k}": v for k, v in self.prior_pipe._held().items()}

    def set_progress_bar_config(self, **config: Any) -> None:
        """Arguments of `tqdm` for the progress bars; `disable=True` turns them off."""
        self.prior_pipe.set_progress_bar_config(**config)
        self.decoder_pipe.set_progress_bar_config(**config)
        self._progress_bar_config = config

    def generate(
        self,
        prompt: Any,
        *,
        negative_prompt: Any,
        num_images_per_prompt: Any,
        prior_guidance_scale: Any,
        prior_num_inference_steps: Any,
        generator: Generator,
        latents: Any,
        prior_callback_on_step_end: Any,
        prior_callback_on_step_end_tensor_inputs: Any,
        callback_on_step_end: Any,
        callback: OldCallback | None = None,
        callback_steps: int = 1,
        **decoder: Any,
    ) -> PendingImages:
        """Start generating without waiting for the decoder; arguments: all of `__call__`.

        Everything is checked before the prior starts.
        """
        request = self.decoder_pipe._request(
            len(checks.texts(prompt, "prompt")),
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            callback_on_step_end=checks.old_callback(callback, callback_steps, callback_on_step_end),
            **decoder,
        )
        image_embeds, negative_image_embeds = self.prior_pipe(
            prompt,
            negative_prompt=negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            num_inference_steps=prior_num_inference_steps,
            generator=generator,
            latents=latents,
            guidance_scale=prior_guidance_scale,
            output_type="np",
            return_dict=False,
            callback_on_step_end=prior_callback_on_step_end,
            callback_on_step_end_tensor_inputs=prior_callback_on_step_end_tensor_inputs,
        )
        return self.decoder_pipe._generate(request, image_embeds, negative_image_embeds)


class KandinskyV22CombinedPipeline(CombinedPipeline):
    """Generates pictures from prompts. Components: see `CombinedPipeline`."""

    REPOSITORY: ClassVar[str] = hub.DECODER
    DECODER: ClassVar[type[DecoderPipeline]] = KandinskyV22Pipeline

    def __call__(
        self,
        prompt: str | Sequence[str],
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
        callback: OldCallback | None = None,
        callback_steps: int = 1,
        return_dict: bool = True,
        prior_callback_on_step_end: Callback | None = None,
        prior_callback_on_step_end_tensor_inputs: Sequence[str] | None = ("latents",),
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = ("latents",),
        guidance_interval: tuple[float, float] | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate pictures.

        Args:
            prompt, negative_prompt, num_images_per_prompt: see `KandinskyV22PriorPipeline`.
            num_inference_steps, guidance_scale, height, width, output_type, return_dict, guidance_interval: see
                `KandinskyV22Pipeline`.
            prior_guidance_scale, prior_num_inference_steps: the prior's own.
            generator: one for both stages; a `TorchGenerator` continues from the prior to the decoder.
            latents: the prior's initial noise.
            callback, callback_steps: diffusers' older form of the decoder's callback.
            prior_callback_on_step_end, callback_on_step_end and their ..._tensor_inputs: callbacks of each stage.
        """
        return self.generate(
            prompt,
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
            callback=callback,
            callback_steps=callback_steps,
            return_dict=return_dict,
            prior_callback_on_step_end=prior_callback_on_step_end,
            prior_callback_on_step_end_tensor_inputs=prior_callback_on_step_end_tensor_inputs,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        ).result()


class KandinskyV22Img2ImgCombinedPipeline(CombinedPipeline):
    """Redraws pictures after prompts. Components: see `CombinedPipeline`."""

    REPOSITORY: ClassVar[str] = hub.DECODER
    DECODER: ClassVar[type[DecoderPipeline]] = KandinskyV22Img2ImgPipeline

    def __call__(
        self,
        prompt: str | Sequence[str],
        image: Any,
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
        callback: OldCallback | None = None,
        callback_steps: int = 1,
        return_dict: bool = True,
        prior_callback_on_step_end: Callback | None = None,
        prior_callback_on_step_end_tensor_inputs: Sequence[str] | None = ("latents",),
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = ("latents",),
        guidance_interval: tuple[float, float] | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate variations of pictures.

        Args:
            image, strength: see `KandinskyV22Img2ImgPipeline`; one image for all, one per prompt, or one per picture.
            the others: see `KandinskyV22CombinedPipeline`.
        """
        return self.generate(
            prompt,
            image=image,
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
            callback=callback,
            callback_steps=callback_steps,
            return_dict=return_dict,
            prior_callback_on_step_end=prior_callback_on_step_end,
            prior_callback_on_step_end_tensor_inputs=prior_callback_on_step_end_tensor_inputs,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        ).result()


class KandinskyV22InpaintCombinedPipeline(CombinedPipeline):
    """Inpaints pictures, guided by prompts. Components: see `CombinedPipeline`."""

    REPOSITORY: ClassVar[str] = hub.INPAINT
    DECODER: ClassVar[type[DecoderPipeline]] = KandinskyV22InpaintPipeline

    def __call__(
        self,
        prompt: str | Sequence[str],
        image: Any,
        mask_image: Any,
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
        paste_back: bool = False,
        guidance_interval: tuple[float, float] | None = None,
        callback: OldCallback | None = None,
        callback_steps: int = 1,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Repaint the masked part of pictures.

        Args:
            image, mask_image, paste_back: see `KandinskyV22InpaintPipeline`; one for all, one per prompt, or one per
                picture.
            the others: see `KandinskyV22CombinedPipeline`.
        """
        return self.generate(
            prompt,
            image=image,
            mask_image=mask_image,
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
            callback=callback,
            callback_steps=callback_steps,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            paste_back=paste_back,
        ).result()
