"""CLIP image embedding -> decoder loop -> latents -> MoVQ -> picture: what every mode of the decoder shares.

A mode says what it puts before the loop, a `Scene`: its first latents and what every step is under. Checks, embeddings,
the loop and the way from latents to pictures are here, once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kandinsky_jax import hub, images
from kandinsky_jax.checkpoint import CheckpointError
from kandinsky_jax.models import UNet2DConditionModel, VQModel
from kandinsky_jax.models.unet import UNetCondition
from kandinsky_jax.noise import DECODER, Generator, noise_source
from kandinsky_jax.pipelines import checks
from kandinsky_jax.pipelines.base import Callback, Pipeline
from kandinsky_jax.pipelines.components import as_component
from kandinsky_jax.pipelines.outputs import ImagePipelineOutput
from kandinsky_jax.sampling import Lane, Network, call, condition
from kandinsky_jax.schedulers import Schedule, Scheduler

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class Order(NamedTuple):
    """A call after its checks; nothing is compiled or drawn yet."""

    batch: int  # pictures to draw
    h: int  # latents
    w: int
    schedule: Schedule  # the steps that are left to do
    scale: float
    interval: tuple[int, int] | None  # the steps with guidance, None for all
    generator: Generator
    output_type: str
    return_dict: bool
    callback: Callback | None
    callback_inputs: tuple[str, ...]
    latents: np.ndarray | None  # the user's first noise, [batch, 4, h, w]
    image: np.ndarray | None  # [batch, H, W, 3] in -1..1
    mask: np.ndarray | None  # bool [batch, H, W], true where the image is repainted
    hint: np.ndarray | None  # [batch, H, W, 3] in 0..1
    paste_back: bool


@dataclass(frozen=True)
class Scene:
    """What a mode puts before the loop."""

    start: jax.Array  # the first latents, [B, h, w, 4]
    hint: np.ndarray | None = None  # [B, H, W, 3]

    def tensors(self) -> dict[str, np.ndarray]:
        """What a callback may see and change besides latents and embeddings, in PyTorch's order of axes."""
        return {}

    def lane(self, network: Network, params: Any, tensors: Mapping[str, Any], guided: bool) -> Lane:
        """What every step is under.

        Args:
            guided: whether guidance is on; then the lane has both halves, also where the tensors have one.
        """
        return Lane(self.condition(network, params, self.embeds(tensors, guided), hint=self.hint))

    def embeds(self, tensors: Mapping[str, Any], guided: bool) -> np.ndarray:
        """Image embeddings `[halves * B, D]`, the negative ones first."""
        images = len(self.start)
        rows = checks.halves(tensors["image_embeds"], "image_embeds", images)
        if not guided or len(rows) == 2 * images:
            return rows
        if tensors["negative_image_embeds"] is None:
            raise ValueError(
                "guidance was turned on by a callback, and there are no negative_image_embeds; give them to the call, "
                "or return image_embeds of both, the negative ones first"
            )
        return np.concatenate([np.asarray(tensors["negative_image_embeds"]), rows])

    def condition(
        self, network: Network, params: Any, embeds: Any, hint: Any = None, channels: Any = None
    ) -> UNetCondition:
        """The UNet's condition, of rows with one or both halves of guidance, the unconditional one first."""
        rows = (None if x is None else jnp.asarray(x) for x in (embeds, hint, channels))
        return condition(network, params, *(_halved(x, len(self.start)) for x in rows))

    def finish(self, sample: jax.Array, tensors: Mapping[str, Any]) -> jax.Array:
        """The last latents."""
        return sample


