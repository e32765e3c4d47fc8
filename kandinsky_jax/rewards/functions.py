"""Rewards that come along: CLIP similarity, which has a gradient, and compressibility, which has none."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from PIL import Image

from kandinsky_jax import images as pictures
from kandinsky_jax.checkpoint.tokenizer import tokenize
from kandinsky_jax.common.types import Array, Float, Int, Params
from kandinsky_jax.diffusion import Network, matmul_precision
from kandinsky_jax.diffusion.calls import call


class Reward(Protocol):
    """A function of pictures; higher is better.

    A reward that has arrays, such as a network's, is best a pytree of them, as `ClipSimilarity` is: they are then
    arguments of compiled programs. Those in a function's closure are compiled into them.
    """

    def __call__(self, images: jax.Array, prompts: jax.Array, /) -> ArrayLike:
        """Score pictures.

        Args:
            images: float32 `[B, H, W, 3]` in 0..1.
            prompts: int32 `[B]`, the number of each picture's prompt. What that is the number of is known to those who
                make the reward; one that looks at pictures alone ignores it.
        Returns:
            `[B]`. For `train_draft` and `optimize_noise` a differentiable function in JAX, for `train_ddpo` any
            function, which gets NumPy arrays.
        """


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ClipSimilarity:
    """The cosine of a picture's and its prompt's embeddings by CLIP's towers (Radford et al. 2021, arXiv 2103.00020).

    Differentiable in the pictures. Calls take `(images, prompts)`, see `Reward`; without `prompts`, picture i is
    compared with text i, or all with one text.

    Args:
        tower: structure of the vision tower.
        params: of the tower.
        texts: embeddings of the prompts `[P, D]`, of length 1.
        processor: resizes, crops and normalises, see `preprocess`.
    """

    tower: Network = dataclasses.field(metadata={"static": True})
    params: Params
    texts: jax.Array
    processor: pictures.CLIPImageProcessor = dataclasses.field(metadata={"static": True})

    @classmethod
    def from_pipeline(cls, prior_pipe: Any, prompts: Sequence[str]) -> ClipSimilarity:
        """Take the towers of a prior's pipeline, and encode prompts.

        Args:
            prior_pipe: of the prior, or a combined one, which has it.
            prompts: texts; number i is prompt i of the reward.
        """
        prior_pipe = getattr(prior_pipe, "prior_pipe", prior_pipe)
        if isinstance(prompts, str):
            prompts = [prompts]
        ids, _ = tokenize(prior_pipe.tokenizer, list(prompts), prior_pipe.text_encoder.config.max_position_embeddings)
        texts = call(*Network.split(prior_pipe.text_encoder), jnp.asarray(ids)).text_embeds.astype(jnp.float32)
        tower, params = Network.split(prior_pipe.image_encoder)
        return cls(tower, params, _normalized(texts), prior_pipe.image_processor)

    def __call__(self, images: Float[Array, "B H W 3"], prompts: Int[Array, "B"] | None = None) -> Float[Array, "B"]:
        texts = self.texts
        if prompts is not None:  # NaN for a prompt that there is not
            texts = texts.at[jnp.asarray(prompts)].get(mode="fill", fill_value=jnp.nan)
        with matmul_precision(self.params):
            tower: Any = self.tower.bind(self.params)
            embeds = tower(preprocess(jnp.asarray(images), self.processor)).astype(jnp.float32)
        return jnp.sum(_normalized(embeds) * texts, axis=-1)


def check_texts(reward: object, count: int) -> None:
    """Raise ValueError for a CLIP similarity that knows fewer prompts than there are embeddings."""
    if isinstance(reward, ClipSimilarity) and len(reward.texts) < count:
        raise ValueError(f"the reward has {len(reward.texts)} prompts; needed is one for each of {count} embeddings")


def _normalized(embeds: jax.Array) -> jax.Array:
    return embeds / jnp.linalg.norm(embeds, axis=-1, keepdims=True)


def preprocess(images: Float[Array, "B H W 3"], processor: pictures.CLIPImageProcessor) -> Float[Array, "B S S 3"]:
    """Preprocess pictures for CLIP's vision tower: what `CLIPImageProcessor` does, in JAX and differentiable.

    The shorter edge is resized (bicubic, antialiased), the middle cut out, and the result normalised. Pillow rounds to
    whole levels after resizing, which this does not: pixels differ by up to about a level of 255.

    Args:
        images: `[B, H, W, 3]` in 0..1.
        processor: sizes, mean and standard deviation; pixels are in 0..1, whatever its `rescale_factor`.
    """
    batch, *sides, _ = images.shape
    height, width = (
        processor.size if side == min(sides) else int(side * (processor.size / min(sides))) for side in sides
    )
    if [height, width] != sides:
        for shape in ((batch, sides[0], width, 3), (batch, height, width, 3)):  # Pillow clips after each axis
            images = jnp.clip(jax.image.resize(images, shape, "cubic", antialias=True), 0, 1)
    top, left = (height - processor.crop) // 2, (width - processor.crop) // 2
    if top < 0 or left < 0:
        raise ValueError(
            f"the processor cuts {processor.crop} pixels out of {processor.size}; needed is a crop of at most the size"
        )
    images = images[:, top : top + processor.crop, left : left + processor.crop]
    return (images - jnp.array(processor.image_mean)) / jnp.array(processor.image_std)


def jpeg_compressibility(images: ArrayLike, prompts: ArrayLike | None = None, *, quality: int = 95) -> np.ndarray:
    """Return the negative size of pictures as JPEG files, float32 `[B]` in kB (1000 bytes).

    On the host, by Pillow, and without a gradient: a reward for `train_ddpo`. Source: Black et al. 2023 (arXiv
    2305.13301), section 6.1, and the settings of its implementation.

    Args:
        images: `[B, H, W, 3]` in 0..1.
        prompts: not looked at.
        quality: of JPEG, 1 to 95.
    Raises:
        TypeError: within a function that JAX transforms.
    """
    if isinstance(images, jax.core.Tracer):
        raise TypeError(
            "the size of a JPEG file is counted on the host and has no gradient; use it as a reward of train_ddpo"
        )
    levels = pictures.to_output(np.asarray(images), "pil")
    return np.array([-_jpeg_bytes(picture, quality) / 1000 for picture in levels], np.float32)


def _jpeg_bytes(picture: Image.Image, quality: int) -> int:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return file.tell()
