"""Randomness, per image.

A pipeline's `generator` argument becomes one noise source. A job is one or more batches of B examples each (a prior
with negative prompts has two), which run the same program one after the other. With JAX keys, image i of a job draws
from `fold_in(key, i)`: the same picture comes out whatever the batch, the mesh or the host. With a `TorchGenerator` the
draws are those of `torch.Generator("cpu")`, in diffusers' order, so that a seed gives the picture that it gives there.
"""

from __future__ import annotations

import functools
import random
import secrets
import sys
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kandinsky_jax.common.errors import quote
from kandinsky_jax.common.types import Array, Float, Int

# What a key is folded with, so that no two uses of one image's key share numbers.
PRIOR_STREAM, DECODER_STREAM = 0, 1


class TorchGenerator:
    """`torch.Generator("cpu").manual_seed(seed)` and the `torch.randn` that draws from it, in NumPy.

    The stream is Mersenne Twister (mt19937, 32-bit). For 16 numbers or more, torch draws 24-bit uniforms and applies
    Box-Muller to blocks of 16, the first eight of a block being u1 and the last eight u2; a shorter tail draws the
    last 16 numbers afresh. Fewer than 16 numbers are drawn one by one in double precision, by pairs.

    Args:
        seed: 0 .. 2**64 - 1; as in torch, only the lower 32 bits count.
    """

    def __init__(self, seed: int):
        if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**64:
            raise ValueError(f"seed must be an integer from 0 to 2**64 - 1, got {quote(seed)}")
        self.seed = int(seed)
        self._twister = np.random.RandomState(self.seed & 0xFFFFFFFF)
        self._spare: float | None = None  # the second of a pair of double-precision draws

    def __repr__(self) -> str:
        return f"TorchGenerator({self.seed})"

    def randn(self, *shape: int) -> np.ndarray:
        """Standard normal numbers, float32, as `torch.randn(shape, generator=...)` gives them."""
        count = int(np.prod(shape, dtype=np.int64))
        flat = self._blocks(count) if count >= 16 else self._pairs(count)
        return flat.reshape(shape)

    def _bits(self, count: int) -> np.ndarray:
        return self._twister._bit_generator.random_raw(count)

    def _uniform(self, count: int) -> np.ndarray:
        return (self._bits(count) & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)

    def _blocks(self, count: int) -> np.ndarray:
        full = count // 16 * 16
        out = np.empty(count, np.float32)
        uniform = self._uniform(count)
        out[:full] = _box_muller(uniform[:full])
        if full < count:
            out[-16:] = _box_muller(self._uniform(16))
        return out

    def _pairs(self, count: int) -> np.ndarray:
        out = np.empty(count, np.float32)
        for i in range(count):
            if self._spare is None:
                bits = self._bits(4).astype(np.uint64)
                high, low = bits[0::2], bits[1::2]
                u1, u2 = ((high << np.uint64(32) | low) & np.uint64(2**53 - 1)).astype(np.float64) * 2.0**-53
                radius, angle = np.sqrt(-2 * np.log1p(-u2)), 2 * np.pi * u1
                out[i], self._spare = radius * np.cos(angle), float(radius * np.sin(angle))
            else:
                out[i], self._spare = self._spare, None
        return out


def _box_muller(uniform: np.ndarray) -> np.ndarray:
    pairs = uniform.reshape(-1, 2, 8)
    radius = np.sqrt(-2 * np.log(1 - pairs[:, 0]))
    angle = np.float32(2 * np.pi) * pairs[:, 1]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)


# The last but one stands for a `torch.Generator`.
Generator = int | jax.Array | TorchGenerator | Sequence[int] | Sequence[TorchGenerator] | Any | None

# The stream that goes on for a `torch.Generator`, and the generator's state since.
_continued: weakref.WeakKeyDictionary[object, tuple[TorchGenerator, bytes]] = weakref.WeakKeyDictionary()