class Drawing(NamedTuple):
    """Pictures that a device is still busy with: `result` waits for them, which may be done in another thread."""

    order: Order
    drawn: jax.Array  # latents [B, h, w, 4] for the output type "latent", else what MoVQ decodes, [B, H, W, 3]

    def result(self) -> ImagePipelineOutput | tuple[Any]:
        """As the user wants them."""
        output = self._output()
        return ImagePipelineOutput(output) if self.order.return_dict else (output,)

    def _output(self) -> Any:
        order = self.order
        if order.output_type == "latent":
            return jnp.asarray(np.asarray(self.drawn).transpose(0, 3, 1, 2))
        pixels = images.from_network(np.asarray(self.drawn))
        if order.paste_back and order.image is not None and order.mask is not None:
            pixels = np.where(order.mask[..., None], pixels, images.from_network(order.image))
        return images.to_output(pixels, order.output_type)  # type: ignore[arg-type]


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

    def __init__(self, unet: UNet2DConditionModel, scheduler: Scheduler, movq: VQModel):
        self._register(unet=unet, scheduler=scheduler, movq=movq)
        self._check_mode(unet)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "unet" and "movq" in vars(self):
            self._check_mode(as_component(self, name, value))
        super().__setattr__(name, value)

    def _check_mode(self, unet: UNet2DConditionModel) -> None:
        """Raise where a UNet is one for another mode."""
        kind = unet_kind(unet, self.movq.config.latent_channels)
        if kind != self.REPOSITORY:
            right = f"is one for {' or '.join(hub.KINDS[kind])}" if kind else "fits no pipeline"
            raise CheckpointError(
                f"the unet takes {unet.config.in_channels} channels with embedding type "
                f"{unet.config.addition_embed_type!r}, which {type(self).__name__} cannot use; it {right}"
            )

    def _stand_ins(self, batch: int) -> dict[str, Any]:
        embeds = np.zeros((batch, self.unet.config.encoder_hid_dim), np.float32)
        return {"image_embeds": embeds, "negative_image_embeds": embeds}

    # Before the loop ----------------------------------------------------------------------------------------------

    def _call(
        self, image_embeds: Any, negative_image_embeds: Any, **arguments: Any
    ) -> ImagePipelineOutput | tuple[Any]:
        """A decoder's call: every check, then the drawing."""
        dim = self.unet.config.encoder_hid_dim
        given = checks.embeds(image_embeds, "image_embeds", dim)
        order = self._order(len(given), **arguments)
        if negative_image_embeds is None and order.scale > 1:
            raise ValueError("negative_image_embeds is needed where guidance_scale is above 1")
        repeats, negative = order.batch // len(given), None
        if negative_image_embeds is not None:
            negative = checks.embeds(negative_image_embeds, "negative_image_embeds", dim)
            if len(negative) != len(given):
                raise ValueError(f"negative_image_embeds has {len(negative)} rows, image_embeds has {len(given)}")
            negative = np.repeat(negative, repeats, axis=0)
        return self._draw(order, np.repeat(given, repeats, axis=0), negative).result()

    def _order(
        self,
        prompts: int,
        *,
        height: Any,
        width: Any,
        num_inference_steps: Any,
        guidance_scale: Any,
        num_images_per_prompt: Any,
        generator: Generator,
        output_type: Any,
        return_dict: bool,
        callback_on_step_end: Any,
        callback_on_step_end_tensor_inputs: Any,
        latents: Any = None,
        strength: Any = None,
        guidance_interval: Any = None,
        paste_back: bool = False,
        **pictures: Any,
    ) -> Order:
        """Check a call; `pictures` are the image, mask_image and hint that this mode takes."""
        h, w = self._latent_side(height, "height"), self._latent_side(width, "width")
        checks.choice(output_type, "output_type", OUTPUT_TYPES)
        if paste_back and output_type == "latent":
            raise ValueError("paste_back works on pixels; it needs another output_type than 'latent'")
        inputs = checks.callback(callback_on_step_end, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        schedule = self._schedule(num_inference_steps, strength)
        repeats = checks.count(num_images_per_prompt, "num_images_per_prompt")
        factor, readers = self.movq.config.scale_factor, {"mask_image": images.masks, "hint": images.hints}
        read = {}
        for name, value in pictures.items():
            rows = readers.get(name, images.pictures)(value, name, factor * h, factor * w)
            read[name] = checks.per_picture(rows, name, prompts, repeats)
        return Order(
            batch=prompts * repeats,
            h=h,
            w=w,
            schedule=schedule,
            scale=checks.guidance(guidance_scale),
            interval=checks.interval(guidance_interval, len(schedule)),
            generator=generator,
            output_type=output_type,
            return_dict=return_dict,
            callback=callback_on_step_end,
            callback_inputs=inputs,
            latents=checks.latents(latents, (prompts * repeats, self.movq.config.latent_channels, h, w)),
            image=read.get("image"),
            mask=read.get("mask_image"),
            hint=read.get("hint"),
            paste_back=paste_back,
        )

    def _latent_side(self, pixels: Any, name: str) -> int:
        """Latents along a side of so many pixels; rounded up, so that the UNet can halve it often enough."""
        factor = self.movq.config.scale_factor
        return -(-checks.side(pixels, name) // factor**2) * factor

    def _schedule(self, num_inference_steps: Any, strength: Any) -> Schedule:
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

    def _scene(self, order: Order, noise: jax.Array) -> Scene:
        """What this mode puts before the loop; `noise` is the first draw, `[B, h, w, 4]`."""
        return Scene(noise * order.schedule.init_noise_sigma, order.hint)

    def _encode(self, pictures: np.ndarray) -> jax.Array:
        """Pictures `[B, H, W, 3]` in -1..1 -> latents `[B, h, w, 4]`; equal ones once, one by one on each device."""
        network, params = Network.split(self.movq)
        new = [i == 0 or not np.array_equal(picture, pictures[i - 1]) for i, picture in enumerate(pictures)]
        different, parts = pictures[new], network.devices
        latents = [
            np.asarray(call(network, params, jnp.asarray(different[i : i + parts]), method="encode"), np.float32)
            for i in range(0, len(different), parts)
        ]
        return jnp.asarray(np.concatenate(latents)[np.cumsum(new) - 1])

    # The loop, and after it ---------------------------------------------------------------------------------------

    def _draw(self, order: Order, image_embeds: np.ndarray, negative: np.ndarray | None) -> Drawing:
        """Draw what was ordered, for embeddings of one row per picture; negative ones are needed for guidance."""
        source = noise_source(order.generator, order.batch, DECODER)
        if order.latents is None:
            noise = source.initial((order.batch, order.h, order.w, self.movq.config.latent_channels))[0]
        else:
            noise = jnp.asarray(order.latents.transpose(0, 2, 3, 1))
        scene = self._scene(order, noise)
        # The reference's names and order of rows: negative ones first.
        rows = image_embeds
        if order.scale > 1:
            assert negative is not None
            rows = np.concatenate([negative, image_embeds])
        tensors = {"image_embeds": rows, "negative_image_embeds": negative} | scene.tensors()
        [sample] = self._denoise(
            self.unet,
            lambda network, params, tensors, guided: [scene.lane(network, params, tensors, guided)],
            tensors,
            order.schedule,
            [scene.start],
            source,
            order.scale,
            order.callback,
            order.callback_inputs,
            order.interval,
        )
        latents = scene.finish(sample, tensors)
        if order.output_type == "latent":
            return Drawing(order, latents)
        network, params = Network.split(self.movq)
        return Drawing(order, call(network, params, latents, method="decode_in_groups"))


def _halved(rows: jax.Array | None, images: int) -> jax.Array | None:
    """Rows `[halves * B, ...]` as `[halves, B, ...]`."""
    return None if rows is None else rows.reshape(-1, images, *rows.shape[1:])


def unet_kind(unet: UNet2DConditionModel, latent_channels: int) -> str | None:
    """Which of `hub.KINDS` a UNet is for, by its input."""
    further = unet.config.in_channels - latent_channels
    kinds = {
        (0, False): hub.DECODER,
        (latent_channels + 1, False): hub.INPAINT,  # the kept part's latents and the mask
        (latent_channels, True): hub.CONTROLNET,  # the hint's latents
    }
    return kinds.get((further, unet.config.takes_hint))
