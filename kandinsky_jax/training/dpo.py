"""Diffusion-DPO: the loss of a network that learns from pairs of pictures which one is preferred.

Wallace et al. 2023 (arXiv 2311.12908), equation 14, with the constants of its implementation. Pure functions of arrays.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from kandinsky_jax.common.types import Array, Float


@dataclasses.dataclass(frozen=True)
class DPOConfig:
    """Settings of Diffusion-DPO.

    Args:
        lora: train a LoRA, see `kandinsky_jax.lora.LoraConfig`; the reference is then the network without it. False
            trains all weights beside a copy of the first ones.
        beta: how closely the network stays to the reference: a larger one leaves it with smaller changes.
    """

    lora: bool = True
    beta: float = 2500.0

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise ValueError(f"beta must be a number above 0, got {self.beta}")


def dpo_loss(
    preferred: Float[Array, "B"],
    rejected: Float[Array, "B"],
    reference_preferred: Float[Array, "B"],
    reference_rejected: Float[Array, "B"],
    beta: float,
) -> Float[Array, ""]:
    """Compute the loss of a batch of pairs, a float32 scalar; log(2) for the reference itself.

    It is the mean of `-log sigmoid(-beta / 2 * ((preferred - rejected) - (reference_preferred - reference_rejected)))`.
    The paper's factor of squared norms is beta T omega(lambda); here, as in the implementation, that of mean squares is
    half of `beta`, the same for all timesteps.

    Args:
        preferred, rejected: the network's mean squared errors, of both pictures at one timestep with the same noise.
        reference_preferred, reference_rejected: those of the reference.
        beta: see `DPOConfig`.
    """
    margin = (preferred - rejected) - (reference_preferred - reference_rejected)
    return -jax.nn.log_sigmoid(-0.5 * beta * margin).mean().astype(jnp.promote_types(margin.dtype, jnp.float32))