def from_torch(generator: Any) -> TorchGenerator:
    """The `TorchGenerator` that goes on where a `torch.Generator` is.

    A generator that is as `manual_seed` made it starts a stream. It counts as used from then on, and given again it
    goes on with that stream, as in diffusers from the prior to the decoder.

    Raises:
        ValueError: where somebody else has used it.
    """
    ours, since = _continued.get(generator, (None, b""))
    state = generator.get_state().numpy().tobytes()
    if ours is not None and state == since:
        return ours
    seed = generator.initial_seed()
    if type(generator)(device=generator.device).manual_seed(seed).get_state().numpy().tobytes() != state:
        raise ValueError(
            f"generator is a torch.Generator that has been used since manual_seed({seed}); give a fresh one, or "
            f"kandinsky_jax.TorchGenerator({seed}), which goes on from call to call"
        )
    if generator.device.type != "cpu":
        warnings.warn(
            f"the random numbers are those of torch.Generator('cpu').manual_seed({seed}), not of "
            f"{generator.device.type}'s",
            stacklevel=2,
        )
    sys.modules["torch"].rand(1, generator=generator, device=generator.device)
    ours = TorchGenerator(seed)
    _continued[generator] = ours, generator.get_state().numpy().tobytes()
    return ours


def _is_torch(generator: object) -> bool:
    cls = type(generator)
    return cls.__name__ == "Generator" and cls.__module__.partition(".")[0] == "torch" and "torch" in sys.modules


class KeyNoise(NamedTuple):
    """Noise made on the device: one key per row."""

    keys: jax.Array  # [B]

    def __call__(self, row: Int[Array, ""], shape: tuple[int, ...]) -> Float[Array, "B *s"]:
        """The noise of one step, float32 `shape` = [B, ...]."""
        return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, row + 1), shape[1:]))(self.keys)

    def map(self, function: Callable[[jax.Array, int | None], jax.Array]) -> KeyNoise:
        """A function of each array and its axis of images, None where it has none."""
        return KeyNoise(function(self.keys, 0))


class GivenNoise(NamedTuple):
    """Noise made on the host: the steps from `first` on."""

    values: jax.Array  # [steps, B, ...]
    first: jax.Array  # int

    def __call__(self, row: Int[Array, ""], shape: tuple[int, ...]) -> Float[Array, "B *s"]:
        """The noise of one step, float32 `shape` = [B, ...]."""
        return jax.lax.dynamic_index_in_dim(self.values, row - self.first, keepdims=False)

    def map(self, function: Callable[[jax.Array, int | None], jax.Array]) -> GivenNoise:
        """A function of each array and its axis of images, None where it has none."""
        return GivenNoise(function(self.values, 1), function(self.first, None))


def _check_images(shape: tuple[int, ...], images: int) -> None:
    if tuple(shape[:1]) != (images,):
        raise ValueError(
            f"shape is {list(shape)}; needed is [{images}, ...], since the noise source is for {images} images"
        )


class KeySource:
    """Per-image JAX keys, for one use (`PRIOR_STREAM` or `DECODER_STREAM`)."""

    chunk = None  # any number of steps may be asked for at once

    def __init__(self, keys: jax.Array, use: int):
        self._keys, self._use = keys, use

    def initial(self, shape: tuple[int, ...], batches: int = 1) -> list[jax.Array]:
        """The first latents of each batch, float32 `shape` = [B, ...]."""
        _check_images(shape, len(self._keys))
        return [_initial(noise, tuple(shape)) for noise in self._batches(batches)]

    def steps(
        self, first: int, count: int, drawn: np.ndarray, shape: tuple[int, ...], batches: int = 1
    ) -> list[KeyNoise]:
        """Make the noise of the steps first .. first + count - 1 (evaluations, by their rows of the schedule).

        Args:
            drawn: bool `[evaluations]`, the schedule's `draws_noise`; keys do not need it.
            shape: of the sample, `[B, ...]`.
            batches: how often the program runs with this batch, such as 2 in a prior with negative prompts.
        Returns:
            a `StepNoise` for each batch.
        """
        return self._batches(batches)

    def skip(self, draws: int, shape: tuple[int, ...]) -> None:
        """Go on as if so many draws had been made: keys do not notice."""

    def _batches(self, batches: int) -> list[KeyNoise]:
        return [KeyNoise(_batch_keys(self._keys, self._use, batch)) for batch in range(batches)]


