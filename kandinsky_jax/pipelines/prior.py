"""prompt -> tokenizer -> CLIP text tower -> prior loop -> CLIP image embedding.

Reference: diffusers' KandinskyV22PriorPipeline.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kandinsky_jax import hub
from kandinsky_jax.images import CLIPImageProcessor
from kandinsky_jax.models import CLIPTextModelWithProjection, CLIPVisionModelWithProjection, PriorTransformer
from kandinsky_jax.noise import PRIOR, Generator, noise_source
from kandinsky_jax.pipelines import checks
from kandinsky_jax.pipelines.base import Callback, Pipeline
from kandinsky_jax.sampling import Network, call
from kandinsky_jax.schedulers import Scheduler

if TYPE_CHECKING:
    from transformers import CLIPTokenizer


class KandinskyPriorPipelineOutput(NamedTuple):
    """image_embeds, negative_image_embeds: `[B, D]`, what the decoders take."""

    image_embeds: Any
    negative_image_embeds: Any


class Encoded(NamedTuple):
    """Texts after the text tower, NumPy; rows may be repeated and joined without another compilation."""

    prompt_embeds: np.ndarray  # [B, projection_dim]
    hidden_states: np.ndarray  # [B, T, hidden_size]
    mask: np.ndarray  # bool [B, T]


class KandinskyV22PriorPipeline(Pipeline):
    """Draws a CLIP image embedding for a prompt.

    Args:
        prior, image_encoder, text_encoder, tokenizer, scheduler, image_processor: as in diffusers.
    """

    REPOSITORY: ClassVar[str] = hub.PRIOR
    STAGE: ClassVar[str] = "prior"
    ACCEPTS: ClassVar[frozenset[str]] = frozenset(
        {"KandinskyV22PriorPipeline", "KandinskyV22PriorEmb2EmbPipeline", "KandinskyPriorPipeline"}
    )
    _callback_tensor_inputs = ("latents", "prompt_embeds", "text_encoder_hidden_states", "text_mask")

    prior: PriorTransformer
    image_encoder: CLIPVisionModelWithProjection
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
        self._constants: dict[str, tuple[Any, Any]] = {}

    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        num_inference_steps: int = 25,
        generator: Generator = None,
        latents: Any = None,
        guidance_scale: float = 4.0,
        output_type: str = "pt",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = ("latents",),
    ) -> KandinskyPriorPipelineOutput | tuple[Any, Any]:
        """Draw image embeddings.

        Args:
            prompt: one or more, at most 77 tokens each (longer ones are cut, with a warning).
            negative_prompt: one for each prompt, or one string for all. Its embedding comes from the prior too, and is
                what the decoder is guided away from.
            num_images_per_prompt: embeddings per prompt, neighbours in the result.
            num_inference_steps: at least 2.
            generator: see `kandinsky_jax.noise.noise_source`.
            latents: first noise, `[B, D]`, B doubled where there is a negative prompt.
            guidance_scale: guidance is on above 1.
            output_type: "pt" for JAX arrays, "np" for NumPy.
            return_dict: False for a plain tuple.
            callback_on_step_end: `(pipe, step, timestep, tensors) -> tensors` after each step, on NumPy arrays.
            callback_on_step_end_tensor_inputs: which tensors: latents, prompt_embeds, text_encoder_hidden_states,
                text_mask.
        Returns:
            image_embeds and negative_image_embeds, float32 `[B, D]`. Without a negative prompt the latter is the vision
            tower's embedding of zeros.
        """
        prompts = checks.texts(prompt, "prompt")
        negatives = checks.negative_texts(negative_prompt, prompts)
        images = len(prompts) * checks.count(num_images_per_prompt, "num_images_per_prompt")
        lanes = 1 if negatives is None else 2
        checks.choice(output_type, "output_type", ("pt", "np"))
        inputs = checks.callback(callback_on_step_end, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        scale = checks.guidance(guidance_scale)
        schedule = self.scheduler.schedule(num_inference_steps)
        shape = (images, self.prior.config.embedding_dim)
        first = checks.latents(latents, (lanes * images, shape[1]))
        source = noise_source(generator, images, PRIOR)

        tensors = self._encode_prompts(prompts, negatives, num_images_per_prompt, guided=scale > 1)
        starts = source.initial(shape, lanes) if first is None else [jnp.asarray(x) for x in np.split(first, lanes)]

        def conditions(network: Network, params: Any, tensors: Mapping[str, Any]) -> list[Any]:
            return [call(network, params, *_lane(tensors, lanes, i, images), method="condition") for i in range(lanes)]

        samples = self._denoise(
            self.prior,
            conditions,
            tensors,
            schedule,
            [x * schedule.init_noise_sigma for x in starts],
            source,
            scale,
            callback_on_step_end,
            inputs,
        )
        network, params = Network.split(self.prior)
        embeds = [np.asarray(call(network, params, x, method="post_process_latents"), np.float32) for x in samples]
        negative = np.repeat(self._zero_embed(), images, axis=0) if negatives is None else embeds[1]
        result: tuple[Any, Any] = (embeds[0], negative)
        if output_type == "pt":
            result = (jnp.asarray(embeds[0]), jnp.asarray(negative))
        return KandinskyPriorPipelineOutput(*result) if return_dict else result

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
            empty = self._constant("empty", self.text_encoder, lambda: self._encode([""]))
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
                    f"CLIP reads at most {length} tokens; of a prompt with {len(full)}, this was cut: {dropped!r}",
                    stacklevel=5,
                )
        tokens = self.tokenizer(
            texts, padding="max_length", max_length=length, truncation=True, return_tensors="np", verbose=False
        )
        return tokens.input_ids.astype(np.int32), tokens.attention_mask.astype(bool)

    def _zero_embed(self) -> np.ndarray:
        """The embedding of zeros (after normalisation), `[1, D]`: it depends on nothing but the weights."""
        side = self.image_encoder.config.image_size

        def compute() -> np.ndarray:
            zeros = jnp.zeros((1, side, side, self.image_encoder.config.num_channels), jnp.float32)
            return np.asarray(call(*Network.split(self.image_encoder), zeros), np.float32)

        return self._constant("zero", self.image_encoder, compute)

    def _constant(self, name: str, owner: Any, compute: Any) -> Any:
        """A result that only `owner`'s weights decide, computed once."""
        if name not in self._constants or self._constants[name][0] is not owner:
            self._constants[name] = (owner, compute())
        return self._constants[name][1]


def _lane(tensors: Mapping[str, Any], lanes: int, lane: int, images: int) -> list[jax.Array]:
    """One lane's rows of the conditioning tensors, the unconditional half before the conditional."""

    def rows(name: str) -> jax.Array:
        array = np.asarray(tensors[name])
        halves = array.reshape(-1, lanes, images, *array.shape[1:])
        return jnp.asarray(halves[:, lane].reshape(-1, *array.shape[1:]))

    return [rows(name) for name in ("prompt_embeds", "text_encoder_hidden_states", "text_mask")]
