"""prompt -> tokenizer -> CLIP text tower -> prior loop -> CLIP image embedding.

Reference: diffusers' KandinskyV22PriorPipeline and KandinskyV22PriorEmb2EmbPipeline.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from kandinsky_jax import images
from kandinsky_jax.checkpoint import LazyNetwork, flat_params, hub, zero_embed
from kandinsky_jax.checkpoint.tokenizer import check_tokenizer, tokenize, whole_text
from kandinsky_jax.common.arrays import to_numpy
from kandinsky_jax.common.errors import quote
from kandinsky_jax.common.types import PyTree
from kandinsky_jax.compilation import program
from kandinsky_jax.diffusion import Guider, Network, Params
from kandinsky_jax.diffusion.calls import call, condition, shard_condition
from kandinsky_jax.diffusion.rng import PRIOR_STREAM, Generator, Source, noise_source
from kandinsky_jax.images import CLIPImageProcessor
from kandinsky_jax.models import CLIPTextModelWithProjection, CLIPVisionModelWithProjection, PriorTransformer
from kandinsky_jax.models.prior import PriorCondition
from kandinsky_jax.pipelines import checks
from kandinsky_jax.pipelines.base import LazyComponent, Pipeline
from kandinsky_jax.pipelines.call_defaults import takes_defaults
from kandinsky_jax.pipelines.denoising import LoopInputs
from kandinsky_jax.pipelines.guidance import Guidance, choose_guider
from kandinsky_jax.pipelines.options import Callback, CallOptions, PriorOptions
from kandinsky_jax.pipelines.outputs import Embeds, KandinskyPriorPipelineOutput, PriorResult
from kandinsky_jax.schedulers import Schedule, Scheduler
from kandinsky_jax.schedulers.base import linear_combination

if TYPE_CHECKING:
    from transformers import CLIPTokenizer


# The fields of a `TextEncoding` as the prior's `condition` and as diffusers' callbacks call them.
_ARGUMENTS = ("proj_embedding", "encoder_hidden_states", "attention_mask")
_TENSORS = ("prompt_embeds", "text_encoder_hidden_states", "text_mask")


class TextEncoding(NamedTuple):
    """Encoded texts as NumPy arrays, which are repeated and concatenated without compiling anything."""

    prompt_embeds: np.ndarray  # [B, projection_dim]
    hidden_states: np.ndarray  # [B, T, hidden_size]
    mask: np.ndarray  # bool [B, T]


class PriorRequest(NamedTuple):
    """A validated call of a prior; nothing has been compiled or run yet."""

    prompts: list[str]
    negatives: list[str] | None
    repeats: int
    schedule: Schedule
    guidance: Guidance
    interval: tuple[int, int] | None  # the steps with guidance, None for all
    generator: Generator
    latents: np.ndarray | None  # the user's initial noise
    image: np.ndarray | list[Image.Image] | None  # to start from, see `_pictures`
    callback: Callback | None
    callback_inputs: tuple[str, ...]

    @property
    def images(self) -> int:
        """Number of embeddings to generate."""
        return len(self.prompts) * self.repeats

    @property
    def batches(self) -> int:
        """Number of batches in the loop: negative prompts are a second one."""
        return 1 if self.negatives is None else 2


@dataclasses.dataclass(frozen=True)
class PriorInputs:
    """Conditioning of a prior's loop, see `Conditioning`: encoded texts, `[batches * images, ...]`."""

    pipe: PriorPipeline
    request: PriorRequest
    cond: TextEncoding
    uncond: TextEncoding | None  # None until guidance is on
    ours: bool = True  # whether uncond is as encoded here, not a callback's

    def loop_inputs(self, network: Network, params: Params, guided: bool) -> list[LoopInputs]:
        """Compute the conditioning of each batch."""
        request, uncond = self.request, None
        if guided:
            uncond = self.uncond or self.pipe._encode_uncond(request, self.pipe._encode_cond(request))
        found = []
        for start in range(0, request.batches * request.images, request.images):
            cond_part, uncond_part = (
                None if text is None else TextEncoding(*(x[start : start + request.images] for x in text))
                for text in (self.cond, uncond)
            )
            assert cond_part is not None
            empty = request.negatives is None and self.ours
            found.append(self.pipe._condition(network, params, cond_part, uncond_part, empty))
        return found

    def callback_tensors(self, guided: bool) -> dict[str, PyTree]:
        """Return the encoded texts by the reference's names; with guidance, uncond before cond."""
        if not guided or self.uncond is None:
            return dict(zip(_TENSORS, self.cond, strict=True))
        both = [np.concatenate(pair) for pair in zip(self.uncond, self.cond, strict=True)]
        return dict(zip(_TENSORS, both, strict=True))

    def with_callback_tensors(self, changed: Mapping[str, PyTree], both: bool) -> PriorInputs:
        """Return the inputs after a callback."""
        cond, uncond, ours = self.cond._asdict(), None, self.ours
        for field, name in zip(TextEncoding._fields, _TENSORS, strict=True):
            if name not in changed:
                continue
            cond[field], other = checks.callback_halves(changed[name], name, len(cond[field]))
            if other is not None:
                known = self.uncond or self.pipe._encode_uncond(self.request, self.pipe._encode_cond(self.request))
                uncond, ours = (uncond or known)._replace(**{field: other}), False
        return PriorInputs(self.pipe, self.request, TextEncoding(**cond), uncond or self.uncond, ours)