@jax.jit
def _batch_keys(keys: jax.Array, use: int, batch: int) -> jax.Array:
    return jax.vmap(lambda key: jax.random.fold_in(jax.random.fold_in(key, use), batch))(keys)


@functools.partial(jax.jit, static_argnames="shape")
def _initial(noise: KeyNoise, shape: tuple[int, ...]) -> jax.Array:
    return noise(jnp.int32(-1), shape)


@functools.partial(jax.jit, static_argnames="images")
def _image_keys(key: jax.Array, images: int) -> jax.Array:
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(images))


class TorchSource:
    """TorchGenerators, drawn on the host in diffusers' order: one draw for all rows, or one generator per image."""

    chunk = 16  # steps of noise handed to the device at once

    def __init__(self, generators: Sequence[TorchGenerator], images: int):
        self._generators, self._images = generators, images

    def initial(self, shape: tuple[int, ...], batches: int = 1) -> list[jax.Array]:
        """The first latents of each batch, float32 `shape` = [B, ...]."""
        return [jnp.asarray(rows) for rows in self._draw(shape, batches)]

    def steps(
        self, first: int, count: int, drawn: np.ndarray, shape: tuple[int, ...], batches: int = 1
    ) -> list[GivenNoise]:
        """The noise of the steps first .. first + count - 1, for each batch.

        Args:
            drawn: per step, whether it adds noise; the reference draws nothing at a step that does not.
        """
        values = np.zeros((batches, self.chunk, *shape), np.float32)
        for i in range(count):
            if drawn[first + i]:
                values[:, i] = self._draw(shape, batches)
        return [GivenNoise(jnp.asarray(batch), jnp.asarray(first, jnp.int32)) for batch in values]

    def skip(self, draws: int, shape: tuple[int, ...]) -> None:
        """Go on as if so many draws of `shape` had been made."""
        for _ in range(draws):
            self._draw(shape, 1)

    def _draw(self, shape: tuple[int, ...], batches: int) -> np.ndarray:
        _check_images(shape, self._images)
        images, *rest = shape
        if len(self._generators) == 1:
            rows = _draw_nchw(self._generators[0], (batches * images, *rest))
        else:
            rows = np.concatenate([_draw_nchw(g, (1, *rest)) for _ in range(batches) for g in self._generators])
        return rows.reshape(batches, *shape)


def _draw_nchw(generator: TorchGenerator, shape: tuple[int, ...]) -> np.ndarray:
    """A draw in the reference's order of axes, turned to ours: pictures [B, H, W, C], embeddings [B, D]."""
    if len(shape) != 4:
        return generator.randn(*shape)
    b, h, w, c = shape
    return generator.randn(b, c, h, w).transpose(0, 2, 3, 1)


Source = KeySource | TorchSource


