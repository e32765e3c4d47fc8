"""CLIP image embedding -> decoder loop -> latents -> MoVQ -> picture: what all modes of the decoder share.

A mode prepares its `DecoderInputs`: the first latents, and the conditioning of every step. Checks, embeddings, the loop
and MoVQ's decoding are implemented here for all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from kandinsky_jax import images
from kandinsky_jax.checkpoint import CheckpointError, hub
from kandinsky_jax.common.types import PyTree
from kandinsky_jax.diffusion import Network, Params
from kandinsky_jax.diffusion.calls import call, condition
from kandinsky_jax.diffusion.inpainting import Blend
from kandinsky_jax.diffusion.rng import DECODER_STREAM, Generator, noise_source
from kandinsky_jax.models import UNet2DConditionModel, VQModel
from kandinsky_jax.pipelines import checks
from kandinsky_jax.pipelines.base import Pipeline
from kandinsky_jax.pipelines.components import as_component
from kandinsky_jax.pipelines.denoising import LoopInputs
from kandinsky_jax.pipelines.guidance import Guidance, choose_guider
from kandinsky_jax.pipelines.modes import class_names
from kandinsky_jax.pipelines.options import Callback, CallOptions, DecoderLatentsOption
from kandinsky_jax.pipelines.outputs import ImagePipelineOutput, ImageResult
from kandinsky_jax.schedulers import Schedule, Scheduler

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
_READERS = {"image": images.pictures, "mask_image": images.masks, "hint": images.hints}


class DecoderRequest(NamedTuple):
    """A validated call of a decoder; nothing has been compiled or run yet."""

    batch: int  # pictures to generate
    h: int  # height and width of the latents
    w: int
    schedule: Schedule  # the steps to run, after `strength` has removed some
    guidance: Guidance
    interval: tuple[int, int] | None  # the steps with guidance, None for all
    cache_interval: int  # the UNet's deep blocks run in one of so many steps
    generator: Generator
    output_type: str
    return_dict: bool
    callback: Callback | None
    callback_inputs: tuple[str, ...]
    latents: np.ndarray | None  # the user's first noise, [batch, 4, h, w]
    image: np.ndarray | None  # [batch, H, W, 3] in -1..1
    repaint_mask: np.ndarray | None  # bool [batch, H, W], true where the image is repainted
    hint: np.ndarray | None  # [batch, H, W, 3] in 0..1
    paste_back: bool
    options: CallOptions  # as given, for options that only one mode has


@dataclass(frozen=True)
class DecoderInputs:
    """First latents and conditioning of a decoder's loop, as a mode prepares them."""

    start: jax.Array  # the first latents, [B, h, w, 4]
    cond: np.ndarray  # image embeddings, [B, D]
    uncond: np.ndarray | None  # negative image embeddings, [B, D]
    hint: np.ndarray | None = None  # [B, H, W, 3]

    def loop_inputs(self, network: Network, params: Params, guided: bool) -> list[LoopInputs]:
        """Compute the conditioning of every step; see `Conditioning`."""
        cond = self.condition_arguments()
        if not guided:
            uncond = None
        elif self.uncond is None:
            raise ValueError(
                "guidance was turned on by a callback, and there are no negative_image_embeds; give them to the call, "
                "or return image_embeds of both, the negative ones first"
            )
        else:
            uncond = self.uncond_arguments()
        shared = {} if self.hint is None else {"hint": jnp.asarray(self.hint)}
        conditions = condition(network, params, cond, uncond, shared)
        return [LoopInputs(*conditions, blend=self.current_blend())]

    def condition_arguments(self) -> dict[str, jax.Array]:
        """Return arguments of the UNet's `condition`, arrays `[B, ...]`."""
        return {"image_embeds": jnp.asarray(self.cond)}

    def uncond_arguments(self) -> dict[str, jax.Array]:
        """Return the same for the unconditional evaluation."""
        return self.condition_arguments() | {"image_embeds": jnp.asarray(self.uncond)}

    def current_blend(self) -> Blend | None:
        """Return what holds a part of the sample to a picture; None for nothing."""
        return None

    def callback_tensors(self, guided: bool) -> dict[str, PyTree]:
        """Return the embeddings as diffusers' callbacks see them, with guidance the negative ones first."""
        assert self.uncond is not None or not guided
        embeds = np.concatenate([self.uncond, self.cond]) if guided and self.uncond is not None else self.cond
        return {"image_embeds": embeds, "negative_image_embeds": self.uncond}

    def with_callback_tensors(self, changed: Mapping[str, PyTree], both: bool) -> Self:
        """Return the inputs after a callback; its image_embeds are `[2B, D]`, negative ones first, or `[B, D]`."""
        cond, uncond, alone = self.cond, self.uncond, not both
        if "image_embeds" in changed:
            cond, other = checks.callback_halves(changed["image_embeds"], "image_embeds", len(self.start))
            alone, uncond = other is None, uncond if other is None else other
        if alone and "negative_image_embeds" in changed:  # otherwise image_embeds has them, as in diffusers
            uncond = np.asarray(changed["negative_image_embeds"])
            if uncond.shape != cond.shape:
                raise ValueError(
                    f"the callback's negative_image_embeds has shape {uncond.shape}, needed is {cond.shape}"
                )
        return dataclasses.replace(self, cond=cond, uncond=uncond)

    def finish(self, sample: jax.Array) -> jax.Array:
        """Return the final latents for the last sample of the loop."""
        return sample