class PriorPipeline(Pipeline):
    """Base of the priors.

    Args:
        prior, image_encoder, text_encoder, tokenizer, scheduler, image_processor: as in diffusers.
    """

    REPOSITORY: ClassVar[str] = hub.PRIOR
    PREFIX: ClassVar[str] = "prior_"
    STAGE: ClassVar[str] = "prior"
    _callback_tensor_inputs = ("latents", "prompt_embeds", "text_encoder_hidden_states", "text_mask")

    prior: PriorTransformer
    image_encoder = LazyComponent()  # a CLIPVisionModelWithProjection
    text_encoder: CLIPTextModelWithProjection
    tokenizer: CLIPTokenizer
    scheduler: Scheduler
    image_processor: CLIPImageProcessor

    def __init__(
        self,
        prior: PriorTransformer,
        image_encoder: CLIPVisionModelWithProjection,
        text_encoder: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        scheduler: Scheduler,
        image_processor: CLIPImageProcessor,
    ):
        self._register(
            prior=prior,
            image_encoder=image_encoder,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            scheduler=scheduler,
            image_processor=image_processor,
        )
        check_tokenizer(tokenizer, text_encoder.config)
        self._constants: dict[str, tuple[list[tuple[str, object]], tuple[int, ...], PyTree]] = {}

    @takes_defaults
    def interpolate(
        self,
        images_and_prompts: Sequence[object],
        weights: Sequence[float],
        num_images_per_prompt: int = 1,
        num_inference_steps: int = 25,
        generator: Generator = None,
        latents: object = None,
        negative_prior_prompt: str | None = None,
        negative_prompt: str = "",
        guidance_scale: float = 4.0,
        guidance_interval: tuple[float, float] | None = None,
        guider: str | Guider | None = None,
    ) -> KandinskyPriorPipelineOutput:
        """Mix prompts and pictures: the weighted sum of their image embeddings.

        Args:
            images_and_prompts: strings are prompts; pictures are PIL pictures, `pathlib.Path`s, arrays `[H, W, 3]`
                (see `kandinsky_jax.images`), or `[1, 3, S, S]`, which go into the vision tower as they are; `[1, D]` is
                an image embedding.
            weights: one number for each item; they are not normalised.
            num_images_per_prompt: embeddings to generate.
            num_inference_steps, latents, guidance_scale, guidance_interval, guider: of the prior, for each prompt; see
                `__call__`.
            generator: a `TorchGenerator` continues from item to item. With a seed or a key, every prompt gets the noise
                that it would get alone.
            negative_prior_prompt: the negative prompt for each of the prompts.
            negative_prompt: from which the decoder is guided away; "" stands for the vision tower's embedding of zeros,
                or for the embedding of `negative_prior_prompt`.
        Returns:
            image_embeds and negative_image_embeds, float32 JAX arrays `[num_images_per_prompt, D]`.
        """
        items, numbers = checks.interpolation(images_and_prompts, weights)
        if not isinstance(negative_prompt, str):
            raise TypeError(f"negative_prompt must be a string, got {type(negative_prompt).__name__}")
        shared = PriorOptions(
            "",
            negative_prior_prompt,
            num_images_per_prompt=num_images_per_prompt,
            num_inference_steps=num_inference_steps,
            generator=generator,
            latents=latents,
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            guider=guider,
        )
        negative = self._request(dataclasses.replace(shared, prompt=negative_prompt))
        parts: list[PriorRequest | np.ndarray | list[Image.Image]] = [
            self._request(dataclasses.replace(shared, prompt=item))
            if isinstance(item, str)
            else self._pictures(item, f"[{i}]")
            for i, item in enumerate(items)
        ]
        for i, part in enumerate(parts):
            if not isinstance(part, PriorRequest) and len(part) != 1:
                raise ValueError(f"images_and_prompts[{i}] has {len(part)} pictures; give each an item and a weight")

        mixed = np.zeros((negative.images, self.prior.config.embedding_dim), np.float32)
        for part, weight in zip(parts, numbers, strict=True):
            embeds = self._embed(part)[0] if isinstance(part, PriorRequest) else self._encode_pictures(part)
            mixed += np.float32(weight) * embeds
        if negative_prompt == "" and negative_prior_prompt is None:
            # The reference generates an embedding of "" here and drops it, but its generator has advanced.
            source = noise_source(generator, negative.images, PRIOR_STREAM)
            source.skip((latents is None) + int(negative.schedule.draws_noise.sum()), mixed.shape)
            negative_embeds = np.repeat(self._zero_embed(), negative.images, axis=0)
        else:
            negative_embeds = self._embed(negative)[1 if negative_prompt == "" else 0]
        return KandinskyPriorPipelineOutput(jnp.asarray(mixed), jnp.asarray(negative_embeds))

    # Before the loop ----------------------------------------------------------------------------------------------

    def _request(self, options: CallOptions) -> PriorRequest:
        """Check the options of a call."""
        given = vars(options)
        prompts = checks.texts(given["prompt"], "prompt")
        repeats = checks.count(given["num_images_per_prompt"], "num_images_per_prompt")
        negatives = checks.negative_texts(given["negative_prompt"], prompts)
        steps = given["num_inference_steps"]
        schedule = self.scheduler.schedule(steps, checks.skipped(given.get("strength"), self.scheduler.steps(steps)))
        guidance = choose_guider(given["guider"], checks.guidance(given["guidance_scale"]), self.prior)
        guidance.check(schedule)
        pictures = self._pictures(given["image"], "") if "image" in given else None
        if pictures is not None:
            checks.picture_count(len(pictures), "image", len(prompts), repeats)
        total = len(prompts + (negatives or [])) * repeats
        callback, callback_inputs = given["callback_on_step_end"], given["callback_on_step_end_tensor_inputs"]
        return PriorRequest(
            prompts=prompts,
            negatives=negatives,
            repeats=repeats,
            schedule=schedule,
            guidance=guidance,
            interval=checks.interval(given["guidance_interval"], len(schedule)),
            generator=given["generator"],
            latents=checks.latents(given.get("latents"), (total, self.prior.config.embedding_dim)),
            image=pictures,
            callback=callback,
            callback_inputs=checks.callback(callback, callback_inputs, self._callback_tensor_inputs),
        )

    def _pictures(self, value: object, which: str) -> np.ndarray | list[Image.Image]:
        """Read image inputs: as embeddings `[N, D]`, as pixels for CLIP `[N, S, S, 3]`, or as pictures."""
        name, side = f"images_and_prompts{which}" if which else "image", self._held()["image_encoder"].config.image_size
        dim = self.prior.config.embedding_dim
        parts = value if isinstance(value, list | tuple) else [value]
        arrays = [to_numpy(x, name) for x in parts if hasattr(x, "__array__") and not isinstance(x, Image.Image)]
        if arrays and len(arrays) == len(parts):
            # In `interpolate`, a 2D array of another shape is a grey picture.
            if all(x.ndim == 2 and (not which or x.shape == (1, dim)) for x in arrays):
                return checks.embeds(arrays, name, dim)
            if all(x.ndim == 4 and x.shape[1:] == (3, side, side) for x in arrays):
                pixels = np.concatenate(arrays).astype(np.float32)
                if not np.isfinite(pixels).all():
                    raise ValueError(f"{name} has numbers that are not finite")
                return pixels.transpose(0, 2, 3, 1)
        return images.embeddable(value, name)

    def _encode_pictures(self, pictures: np.ndarray | list[Image.Image]) -> np.ndarray:
        """Encode the result of `_pictures` as image embeddings `[N, D]`, one at a time on each device."""
        if isinstance(pictures, np.ndarray) and pictures.ndim == 2:
            return pictures.astype(np.float32)
        network, params = Network.split(self.image_encoder)
        pixels = [self.image_processor(x) if isinstance(x, Image.Image) else x[None] for x in pictures]
        parts = [np.concatenate(pixels[i : i + network.devices]) for i in range(0, len(pixels), network.devices)]
        return np.concatenate([np.asarray(call(network, params, jnp.asarray(x)), np.float32) for x in parts])

    def _initial_latents(self, request: PriorRequest, source: Source) -> list[jax.Array]:
        """Return the first latents of each batch, `[images, D]`."""
        shape = (request.images, self.prior.config.embedding_dim)
        if request.latents is not None:
            noise = [jnp.asarray(x) for x in np.split(request.latents, request.batches)]
        else:
            noise = source.initial(shape, request.batches)
        if request.image is None:
            return [x * request.schedule.init_noise_sigma for x in noise]
        encoded = self._encode_pictures(request.image)
        embeds = checks.per_picture(encoded, "image", len(request.prompts), request.repeats)
        return [linear_combination(request.schedule.levels[:1], jnp.asarray(embeds), x) for x in noise]

    # The loop -----------------------------------------------------------------------------------------------------

    def _call(self, options: CallOptions) -> PriorResult:
        """Run a call: all checks first, then the loop."""
        given = vars(options)
        output_type = checks.choice(given["output_type"], "output_type", ("pt", "np"))
        result: tuple[Embeds, Embeds] = self._embed(self._request(options))
        if output_type == "pt":
            result = (jnp.asarray(result[0]), jnp.asarray(result[1]))
        return KandinskyPriorPipelineOutput(*result) if given["return_dict"] else result

    def _embed(self, request: PriorRequest) -> tuple[np.ndarray, np.ndarray]:
        """Generate image embeddings and negative ones, float32 `[images, D]`."""
        source = noise_source(request.generator, request.images, PRIOR_STREAM)
        cond = self._encode_cond(request)
        uncond = self._encode_uncond(request, cond) if request.guidance.uses_uncond else None
        samples, _ = self._denoise(
            self.prior,
            PriorInputs(self, request, cond, uncond),
            request.schedule,
            self._initial_latents(request, source),
            source,
            request.guidance,
            request.callback,
            request.callback_inputs,
            request.interval,
        )
        network, params = Network.split(self.prior)
        embeds = [np.asarray(call(network, params, x, method="post_process_latents"), np.float32) for x in samples]
        if request.negatives is None:
            return embeds[0], np.repeat(self._zero_embed(), request.images, axis=0)
        return embeds[0], embeds[1]

    def _condition(
        self, network: Network, params: Params, cond: TextEncoding, uncond: TextEncoding | None, empty: bool
    ) -> LoopInputs:
        """Compute the conditioning of one batch.

        Args:
            uncond: None where guidance is off.
            empty: uncond is the empty prompt, whose condition is a constant of the weights and computed once.
        """

        def condition_of(text: TextEncoding) -> PriorCondition:
            arguments = {name: jnp.asarray(x) for name, x in zip(_ARGUMENTS, text, strict=True)}
            return condition(network, params, arguments, method="condition_of_texts")[0]

        conditional = condition_of(cond)
        if uncond is None:
            return LoopInputs(conditional)
        if not empty:
            return LoopInputs(conditional, condition_of(uncond))
        # Computed in this call's shapes, so that no program is compiled for it; and anew for other shapes, or its last
        # bits would depend on which batch came first.
        shape = conditional.visible.shape
        one = self._constant(
            "condition", lambda: _first_example(condition_of(uncond)), self.prior, self.text_encoder, shape=shape
        )
        return LoopInputs(conditional, shard_condition(network, _repeated(one, images=shape[0])))

    # Text ---------------------------------------------------------------------------------------------------------

    def _encode_cond(self, request: PriorRequest, warn: bool = True) -> TextEncoding:
        """Encode the prompts and then the negative prompts, each repeated for its images, `[batches * images, ...]`.

        Args:
            warn: whether to warn of prompts that are cut.
        """
        parts = [self._encode(texts, warn) for texts in (request.prompts, request.negatives) if texts is not None]
        return TextEncoding(
            *(np.repeat(np.concatenate(arrays), request.repeats, axis=0) for arrays in zip(*parts, strict=True))
        )

    def _encode_uncond(self, request: PriorRequest, cond: TextEncoding) -> TextEncoding:
        """Return what cond is guided away from: the negative prompts, for both batches, or the empty prompt."""
        if request.negatives is not None:
            return TextEncoding(*(np.concatenate([x[request.images :]] * 2) for x in cond))
        empty = self._constant("empty", lambda: self._encode([""]), self.text_encoder)
        return TextEncoding(*(np.repeat(x, request.images, axis=0) for x in empty))

    def _encode(self, texts: list[str], warn: bool = True) -> TextEncoding:
        ids, mask = self._tokenize(texts, warn)
        output = call(*Network.split(self.text_encoder), jnp.asarray(ids))
        return TextEncoding(np.asarray(output.text_embeds), np.asarray(output.last_hidden_state), mask)

    def _tokenize(self, texts: list[str], warn: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Return token ids, int32 `[B, T]`, and a mask of those that are not padding, bool `[B, T]`."""
        length = self.text_encoder.config.max_position_embeddings
        for text in texts if warn else ():
            full = whole_text(self.tokenizer, text)
            if len(full) > length:
                dropped = self.tokenizer.decode(full[length - 1 : -1])
                warnings.warn(
                    f"CLIP reads at most {length} tokens; of a prompt with {len(full)}, this was cut: "
                    f"{quote(dropped, 200)}",
                    stacklevel=5,
                )
        return tokenize(self.tokenizer, texts, length)

    def get_zero_embed(self, batch_size: int = 1, device: object = None) -> jax.Array:
        """Return the vision tower's embedding of zeros, `[batch_size, D]`: the default negative embedding."""
        return jnp.asarray(np.repeat(self._zero_embed(), checks.count(batch_size, "batch_size"), axis=0))

    def _zero_embed(self) -> np.ndarray:
        """Return the embedding of zeros (after normalisation), `[1, D]`; it depends only on the weights."""
        tower = self._held()["image_encoder"]
        return self._constant("zero", lambda: zero_embed.of(tower), tower)

    def _constant(
        self, name: str, compute: Callable[[], object], *owners: object, shape: tuple[int, ...] = ()
    ) -> PyTree:
        """Cache a result that depends only on its owners' weights; computed anew when one changes, as LoRA does."""
        parts = [part for owner in owners for part in _parts(owner)]
        kept, kept_shape, result = self._constants.get(name, ([], (), None))
        same = [own for own, _ in kept] == [own for own, _ in parts]
        same = same and all(a is b for (_, a), (_, b) in zip(kept, parts, strict=True))
        if kept_shape != shape or not same:
            result = compute()
            self._constants[name] = (parts, shape, result)
        return result


def _parts(owner: object) -> list[tuple[str, object]]:
    """Return a network and its arrays by name, whose identity changes when it is loaded, replaced or changed.

    The network is one of them, because another one may share its arrays, with another attention.
    """
    return [("", owner)] + ([] if isinstance(owner, LazyNetwork) else list(flat_params(owner).items()))


def _first_example(condition: PriorCondition) -> PriorCondition:
    """Return the first example; sliced on the host, where no program is compiled for every batch size."""
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x)[:1]), condition)


@program(static_argnames="images")
def _repeated(condition: PriorCondition, images: int) -> PriorCondition:
    return jax.tree.map(lambda x: jnp.repeat(x, images, axis=0), condition)
