"""prompt -> picture: a prior and a decoder in one call. What the combined pipelines of all modes share."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

from kandinsky_jax.checkpoint import CheckpointError, hub
from kandinsky_jax.images import CLIPImageProcessor
from kandinsky_jax.models import (
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
    PriorTransformer,
    UNet2DConditionModel,
    VQModel,
)
from kandinsky_jax.pipelines import checks
from kandinsky_jax.pipelines.base import Pipeline
from kandinsky_jax.pipelines.call_defaults import with_defaults
from kandinsky_jax.pipelines.decoder import DecoderPipeline, PendingImages
from kandinsky_jax.pipelines.loading import LoadOptions, describe
from kandinsky_jax.pipelines.options import CallOptions, PriorOptions, check_arguments
from kandinsky_jax.pipelines.outputs import ImageResult
from kandinsky_jax.pipelines.text2emb import KandinskyV22PriorPipeline
from kandinsky_jax.schedulers import Scheduler

if TYPE_CHECKING:
    from transformers import CLIPTokenizer


def _component(pipe: str, name: str) -> Any:
    """Return a property that forwards to a component of one of the two pipelines."""

    def get(self: Any) -> Any:
        return getattr(getattr(self, pipe), name)

    def put(self: object, value: object) -> None:
        setattr(getattr(self, pipe), name, value)

    return property(get, put)


class CombinedPipeline(Pipeline):
    """Base of the combined pipelines: the prior's components are named `prior_...`, the decoder's as in the decoder.

    Args:
        unet, scheduler, movq, prior_prior, prior_image_encoder, prior_text_encoder, prior_tokenizer, prior_scheduler,
        prior_image_processor: as in diffusers.
    """

    DECODER: ClassVar[type[DecoderPipeline]]
    OPTIONS: ClassVar[Callable[..., CallOptions]]  # of a call

    prior_pipe: KandinskyV22PriorPipeline
    decoder_pipe: Any
    __call__: Callable[..., ImageResult]  # of each class, with its own options

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
    do_classifier_free_guidance = _component("decoder_pipe", "do_classifier_free_guidance")
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

    def _stages(self) -> list[Any]:
        return [self.decoder_pipe, self.prior_pipe]

    def _call_defaults(self) -> dict[str, Any]:
        found = self.decoder_pipe._combined_defaults()
        found |= {name: value for name, value in self._of_prior().prior_arguments().items() if name in found}
        return found | self.prior_pipe._combined_defaults()

    def set_progress_bar_config(self, **config: object) -> None:
        """Arguments of `tqdm` for the progress bars; `disable=True` turns them off."""
        self.prior_pipe.set_progress_bar_config(**config)
        self.decoder_pipe.set_progress_bar_config(**config)
        self._progress_bar_config = config

    def generate(self, *args: object, **options: object) -> PendingImages:
        """Start generating without waiting for the decoder; arguments: those of a call.

        Everything is checked before the prior starts.
        """
        signature = inspect.signature(self.OPTIONS)
        check_arguments(f"{type(self).__name__}.generate", signature, args, options)
        return self._start(self.OPTIONS(*args, **with_defaults(self, signature.parameters, args, options)))

    def _start(self, options: CallOptions) -> PendingImages:
        given = vars(options)
        request = self.decoder_pipe._request(options, len(checks.texts(given["prompt"], "prompt")))
        prior = PriorOptions(
            given["prompt"],
            given["negative_prompt"],
            num_images_per_prompt=given["num_images_per_prompt"],
            num_inference_steps=given["prior_num_inference_steps"],
            generator=given["generator"],
            latents=given["latents"],
            guidance_scale=given["prior_guidance_scale"],
            guidance_interval=given["prior_guidance_interval"],
            guider=given["prior_guider"],
            callback_on_step_end=given["prior_callback_on_step_end"],
            callback_on_step_end_tensor_inputs=given["prior_callback_on_step_end_tensor_inputs"],
        )
        image_embeds, negative_image_embeds = self.prior_pipe._embed(self.prior_pipe._request(prior))
        return self.decoder_pipe._generate(request, image_embeds, negative_image_embeds)
