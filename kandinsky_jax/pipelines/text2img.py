"""CLIP image embedding -> decoder loop -> latents -> MoVQ -> picture.

Reference: diffusers' KandinskyV22Pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kandinsky_jax import hub, images
from kandinsky_jax.checkpoint import CheckpointError
from kandinsky_jax.models import UNet2DConditionModel, VQModel
from kandinsky_jax.noise import DECODER, Generator, noise_source
from kandinsky_jax.pipelines import checks
from kandinsky_jax.pipelines.base import Callback, ImagePipelineOutput, Pipeline
from kandinsky_jax.sampling import Network, call
from kandinsky_jax.schedulers import Schedule, Scheduler

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class Order(NamedTuple):
    """A decoder's arguments after their checks."""

    h: int  # latents
    w: int
    schedule: Schedule
    scale: float
    callback_inputs: tuple[str, ...]


class DecoderPipeline(Pipeline):
    """What every decoder shares: embeddings in, latents through the loop, pictures out."""

    STAGE: ClassVar[str] = "decoder"

    unet: UNet2DConditionModel
    scheduler: Scheduler
    movq: VQModel
    _callback_tensor_inputs: tuple[str, ...]

    def _check(
        self,
        height: Any,
        width: Any,
        num_inference_steps: Any,
        guidance_scale: Any,
        output_type: Any,
        callback: Any,
        callback_inputs: Any,
    ) -> Order:
        """What can be said against a call before there are embeddings for it."""
        h = self._latent_side(checks.side(height, "height"))
        w = self._latent_side(checks.side(width, "width"))
        checks.choice(output_type, "output_type", OUTPUT_TYPES)
        inputs = checks.callback(callback, callback_inputs, self._callback_tensor_inputs)
        return Order(h, w, self._schedule(num_inference_steps), checks.guidance(guidance_scale), inputs)

    def _latent_side(self, pixels: int) -> int:
        """Latents along a side of so many pixels; rounded up, so that the UNet can halve it often enough."""
        factor = self.movq.config.scale_factor
        return -(-pixels // factor**2) * factor

    def _schedule(self, num_inference_steps: int) -> Schedule:
        schedule = self.scheduler.schedule(num_inference_steps)
        channels, latent = self.unet.config.out_channels, self.movq.config.latent_channels
        if schedule.learned_variance and channels != 2 * latent:
            raise CheckpointError(
                f"{type(self.scheduler).__name__} has a learned variance, but the unet gives {channels} channels, not "
                f"{2 * latent}"
            )
        return schedule

    def _embeds(self, positive: Any, negative: Any, repeats: int, scale: float) -> dict[str, np.ndarray]:
        """The embeddings that condition the UNet, by the reference's names and in its order: negative rows first."""
        dim = self.unet.config.encoder_hid_dim
        given = checks.embeds(positive, "image_embeds", dim)
        if negative is None and scale > 1:
            raise ValueError("negative_image_embeds is needed where guidance_scale is above 1")
        without = given if negative is None else checks.embeds(negative, "negative_image_embeds", dim)
        if len(without) != len(given):
            raise ValueError(f"negative_image_embeds has {len(without)} rows, image_embeds has {len(given)}")
        given, without = (np.repeat(x, repeats, axis=0) for x in (given, without))
        rows = np.concatenate([without, given]) if scale > 1 else given
        return {"image_embeds": rows, "negative_image_embeds": without}

    def _decode(self, latents: jax.Array, output_type: str) -> Any:
        """Latents `[B, h, w, 4]` as the user wants them."""
        if output_type == "latent":
            return jnp.asarray(np.asarray(latents).transpose(0, 3, 1, 2))
        network, params = Network.split(self.movq)
        pixels = call(network, params, latents, method="decode")
        return images.to_output(images.from_network(pixels), output_type)  # type: ignore[arg-type]


class KandinskyV22Pipeline(DecoderPipeline):
    """Draws pictures for image embeddings.

    Args:
        unet, scheduler, movq: as in diffusers.
    """

    REPOSITORY: ClassVar[str] = hub.DECODER
    ACCEPTS: ClassVar[frozenset[str]] = frozenset({"KandinskyV22Pipeline", "KandinskyV22Img2ImgPipeline"})
    _callback_tensor_inputs = ("latents", "image_embeds", "negative_image_embeds")

    def __init__(self, unet: UNet2DConditionModel, scheduler: Scheduler, movq: VQModel):
        self._register(unet=unet, scheduler=scheduler, movq=movq)
        if unet.config.in_channels != movq.config.latent_channels or unet.config.takes_hint:
            right = "KandinskyV22ControlnetPipeline" if unet.config.takes_hint else "KandinskyV22InpaintPipeline"
            raise CheckpointError(
                f"the unet takes {unet.config.in_channels} channels with embedding type "
                f"{unet.config.addition_embed_type!r}; {type(self).__name__} needs {movq.config.latent_channels} and "
                f"'image'. This checkpoint is one for {right}"
            )

    def __call__(
        self,
        image_embeds: Any,
        negative_image_embeds: Any,
        height: int = 512,
        width: int = 512,
        num_inference_steps: int = 100,
        guidance_scale: float = 4.0,
        num_images_per_prompt: int = 1,
        generator: Generator = None,
        latents: Any = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw pictures.

        Args:
            image_embeds: `[B, D]` or a list of such, from the prior.
            negative_image_embeds: the same, what to be guided away from; None only where guidance is off.
            height, width: in pixels, at least 64; rounded up to a multiple of 64.
            num_inference_steps: at least 1.
            guidance_scale: guidance is on above 1.
            num_images_per_prompt: pictures per embedding, neighbours in the result.
            generator: see `kandinsky_jax.noise.noise_source`.
            latents: first noise, `[B, 4, height/8, width/8]`.
            output_type: "pil", "np" (float32 `[B, H, W, 3]` in 0..1), "pt" (`[B, 3, H, W]` in 0..1) or "latent"
                (`[B, 4, H/8, W/8]`).
            return_dict: False for a plain tuple.
            callback_on_step_end: `(pipe, step, timestep, tensors) -> tensors` after each step, on NumPy arrays.
            callback_on_step_end_tensor_inputs: which tensors: latents, image_embeds, negative_image_embeds.
        """
        h, w, schedule, scale, inputs = self._check(
            height,
            width,
            num_inference_steps,
            guidance_scale,
            output_type,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )
        repeats = checks.count(num_images_per_prompt, "num_images_per_prompt")
        tensors = self._embeds(image_embeds, negative_image_embeds, repeats, scale)
        batch = len(tensors["negative_image_embeds"])
        channels = self.movq.config.latent_channels
        first = checks.latents(latents, (batch, channels, h, w))
        source = noise_source(generator, batch, DECODER)

        if first is None:
            start = source.initial((batch, h, w, channels))[0]
        else:
            start = jnp.asarray(first.transpose(0, 2, 3, 1))

        def conditions(network: Network, params: Any, tensors: Mapping[str, Any]) -> list[Any]:
            return [call(network, params, jnp.asarray(tensors["image_embeds"]), method="condition")]

        [sample] = self._denoise(
            self.unet,
            conditions,
            tensors,
            schedule,
            [start * schedule.init_noise_sigma],
            source,
            scale,
            callback_on_step_end,
            inputs,
        )
        output = self._decode(sample, output_type)
        return ImagePipelineOutput(output) if return_dict else (output,)
