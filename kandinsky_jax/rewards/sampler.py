"""From image embeddings and noise to pictures in one differentiable function, whose arrays are a pytree."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from kandinsky_jax import lora
from kandinsky_jax.common.types import Array, Float, Params, PyTree
from kandinsky_jax.diffusion import (
    DECODER_STREAM,
    ClassifierFreeGuidance,
    Guider,
    Network,
    Schedule,
    SolverCoefficients,
    StepNoise,
    matmul_precision,
    noise_source,
    sample,
    solver_coefficients,
)
from kandinsky_jax.diffusion.rng import image_keys


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecoderSampler:
    """The decoder as a function of noise and image embeddings: a whole sample, then MoVQ.

    A pytree of its arrays, so it is an argument of functions that JAX transforms; from `from_pipeline`.

    Args:
        unet, movq: structures of the networks.
        params: of both, by "unet" and "movq".
        coefficients: of the schedule `[N, ...]`, without the slots of the state that the solver does not use.
        guider: combines the evaluations of a step; a pytree.
        negative_embeds: what guidance is away from, `[1, D]`; None where the guider takes no uncond.
        latent_shape: of a picture, (h, w, C).
        init_noise_sigma: the schedule's, which `latents` multiplies the noise by.
        stochastic: whether the schedule draws noise at its steps.
    """

    unet: Network = dataclasses.field(metadata={"static": True})
    movq: Network = dataclasses.field(metadata={"static": True})
    params: dict[str, Params]
    coefficients: SolverCoefficients
    guider: Guider
    negative_embeds: jax.Array | None
    latent_shape: tuple[int, int, int] = dataclasses.field(metadata={"static": True})
    init_noise_sigma: float = dataclasses.field(default=1.0, metadata={"static": True})
    stochastic: bool = dataclasses.field(default=False, metadata={"static": True})

    @classmethod
    def from_pipeline(
        cls,
        pipe: Any,
        schedule: Schedule,
        *,
        guider: Guider | None = None,
        height: int = 512,
        width: int = 512,
    ) -> DecoderSampler:
        """Take the networks of a combined text-to-image pipeline, with the weights that they have now.

        Args:
            pipe: such as `KandinskyV22CombinedPipeline`.
            schedule: of its decoder, such as `DDIMScheduler.from_config(pipe.scheduler.config).schedule(25)`.
            guider: an object, such as `diffusion.guider_named("apg", 2.0)`; None is classifier-free guidance of 4.
            height, width: of the pictures, in pixels.
        """
        (unet, unet_params), (movq, movq_params) = Network.split(pipe.unet), Network.split(pipe.movq)
        if isinstance(guider, str):
            raise TypeError(f"guider must be an object here: diffusion.guider_named({guider!r}, scale)")
        factor = pipe.movq.config.scale_factor
        if not all(isinstance(side, int) and side > 0 and side % factor == 0 for side in (height, width)):
            raise ValueError(f"height={height} and width={width} must be multiples of {factor}, as MoVQ needs")
        return cls(
            unet,
            movq,
            {"unet": unet_params, "movq": movq_params},
            trimmed(solver_coefficients(schedule)),
            ClassifierFreeGuidance() if guider is None else guider,
            pipe.prior_pipe.get_zero_embed(),
            (height // factor, width // factor, pipe.movq.config.latent_channels),
            float(schedule.init_noise_sigma),
            bool(schedule.draws_noise.any()),
        )

    @property
    def steps(self) -> int:
        """Evaluations of the network."""
        return len(self.coefficients.timestep)

    def noise(self, keys: int | jax.Array, count: int) -> Float[Array, "B h w C"]:
        """Return standard normal noise `[B, h, w, C]`, that of the decoder's pipelines for the same `generator`.

        Args:
            keys: a seed or a key for all, or keys `[B]`.
            count: B.
        """
        [noise] = noise_source(keys, count, DECODER_STREAM).initial((count, *self.latent_shape))
        return noise

    def conditioned(self, embeds: Float[Array, "B D"]) -> tuple[Any, PyTree, PyTree]:
        """Return the UNet, and its conditions of a batch: with the embeddings, and with `negative_embeds`."""
        unet: Any = self.unet.bind(self.params["unet"])
        with matmul_precision(self.params["unet"]):
            cond = unet.condition(embeds)
            if self.negative_embeds is None:
                return unet, cond, None
            return unet, cond, unet.condition(jnp.broadcast_to(self.negative_embeds, embeds.shape))

    def latents(
        self,
        noise: Float[Array, "B h w C"],
        embeds: Float[Array, "B D"],
        rng: int | jax.Array | StepNoise | None = None,
        gradient_steps: int | jax.Array | None = None,
    ) -> Float[Array, "B h w C"]:
        """Sample latents; differentiable.

        Args:
            noise: standard normal.
            embeds: image embeddings, such as the prior's.
            rng, gradient_steps: see `kandinsky_jax.diffusion.sample`.
        """
        if self.stochastic and rng is None:
            raise ValueError("this schedule adds noise at its steps; give rng=jax.random.key(seed)")
        unet, cond, uncond = self.conditioned(embeds)
        return sample(
            unet,
            noise * self.init_noise_sigma,
            cond,
            uncond,
            self.coefficients,
            guider=self.guider,
            rng=rng,
            gradient_steps=gradient_steps,
        )

    def decode(self, latents: Float[Array, "B h w C"]) -> Float[Array, "B H W 3"]:
        """Decode latents to pictures, float32 `[B, H, W, 3]`, clipped to 0..1."""
        movq: Any = self.movq.bind(self.params["movq"])
        with matmul_precision(self.params["movq"]):
            return jnp.clip(movq.decode(latents).astype(jnp.float32) * 0.5 + 0.5, 0, 1)

    def __call__(
        self,
        noise: Float[Array, "B h w C"],
        embeds: Float[Array, "B D"],
        rng: int | jax.Array | StepNoise | None = None,
        gradient_steps: int | jax.Array | None = None,
    ) -> Float[Array, "B H W 3"]:
        """Sample pictures, float32 `[B, H, W, 3]` in 0..1; arguments: see `latents`."""
        return self.decode(self.latents(noise, embeds, rng, gradient_steps))

    def with_lora(self, changes: lora.Lora, scale: float | jax.Array = 1.0) -> DecoderSampler:
        """Return the sampler with a LoRA added to the UNet's weights; differentiable in the changes."""
        return dataclasses.replace(
            self, params=self.params | {"unet": lora.merged(self.params["unet"], changes, scale)}
        )

    def generate(
        self, embeds: Float[Array, "N D"], seed: int = 0, *, batch_size: int = 16, quiet: bool = False
    ) -> np.ndarray:
        """Generate a picture for each embedding, in compiled batches.

        Args:
            embeds: `[N, D]`.
            seed: picture i has the noise of image i of this seed, whatever the batch size.
            batch_size: pictures at once.
            quiet: no progress bar.
        Returns:
            float32 `[N, H, W, 3]` in 0..1.
        """
        keys, found = image_keys([seed] * len(embeds), range(len(embeds))), []
        for start, rows in batches(len(embeds), batch_size, quiet):
            images = _generated(self, jnp.asarray(embeds)[rows], keys[rows])
            found.append(np.asarray(images)[: len(embeds) - start])
        return np.concatenate(found)


@jax.jit
def _generated(sampler: DecoderSampler, embeds: jax.Array, keys: jax.Array) -> jax.Array:
    return sampler(sampler.noise(keys, len(embeds)), embeds, rng=keys if sampler.stochastic else None)


def batches(count: int, size: int, quiet: bool) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the start of each batch and its rows `[size]`; the last one is filled up with its last row."""
    size = min(size, count)
    for start in tqdm(range(0, count, size), desc="generate", unit="batch", disable=quiet):
        yield start, np.minimum(np.arange(start, start + size), count - 1)


def trimmed(coefficients: SolverCoefficients) -> SolverCoefficients:
    """Leave out slots of the state that a solver does not use: a single-step solver needs one of six."""
    matrix = np.asarray(coefficients.matrix)
    slots = matrix.shape[-2]
    uses = np.abs(matrix[..., :slots]).sum(axis=tuple(range(matrix.ndim - 1)))  # [slots], as columns
    uses += np.abs(matrix).sum(axis=(*range(matrix.ndim - 2), -1))  # as rows
    used = 1 + int(np.flatnonzero(uses).max())
    columns = [*range(used), *range(slots, slots + 3)]
    return coefficients._replace(matrix=coefficients.matrix[..., :used, columns])
