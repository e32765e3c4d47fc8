"""Consistency distillation: the loss of a student that predicts at once what a guided teacher's solver reaches.

Latent consistency distillation: Luo et al. 2023 (arXiv 2310.04378), algorithm 1. Trajectory consistency distillation:
Zheng et al. 2024 (arXiv 2402.19159), equation 20. Pure functions of arrays; networks come in as functions.

    clean, noise -> noisy, at a timestep
    noisy -> student -> its prediction of the clean sample (or of a later point of the trajectory) ----------> distance
    noisy -> teacher, guided -> one step of its solver -> target network -> its prediction, without gradient ---^
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from kandinsky_jax.common.errors import shorten
from kandinsky_jax.common.types import Array, Float, Int
from kandinsky_jax.diffusion import Prediction, per_image
from kandinsky_jax.schedulers.consistency import SIGMA_DATA
from kandinsky_jax.training.losses import diffuse

METHODS = ("lcm", "tcd")
DISTANCES = ("huber", "l2")
EMBEDDINGS = ("pictures", "prior")
MAX_SCALE = 100.0
MAX_STEPS = 50  # of the student; `LCMScheduler` and `TCDScheduler` take no more
TARGET = "distillation target"  # name of what is kept for the backward pass, see `jax.checkpoint`


@dataclasses.dataclass(frozen=True)
class DistillationConfig:
    """Settings of distillation.

    Args:
        lora: train a LoRA of the student, see `kandinsky_jax.lora.LoraConfig`; false trains all of its weights.
        method: "lcm", a student that predicts clean samples, or "tcd", one that predicts any later point.
        guidance_scale: of the teacher; the student learns guided predictions, and runs without guidance.
        guidance_scale_max: draw the scale of each example uniformly between both; absent is the fixed one.
        original_inference_steps: steps of the teacher's solver (DDIM); the student learns to skip one after the other.
        distance: "huber", the pseudo-Huber distance, or "l2", the mean square.
        huber_c: of the pseudo-Huber distance, above 0.
        timestep_scaling: of the boundary condition of "lcm"; a larger one leaves less of the noisy sample. Give the
            scheduler the same, whose default is 10 too.
        ema_target: compute targets with the average of the weights (`optimizer.ema_decay`), not with those of the step.
        embeddings: that a decoder is conditioned on: "pictures", those of the training pictures by CLIP's vision tower,
            or "prior", those that the prior generates from the captions.
        num_inference_steps: of the student, for sample pictures and as the recommendation of a distilled checkpoint.
    """

    lora: bool = True
    method: str = "tcd"
    guidance_scale: float = 4.0
    guidance_scale_max: float | None = None
    original_inference_steps: int = 20
    distance: str = "huber"
    huber_c: float = 1e-3
    timestep_scaling: float = 10.0
    ema_target: bool = False
    embeddings: str = "pictures"
    num_inference_steps: int = 4

    def __post_init__(self) -> None:
        faults = []
        for name, choices in (("method", METHODS), ("distance", DISTANCES), ("embeddings", EMBEDDINGS)):
            if (value := getattr(self, name)) not in choices:
                faults.append(f"{name}={shorten(value, 40)!r} is not supported, only {', '.join(choices)}")
        if not 0 <= self.guidance_scale <= MAX_SCALE:
            faults.append(f"guidance_scale must be from 0 to {MAX_SCALE}, got {self.guidance_scale}")
        if self.guidance_scale_max is not None and not self.guidance_scale <= self.guidance_scale_max <= MAX_SCALE:
            faults.append(
                f"guidance_scale_max must be from guidance_scale to {MAX_SCALE}, got {self.guidance_scale_max}"
            )
        if not 2 <= self.original_inference_steps <= 1000:
            faults.append(
                f"original_inference_steps must be from 2 to 1000, got {shorten(self.original_inference_steps)}"
            )
        if not 1 <= self.num_inference_steps <= MAX_STEPS:
            faults.append(f"num_inference_steps must be from 1 to {MAX_STEPS}, got {shorten(self.num_inference_steps)}")
        for name in ("huber_c", "timestep_scaling"):
            if not 0 < getattr(self, name) < math.inf:
                faults.append(f"{name} must be a number above 0, got {getattr(self, name)}")
        if faults:
            raise ValueError("\n".join(faults))


# (noisy samples `[B, ...]`, timesteps int `[B]`) -> a network's output, float32 `[B, ...]`, without a learned variance
Evaluate: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]
PredictionType: TypeAlias = Literal["epsilon", "sample"]


class Draws(NamedTuple):
    """What is random in a batch of the loss, besides its noise."""

    timesteps: jax.Array  # int [B], of the noisy samples
    ends: jax.Array  # int [B], where the student predicts ("tcd"); 0 for "lcm"
    guidance_scale: jax.Array  # float32 [B]


def solver_timesteps(train_timesteps: int, steps: int) -> np.ndarray:
    """Return the timesteps of the teacher's solver, ascending, int32 `[steps]`; those of `LCMScheduler`."""
    return (np.arange(1, steps + 1) * (train_timesteps // steps) - 1).astype(np.int32)


def draw_steps(key: jax.Array, count: int, train_timesteps: int, config: DistillationConfig) -> Draws:
    """Draw a step of the teacher's solver, the student's end, and the guidance scale, for each of `count` examples."""
    of_start, of_end, of_scale = jax.random.split(key, 3)
    grid = jnp.asarray(solver_timesteps(train_timesteps, config.original_inference_steps))
    start = jax.random.randint(of_start, (count,), 0, len(grid))
    if config.method == "tcd":
        earlier = jnp.concatenate([jnp.zeros(1, jnp.int32), grid])  # at `start` is what the solver reaches from there
        ends = earlier[jax.random.randint(of_end, (count,), 0, start + 1)]
    else:
        ends = jnp.zeros(count, jnp.int32)
    low, high = config.guidance_scale, config.guidance_scale_max
    scale = jax.random.uniform(of_scale, (count,), jnp.float32, low, low if high is None else high)
    return Draws(grid[start], ends, scale)


def prediction(
    output: Float[Array, "B *s"],
    noisy: Float[Array, "B *s"],
    timesteps: Int[Array, "B"],
    alphas_cumprod: Float[Array, "T_train"],
    prediction_type: PredictionType,
) -> Prediction:
    """Turn a network's output into predictions of the clean sample and the noise, float32 `[B, ...]`."""
    alpha = per_image(alphas_cumprod[timesteps], noisy.ndim)
    signal, sigma = jnp.sqrt(alpha), jnp.sqrt(1 - alpha)
    if prediction_type == "epsilon":
        return Prediction((noisy - sigma * output) / signal, output)
    return Prediction(output, (noisy - signal * output) / sigma)


def consistency_function(
    found: Prediction,
    noisy: Float[Array, "B *s"],
    draws: Draws,
    timesteps: Int[Array, "B"],
    alphas_cumprod: Float[Array, "T_train"],
    config: DistillationConfig,
) -> Float[Array, "B *s"]:
    """Compute what a student predicts, from its network's prediction at `timesteps`.

    For "lcm" it is the clean sample, with the boundary condition of Song et al. 2023 (arXiv 2303.01469, equation 5) in
    the form of `LCMScheduler`; for "tcd" the point at `draws.ends`, by a step of DDIM.
    """
    if config.method == "tcd":
        return diffuse(alphas_cumprod, found.x0, found.eps, draws.ends)
    scaled = per_image(timesteps * config.timestep_scaling, noisy.ndim)
    skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
    out = scaled / jnp.sqrt(scaled**2 + SIGMA_DATA**2)
    return skip * noisy + out * found.x0


def distance(found: Float[Array, "B *s"], target: Float[Array, "B *s"], config: DistillationConfig) -> Float[Array, ""]:
    """Compute the mean distance of predictions, a float32 scalar."""
    square = jnp.square(found - target)
    if config.distance == "huber":  # elementwise, as in the reference's script
        return (jnp.sqrt(square + config.huber_c**2) - config.huber_c).mean()
    return square.mean()


def consistency_loss(
    student: Evaluate,
    target: Evaluate,
    teacher: Evaluate,
    clean: Float[Array, "B *s"],
    noise: Float[Array, "B *s"],
    draws: Draws,
    alphas_cumprod: Float[Array, "T_train"],
    prediction_type: PredictionType,
    config: DistillationConfig,
) -> Float[Array, ""]:
    """Compute the loss of a batch, a float32 scalar.

    Reference: diffusers' examples/consistency_distillation, train_lcm_distill_sd_wds.py, with its DDIM solver.

    Args:
        student: with gradients.
        target: the same network, with the student's weights or their average.
        teacher: guided.
        clean: float32 `[B, ...]`; latents, or normalised embeddings.
        noise: standard normal, of the same shape.
        draws: see `draw_steps`.
        alphas_cumprod: float32 `[T]`.
        prediction_type: of the networks.
    """

    def predict(evaluate: Evaluate, sample: jax.Array, at: jax.Array) -> Prediction:
        return prediction(evaluate(sample, at), sample, at, alphas_cumprod, prediction_type)

    skip = len(alphas_cumprod) // config.original_inference_steps
    timesteps, reached = draws.timesteps, jnp.maximum(draws.timesteps - skip, 0)
    noisy = diffuse(alphas_cumprod, clean, noise, timesteps)
    step = predict(teacher, noisy, timesteps)
    closer = diffuse(alphas_cumprod, step.x0, step.eps, reached)  # DDIM, without noise
    wanted = consistency_function(predict(target, closer, reached), closer, draws, reached, alphas_cumprod, config)
    wanted = checkpoint_name(jax.lax.stop_gradient(wanted), TARGET)
    found = consistency_function(predict(student, noisy, timesteps), noisy, draws, timesteps, alphas_cumprod, config)
    return distance(found, wanted, config)