class PendingImages(NamedTuple):
    """Pictures that a device may still be computing; `result` waits for them and may be called in another thread."""

    request: DecoderRequest
    array: jax.Array  # latents [B, h, w, 4] for the output type "latent", else decoded by MoVQ, [B, H, W, 3]

    def result(self) -> ImageResult:
        """Wait for the device and return the pictures in the requested form."""
        output = self._output()
        return ImagePipelineOutput(output) if self.request.return_dict else (output,)

    def _output(self) -> object:
        request = self.request
        if request.output_type == "latent":
            return jnp.asarray(np.asarray(self.array).transpose(0, 3, 1, 2))
        pixels = images.from_network(np.asarray(self.array))
        if request.paste_back and request.image is not None and request.repaint_mask is not None:
            pixels = np.where(request.repaint_mask[..., None], pixels, images.from_network(request.image))
        return images.to_output(pixels, request.output_type)  # type: ignore[arg-type]


class DecoderPipeline(Pipeline):
    """Base of the decoder's modes.

    Args:
        unet, scheduler, movq: as in diffusers.
    """

    STAGE: ClassVar[str] = "decoder"
    _callback_tensor_inputs: tuple[str, ...] = ("latents", "image_embeds", "negative_image_embeds")

    unet: UNet2DConditionModel
    scheduler: Scheduler
    movq: VQModel
    __call__: Callable[..., ImageResult]  # of each class, with its own options

    def __init__(self, unet: UNet2DConditionModel, scheduler: Scheduler, movq: VQModel):
        self._register(unet=unet, scheduler=scheduler, movq=movq)
        self._check_mode(unet)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "unet" and "movq" in vars(self):
            self._check_mode(as_component(self, name, value))
        super().__setattr__(name, value)

    def _check_mode(self, unet: UNet2DConditionModel) -> None:
        """Raise CheckpointError for a UNet of another mode."""
        kind = unet_kind(unet, self.movq.config.latent_channels)
        if kind != self.REPOSITORY:
            right = f"is one for {' or '.join(class_names(kind))}" if kind else "fits no pipeline"
            raise CheckpointError(
                f"the unet takes {unet.config.in_channels} channels with embedding type "
                f"{unet.config.addition_embed_type!r}, which {type(self).__name__} cannot use; it {right}"
            )

    def _stand_ins(self, batch: int) -> dict[str, object]:
        embeds = np.zeros((batch, self.unet.config.encoder_hid_dim), np.float32)
        return {"image_embeds": embeds, "negative_image_embeds": embeds}

    # Before the loop ----------------------------------------------------------------------------------------------

    def _call(self, options: CallOptions) -> ImageResult:
        """Run a call: all checks first, then the loop."""
        given = vars(options)
        dim, negative_embeds = self.unet.config.encoder_hid_dim, given["negative_image_embeds"]
        positive = checks.embeds(given["image_embeds"], "image_embeds", dim)
        request = self._request(options, len(positive))
        if negative_embeds is None and request.guidance.uses_uncond:
            raise ValueError(
                "negative_image_embeds is needed where guidance_scale is above 1, and by the guider cfg++ at any scale"
            )
        repeats, negative = request.batch // len(positive), None
        if negative_embeds is not None:
            negative = checks.embeds(negative_embeds, "negative_image_embeds", dim)
            if len(negative) != len(positive):
                raise ValueError(
                    f"negative_image_embeds has {len(negative)} embeddings, image_embeds has {len(positive)}; give "
                    "the same number"
                )
            negative = np.repeat(negative, repeats, axis=0)
        return self._generate(request, np.repeat(positive, repeats, axis=0), negative).result()

    def _request(self, options: CallOptions, prompts: int) -> DecoderRequest:
        """Check the options of a decoder's or a combined call, for a number of prompts or embeddings."""
        given = vars(options)
        h, w = self._latent_side(given["height"], "height"), self._latent_side(given["width"], "width")
        output_type = checks.choice(given["output_type"], "output_type", OUTPUT_TYPES)
        paste_back = given.get("paste_back", False)
        if paste_back and output_type == "latent":
            raise ValueError("paste_back works on pixels; it needs another output_type than 'latent'")
        callback, callback_inputs = self._callback(given)
        schedule = self._schedule(given["num_inference_steps"], given.get("strength"))
        guidance = choose_guider(given["guider"], checks.guidance(given["guidance_scale"]), self.unet)
        guidance.check(schedule)
        repeats = checks.count(given["num_images_per_prompt"], "num_images_per_prompt")
        factor, pictures = self.movq.config.scale_factor, {}
        for name, reader in _READERS.items():
            if name in given:
                array = reader(given[name], name, factor * h, factor * w)
                pictures[name] = checks.per_picture(array, name, prompts, repeats)
        # A combined call's latents are the prior's.
        latents = given.get("latents") if isinstance(options, DecoderLatentsOption) else None
        return DecoderRequest(
            batch=prompts * repeats,
            h=h,
            w=w,
            schedule=schedule,
            guidance=guidance,
            interval=checks.interval(given["guidance_interval"], len(schedule)),
            cache_interval=checks.count(given["cache_interval"], "cache_interval"),
            generator=given["generator"],
            output_type=output_type,
            return_dict=given["return_dict"],
            callback=callback,
            callback_inputs=callback_inputs,
            latents=checks.latents(latents, (prompts * repeats, self.movq.config.latent_channels, h, w)),
            image=pictures.get("image"),
            repaint_mask=pictures.get("mask_image"),
            hint=pictures.get("hint"),
            paste_back=paste_back,
            options=options,
        )

    def _callback(self, given: Mapping[str, Any]) -> tuple[Callback | None, tuple[str, ...]]:
        """Check the callback of a call, of the newer or the older form, and the names of the tensors that it sees."""
        function, inputs = given["callback_on_step_end"], given["callback_on_step_end_tensor_inputs"]
        function = checks.old_callback(given.get("callback"), given.get("callback_steps", 1), function)
        return function, checks.callback(function, inputs, self._callback_tensor_inputs)

    @property
    def native_side(self) -> int:
        """Pixels along a side of the pictures that the UNet was trained for, by its configuration."""
        return (self.unet.config.sample_size or 64) * self.movq.config.scale_factor

    def _latent_side(self, pixels: object, name: str) -> int:
        """Return the latents along a side of `pixels`, rounded up so that the UNet can halve it often enough."""
        factor = self.movq.config.scale_factor
        return -(-checks.side(pixels, name) // factor**2) * factor

    def _schedule(self, num_inference_steps: int, strength: float | None) -> Schedule:
        schedule = self.scheduler.schedule(
            num_inference_steps, checks.skipped(strength, self.scheduler.steps(num_inference_steps))
        )
        channels, latent = self.unet.config.out_channels, self.movq.config.latent_channels
        if schedule.learned_variance and channels != 2 * latent:
            raise CheckpointError(
                f"{type(self.scheduler).__name__} has a learned variance, but the unet gives {channels} channels, not "
                f"{2 * latent}"
            )
        return schedule

    def _inputs(
        self, request: DecoderRequest, noise: jax.Array, cond: np.ndarray, uncond: np.ndarray | None
    ) -> DecoderInputs:
        """Prepare the loop's inputs in this mode.

        Args:
            noise: the initial noise, standard normal, `[B, h, w, 4]`.
            cond, uncond: image embeddings, `[B, D]`.
        """
        return DecoderInputs(noise * request.schedule.init_noise_sigma, cond, uncond, request.hint)

    def _encode(self, pictures: np.ndarray) -> jax.Array:
        """Encode pictures `[B, H, W, 3]` in -1..1 as latents `[B, h, w, 4]`, one at a time on each device.

        Equal neighbours are encoded once.
        """
        network, params = Network.split(self.movq)
        new = [i == 0 or not np.array_equal(picture, pictures[i - 1]) for i, picture in enumerate(pictures)]
        different, parts = pictures[new], network.devices
        latents = [
            np.asarray(call(network, params, jnp.asarray(different[i : i + parts]), method="encode"), np.float32)
            for i in range(0, len(different), parts)
        ]
        return jnp.asarray(np.concatenate(latents)[np.cumsum(new) - 1])

    # The loop and decoding ----------------------------------------------------------------------------------------

    def _generate(
        self, request: DecoderRequest, image_embeds: np.ndarray, negative: np.ndarray | None
    ) -> PendingImages:
        """Start generating; does not wait for the device.

        Args:
            image_embeds: one for each picture, `[B, D]`.
            negative: as many, needed where guidance is on.
        """
        source = noise_source(request.generator, request.batch, DECODER_STREAM)
        if request.latents is None:
            noise = source.initial((request.batch, request.h, request.w, self.movq.config.latent_channels))[0]
        else:
            noise = jnp.asarray(request.latents.transpose(0, 2, 3, 1))
        inputs = self._inputs(request, noise, image_embeds, negative)
        [sample], inputs = self._denoise(
            self.unet,
            inputs,
            request.schedule,
            [inputs.start],
            source,
            request.guidance,
            request.callback,
            request.callback_inputs,
            request.interval,
            request.cache_interval,
        )
        latents = inputs.finish(sample)
        if request.output_type == "latent":
            return PendingImages(request, latents)
        network, params = Network.split(self.movq)
        return PendingImages(request, call(network, params, latents, method="decode_in_groups"))


def unet_kind(unet: UNet2DConditionModel, latent_channels: int) -> str | None:
    """Return the repository whose modes a UNet is for, judged by its input channels and hint; None for none of them."""
    extra_channels = unet.config.in_channels - latent_channels
    kinds = {
        (0, False): hub.DECODER,
        (latent_channels + 1, False): hub.INPAINT,  # latents of the kept part, and the keep mask
        (latent_channels, True): hub.CONTROLNET,  # the hint's latents
    }
    return kinds.get((extra_channels, unet.config.takes_hint))
