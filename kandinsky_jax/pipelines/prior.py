"""prompt -> tokenizer -> CLIP text tower -> prior loop -> CLIP image embedding.

Reference: diffusers' KandinskyV22PriorPipeline and KandinskyV22PriorEmb2EmbPipeline.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from kandinsky_jax import hub, images, zero_embed
from kandinsky_jax.arrays import to_numpy
from kandinsky_jax.checkpoint import Deferred, flat_params
from kandinsky_jax.checkpoint.tokenizer import check_tokenizer, encode
from kandinsky_jax.compilation import program
from kandinsky_jax.errors import quote
from kandinsky_jax.images import CLIPImageProcessor
from kandinsky_jax.models import CLIPTextModelWithProjection, CLIPVisionModelWithProjection, PriorTransformer
from kandinsky_jax.models.prior import PriorCondition
from kandinsky_jax.noise import PRIOR, Generator, Source, noise_source
from kandinsky_jax.pipelines import checks
from kandinsky_jax.pipelines.base import Callback, Late, Pipeline
from kandinsky_jax.pipelines.outputs import KandinskyPriorPipelineOutput
from kandinsky_jax.sampling import Lane, Network, call, condition, place_halves
from kandinsky_jax.schedulers import Schedule, Scheduler
from kandinsky_jax.schedulers.base import mix

if TYPE_CHECKING:
    from transformers import CLIPTokenizer


class Encoded(NamedTuple):
    """Texts after the text tower, NumPy; rows may be repeated and joined without another compilation."""

    prompt_embeds: np.ndarray  # [B, projection_dim]
    hidden_states: np.ndarray  # [B, T, hidden_size]
    mask: np.ndarray  # bool [B, T]


class Wish(NamedTuple):
    """A call after its checks; nothing is compiled or drawn yet."""

    prompts: list[str]
    negatives: list[str] | None
    repeats: int
    schedule: Schedule
    scale: float
    generator: Generator
    latents: np.ndarray | None  # the user's first noise
    image: np.ndarray | list[Image.Image] | None  # of what to start from: see `_pictures`
    callback: Callback | None
    callback_inputs: tuple[str, ...]

    @property
    def images(self) -> int:
        """How many embeddings are wanted."""
        return len(self.prompts) * self.repeats

    @property
    def lanes(self) -> int:
        """Negative prompts are drawn beside the prompts."""
        return 1 if self.negatives is None else 2


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
    image_encoder = Late()  # a CLIPVisionModelWithProjection
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
        self._constants: dict[str, tuple[list[Any], tuple[int, ...], Any]] = {}

    def interpolate(
        self,
        images_and_prompts: Sequence[Any],
        weights: Sequence[float],
        num_images_per_prompt: int = 1,
        num_inference_steps: int = 25,
        generator: Generator = None,
        latents: Any = None,
        negative_prior_prompt: str | None = None,
        negative_prompt: str = "",
        guidance_scale: float = 4.0,
    ) -> KandinskyPriorPipelineOutput:
        """Mix prompts and pictures: the sum of their image embeddings, each times its weight.

        Args:
            images_and_prompts: strings are prompts; pictures are PIL pictures, `pathlib.Path`s, arrays `[H, W, 3]`
                (see `kandinsky_jax.images`), or `[1, 3, S, S]`, which go into the vision tower as they are; `[1, D]` is
                a ready embedding.
            weights: one number for each; they are not normalised.
            num_images_per_prompt: embeddings to draw.
            num_inference_steps, latents, guidance_scale: of the prior, for each prompt; see `__call__`.
            generator: a `TorchGenerator` goes on from item to item. With a seed or a key, every prompt gets the noise
                that it would get alone.
            negative_prior_prompt: the negative prompt for each of the prompts.
            negative_prompt: what the decoder is guided away from; "" is the vision tower's embedding of zeros, or that
                of `negative_prior_prompt`.
        Returns:
            image_embeds and negative_image_embeds, float32 JAX arrays `[num_images_per_prompt, D]`.
        """
        items, numbers = checks.mix(images_and_prompts, weights)
        if not isinstance(negative_prompt, str):
            raise TypeError(f"negative_prompt must be a string, got {type(negative_prompt).__name__}")
        shared = {
            "num_images_per_prompt": num_images_per_prompt,
            "num_inference_steps": num_inference_steps,
            "generator": generator,
            "latents": latents,
            "guidance_scale": guidance_scale,
        }
        negative = self._wish(negative_prompt, negative_prior_prompt, **shared)
        parts: list[Wish | np.ndarray | list[Image.Image]] = [
            self._wish(item, negative_prior_prompt, **shared)
            if isinstance(item, str)
            else self._pictures(item, f"[{i}]")
            for i, item in enumerate(items)
        ]
        for i, part in enumerate(parts):
            if not isinstance(part, Wish) and len(part) != 1:
                raise ValueError(f"images_and_prompts[{i}] has {len(part)} pictures; give each an item and a weight")

        mixed = np.zeros((negative.images, self.prior.config.embedding_dim), np.float32)
        for part, weight in zip(parts, numbers, strict=True):
            embeds = self._embed(part)[0] if isinstance(part, Wish) else self._encode_pictures(part)
            mixed += np.float32(weight) * embeds
        if negative_prompt == "" and negative_prior_prompt is None:
            # The reference draws an embedding of "" here and drops it; its generator goes on nevertheless.
            source = noise_source(generator, negative.images, PRIOR)
            source.skip((latents is None) + int(negative.schedule.draws_noise.sum()), mixed.shape)
            without = np.repeat(self._zero_embed(), negative.images, axis=0)
        else:
            without = self._embed(negative)[1 if negative_prompt == "" else 0]
        return KandinskyPriorPipelineOutput(jnp.asarray(mixed), jnp.asarray(without))

    # Before the loop ----------------------------------------------------------------------------------------------

    def _wish(
        self,
        prompt: Any,
        negative_prompt: Any,
        *,
        num_images_per_prompt: Any,
        num_inference_steps: Any,
        generator: Generator,
        guidance_scale: Any,
        latents: Any = None,
        image: Any = None,
        strength: Any = None,
        callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: Any = None,
    ) -> Wish:
        """Check a call."""
        prompts = checks.texts(prompt, "prompt")
        repeats = checks.count(num_images_per_prompt, "num_images_per_prompt")
        negatives = checks.negative_texts(negative_prompt, prompts)
        skipped = checks.skipped(strength, self.scheduler.steps(num_inference_steps))
        schedule = self.scheduler.schedule(num_inference_steps, skipped)
        pictures = None if image is None else self._pictures(image, "")
        if pictures is not None:
            checks.picture_count(len(pictures), "image", len(prompts), repeats)
        rows = len(prompts + (negatives or [])) * repeats
        return Wish(
            prompts=prompts,
            negatives=negatives,
            repeats=repeats,
            schedule=schedule,
            scale=checks.guidance(guidance_scale),
            generator=generator,
            latents=checks.latents(latents, (rows, self.prior.config.embedding_dim)),
            image=pictures,
            callback=callback_on_step_end,
            callback_inputs=checks.callback(
                callback_on_step_end, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs
            ),
        )

    def _pictures(self, value: Any, which: str) -> np.ndarray | list[Image.Image]:
        """What is to become image embeddings: embeddings `[N, D]`, pixels for CLIP `[N, S, S, 3]`, or pictures."""
        name, side = f"images_and_prompts{which}" if which else "image", self._held()["image_encoder"].config.image_size
        dim = self.prior.config.embedding_dim
        parts = value if isinstance(value, list | tuple) else [value]
        arrays = [to_numpy(x, name) for x in parts if hasattr(x, "__array__") and not isinstance(x, Image.Image)]
        if arrays and len(arrays) == len(parts):
            # In a mix, a plane of another shape is a grey picture.
            if all(x.ndim == 2 and (not which or x.shape == (1, dim)) for x in arrays):
                return checks.embeds(arrays, name, dim)
            if all(x.ndim == 4 and x.shape[1:] == (3, side, side) for x in arrays):
                pixels = np.concatenate(arrays).astype(np.float32)
                if not np.isfinite(pixels).all():
                    raise ValueError(f"{name} has numbers that are not finite")
                return pixels.transpose(0, 2, 3, 1)
        return images.embeddable(value, name)

    def _encode_pictures(self, pictures: np.ndarray | list[Image.Image]) -> np.ndarray:
        """What `_pictures` found as image embeddings, `[N, D]`; one by one, by one program."""
        if isinstance(pictures, np.ndarray) and pictures.ndim == 2:
            return pictures.astype(np.float32)
        network, params = Network.split(self.image_encoder)
        pixels = [self.image_processor(x) if isinstance(x, Image.Image) else x[None] for x in pictures]
        parts = [np.concatenate(pixels[i : i + network.devices]) for i in range(0, len(pixels), network.devices)]
        return np.concatenate([np.asarray(call(network, params, jnp.asarray(x)), np.float32) for x in parts])

    def _first(self, wish: Wish, source: Source) -> list[jax.Array]:
        """The first latents of each lane, `[images, D]`."""
        shape = (wish.images, self.prior.config.embedding_dim)
        if wish.latents is not None:
            noise = [jnp.asarray(x) for x in np.split(wish.latents, wish.lanes)]
        else:
            noise = source.initial(shape, wish.lanes)
        if wish.image is None:
            return [x * wish.schedule.init_noise_sigma for x in noise]
        embeds = checks.per_picture(self._encode_pictures(wish.image), "image", len(wish.prompts), wish.repeats)
        return [mix(wish.schedule.levels[:1], jnp.asarray(embeds), x) for x in noise]

    # The loop -----------------------------------------------------------------------------------------------------

    def _call(
        self, prompt: Any, negative_prompt: Any, output_type: str, return_dict: bool, **arguments: Any
    ) -> KandinskyPriorPipelineOutput | tuple[Any, Any]:
        """A prior's call: every check, then the drawing."""
        checks.choice(output_type, "output_type", ("pt", "np"))
        result: tuple[Any, Any] = self._embed(self._wish(prompt, negative_prompt, **arguments))
        if output_type == "pt":
            result = (jnp.asarray(result[0]), jnp.asarray(result[1]))
        return KandinskyPriorPipelineOutput(*result) if return_dict else result

    def _embed(self, wish: Wish) -> tuple[np.ndarray, np.ndarray]:
        """Draw what was wished for: image embeddings and negative ones, float32 `[images, D]`."""
        source = noise_source(wish.generator, wish.images, PRIOR)
        tensors = self._encode_prompts(wish.prompts, wish.negatives, wish.repeats, guided=wish.scale > 1)
        first = dict(tensors)

        def lanes_of(network: Network, params: Any, tensors: Mapping[str, Any], guided: bool) -> list[Lane]:
            images = wish.images * wish.lanes
            rows = {name: checks.halves(tensors[name], name, images) for name in first}
            # A callback may have put something else in the empty prompt's place.
            empty = wish.negatives is None and all(tensors[name] is given for name, given in first.items())
            if not guided:
                rows = {name: x[-images:] for name, x in rows.items()}
            elif any(len(x) == images for x in rows.values()):  # a callback has turned guidance on
                both = self._encode_prompts(wish.prompts, wish.negatives, wish.repeats, guided=True)
                rows = {k: np.concatenate([both[k][:images], x]) if len(x) == images else x for k, x in rows.items()}
                empty = wish.negatives is None
            lanes = [_lane(rows, wish.lanes, i, wish.images) for i in range(wish.lanes)]
            return [Lane(self._condition(network, params, halves, empty)) for halves in lanes]

        samples = self._denoise(
            self.prior,
            lanes_of,
            tensors,
            wish.schedule,
            self._first(wish, source),
            source,
            wish.scale,
            wish.callback,
            wish.callback_inputs,
        )
        network, params = Network.split(self.prior)
        embeds = [np.asarray(call(network, params, x, method="post_process_latents"), np.float32) for x in samples]
        return embeds[0], np.repeat(self._zero_embed(), wish.images, axis=0) if wish.negatives is None else embeds[1]

    def _condition(
        self, network: Network, params: Any, halves: Sequence[Sequence[jax.Array]], empty: bool
    ) -> PriorCondition:
        """What one lane's steps are under.

        Args:
            halves: arguments of the network's `condition`, the unconditional rows before the conditional, where
                guidance is on.
            empty: the unconditional rows are the empty prompt; what they contribute is a constant of the weights.
        """

        def of(rows: Sequence[jax.Array]) -> PriorCondition:
            return condition(network, params, *(x[None] for x in rows))

        given = of(halves[-1])
        if len(halves) == 1:
            return given
        if not empty:
            return _joined(of(halves[0]), given)
        # Computed in this call's shapes, so that the constant does not cost a program of its own either; and again in
        # another's, or its last bits would tell which batch came first.
        shape = given.visible.shape
        one = self._constant("condition", lambda: _first_row(of(halves[0])), self.prior, self.text_encoder, shape=shape)
        return _joined(place_halves(network, _repeated(one, images=given.visible.shape[1])), given)

    # Text ---------------------------------------------------------------------------------------------------------

    def _encode_prompts(
        self, prompts: list[str], negatives: list[str] | None, repeats: int, guided: bool
    ) -> dict[str, np.ndarray]:
        """The tensors that condition the prior, by the reference's names and in its order of rows.

        Rows: [unconditional rows, conditional rows], each [prompts, negative prompts], each repeated for its images.
        With negative prompts, these are the unconditional rows of both lanes.
        """
        given = self._encode(prompts)
        lanes = [given]
        if negatives is not None:
            lanes.append(self._encode(negatives))
        halves = [lanes]
        if guided:
            empty = self._constant("empty", lambda: self._encode([""]), self.text_encoder)
            without = lanes[1] if negatives is not None else Encoded(*(np.repeat(x, len(prompts), 0) for x in empty))
            halves.insert(0, [without] * len(lanes))
        blocks = [block for half in halves for block in half]
        rows = [np.repeat(np.concatenate(parts), repeats, axis=0) for parts in zip(*blocks, strict=True)]
        return dict(zip(("prompt_embeds", "text_encoder_hidden_states", "text_mask"), rows, strict=True))

    def _encode(self, texts: list[str]) -> Encoded:
        ids, mask = self._tokenize(texts)
        output = call(*Network.split(self.text_encoder), jnp.asarray(ids))
        return Encoded(np.asarray(output.text_embeds), np.asarray(output.last_hidden_state), mask)

    def _tokenize(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids, int32 `[B, T]`, and which of them are not padding, bool `[B, T]`."""
        length = self.text_encoder.config.max_position_embeddings
        for text in texts:
            full = self.tokenizer(text, verbose=False).input_ids
            if len(full) > length:
                dropped = self.tokenizer.decode(full[length - 1 : -1])
                warnings.warn(
                    f"CLIP reads at most {length} tokens; of a prompt with {len(full)}, this was cut: "
                    f"{quote(dropped, 200)}",
                    stacklevel=5,
                )
        return encode(self.tokenizer, texts, length)

    def get_zero_embed(self, batch_size: int = 1, device: Any = None) -> jax.Array:
        """The vision tower's embedding of zeros, `[batch_size, D]`: the negative one without a negative prompt."""
        return jnp.asarray(np.repeat(self._zero_embed(), checks.count(batch_size, "batch_size"), axis=0))

    def _zero_embed(self) -> np.ndarray:
        """The embedding of zeros (after normalisation), `[1, D]`: it depends on nothing but the weights."""
        tower = self._held()["image_encoder"]
        return self._constant("zero", lambda: zero_embed.of(tower), tower)

    def _constant(self, name: str, compute: Callable[[], Any], *owners: Any, shape: tuple[int, ...] = ()) -> Any:
        """A result that only its owners' weights decide, computed once; again when a weight has changed, as by LoRA."""
        weights = [leaf for owner in owners for leaf in _weights(owner)]
        kept, of, result = self._constants.get(name, ([], (), None))
        if of != shape or len(kept) != len(weights) or any(a is not b for a, b in zip(kept, weights, strict=True)):
            result = compute()
            self._constants[name] = (weights, shape, result)
        return result


def _weights(owner: Any) -> list[Any]:
    """What tells whether a network is as it was: its arrays, or that which will read them."""
    return [owner] if isinstance(owner, Deferred) else list(flat_params(owner).values())


def _first_row(condition: PriorCondition) -> PriorCondition:
    """By way of the host: a program for it would be compiled again for a batch of another size."""
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x)[:, :1]), condition)


@program(static_argnames="images")
def _repeated(condition: PriorCondition, images: int) -> PriorCondition:
    return jax.tree.map(lambda x: jnp.repeat(x, images, axis=1), condition)


@program()
def _joined(first: PriorCondition, second: PriorCondition) -> PriorCondition:
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y]), first, second)


def _lane(tensors: Mapping[str, np.ndarray], lanes: int, lane: int, images: int) -> list[list[jax.Array]]:
    """One lane's rows of the conditioning tensors, `[images, ...]` each; the unconditional half before the other."""
    arrays = [tensors[n] for n in ("prompt_embeds", "text_encoder_hidden_states", "text_mask")]
    halves = zip(*(array.reshape(-1, lanes, images, *array.shape[1:])[:, lane] for array in arrays), strict=True)
    return [[jnp.asarray(rows) for rows in half] for half in halves]