def noise_source(generator: Generator, images: int, use: int) -> Source:
    """The noise of `images` images.

    Args:
        generator: an int seed or a JAX key (image i draws from `fold_in(key, i)`); a `TorchGenerator` (one stream for
            the whole batch, as in diffusers, which goes on from call to call), or a `torch.Generator`, see
            `from_torch`; a list of either kind, one per image; None for a fresh seed.
        images: how many.
        use: `PRIOR_STREAM` or `DECODER_STREAM`; keys give each its own numbers, a `TorchGenerator` just goes on.
    """
    if not isinstance(use, jax.Array) and use not in (PRIOR_STREAM, DECODER_STREAM):
        raise ValueError(f"use must be PRIOR_STREAM or DECODER_STREAM of kandinsky_jax.diffusion, got {quote(use)}")
    if generator is None:
        generator = secrets.randbits(32)
    if _is_torch(generator):
        generator = from_torch(generator)
    if isinstance(generator, TorchGenerator):
        return TorchSource([generator], images)
    if isinstance(generator, list | tuple):
        if len(generator) != images:
            raise ValueError(f"generator lists {len(generator)} items for {images} images; one per image is needed")
        generator = [from_torch(g) if _is_torch(g) else g for g in generator]
        if all(isinstance(g, TorchGenerator) for g in generator):
            return TorchSource(generator, images)
        # Each image is drawn as the first of a job of its own.
        return KeySource(jnp.concatenate([_image_keys(_key(g), 1) for g in generator]), use)
    key = _key(generator)
    if key.shape == ():
        return KeySource(_image_keys(key, images), use)
    if key.shape == (images,):
        return KeySource(key, use)
    raise ValueError(f"generator has keys of shape {key.shape}, needed is one key or ({images},)")


def image_keys(seeds: Sequence[int], images: Sequence[int]) -> jax.Array:
    """The keys of images of several jobs `[B]`: for each, that of an image, by its number, of the job with a seed."""
    # Without 64-bit mode, JAX would drop a seed's upper half.
    halves = np.array([divmod(seed, 2**32) for seed in seeds], np.uint32)
    return _keys_of(halves[:, 0], halves[:, 1], np.array(images, np.int32))


@jax.jit
def _keys_of(high: jax.Array, low: jax.Array, image: jax.Array) -> jax.Array:
    def one(high: jax.Array, low: jax.Array, image: jax.Array) -> jax.Array:
        key = jax.random.key(low)
        key = jax.lax.cond(high > 0, lambda key: jax.random.fold_in(key, high), lambda key: key, key)
        return jax.random.fold_in(key, image)

    return jax.vmap(one)(high, low, image)


def _key(generator: object) -> jax.Array:
    """A seed or a JAX key, typed or raw, as a typed key."""
    if isinstance(generator, int | np.integer) and not isinstance(generator, bool):
        if not 0 <= generator < 2**63:
            raise ValueError(f"generator={quote(generator)} is not a seed; needed is an integer from 0 to 2**63 - 1")
        # Without 64-bit mode, JAX would drop a seed's upper half.
        high, low = divmod(int(generator), 2**32)
        key = jax.random.key(low)
        return jax.random.fold_in(key, high) if high else key
    if isinstance(generator, jax.Array) and jnp.issubdtype(generator.dtype, jax.dtypes.prng_key):
        return generator
    if isinstance(generator, jax.Array) and generator.dtype == jnp.uint32:
        try:
            return jax.random.wrap_key_data(generator)
        except TypeError:
            [needed] = jax.random.key_data(jax.random.key(0)).shape
            raise ValueError(
                f"generator is a raw key of shape {generator.shape}, needed is [{needed}], or a seed"
            ) from None
    if isinstance(generator, np.random.Generator | np.random.RandomState | random.Random):
        raise TypeError(
            f"generator must not be {type(generator).__module__.partition('.')[0]}'s {type(generator).__name__}, which "
            "makes no images here; give a seed, such as int(rng.integers(2**32))"
        )
    what = f"an array of {generator.dtype}" if isinstance(generator, jax.Array) else type(generator).__name__
    if isinstance(generator, jax.Array) and jnp.issubdtype(generator.dtype, jnp.integer):
        what += "; make keys of seeds first: jax.vmap(jax.random.key)(seeds)"
    raise TypeError(
        f"generator must be an int, a jax.random.key, a TorchGenerator, a torch.Generator, a list of such, or None, "
        f"got {what}"
    )
