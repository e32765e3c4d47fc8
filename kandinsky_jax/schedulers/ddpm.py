"""Ancestral sampling: DDPM, and UnCLIP's variant of it for the prior.

Ho et al. 2020 (arXiv 2006.11239), equations 6 and 7; Nichol & Dhariwal 2021 (arXiv 2102.09672), equation 15 for the
learned variance. Reference: diffusers' DDPMScheduler and UnCLIPScheduler.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from kandinsky_jax.schedulers.base import DiffusionScheduler, Scheduler, predictions, vp_levels
from kandinsky_jax.schedulers.noise_schedule import betas_for_alpha_bar, cumulative_alphas
from kandinsky_jax.schedulers.table import STATE_SLOTS, X0, Schedule, Z, build

LEAST_VARIANCE = 1e-20  # the reference's, so that its logarithm exists at the last step


def posterior(
    *,
    timesteps: np.ndarray,
    alpha: np.ndarray,
    alpha_prev: np.ndarray,
    beta: np.ndarray,
    variance_type: str,
    prediction_type: str,
    **others: Any,
) -> Schedule:
    """The table of ancestral steps.

    Args:
        timesteps, alpha, alpha_prev: each step's timestep, and the cumulative products that it goes from and to, `[n]`.
        beta: each step's variance, 1 - alpha / alpha_prev in exact arithmetic, `[n]`.
        others: `build`'s clip, threshold and begin.
    """
    variance = np.maximum((1 - alpha_prev) / (1 - alpha) * beta, LEAST_VARIANCE)
    # Both *_log types are the same variances by way of a logarithm. (The reference takes the root of log(beta) for
    # DDPM's fixed_large_log, which is not a number.)
    fixed = {"fixed_small": variance, "fixed_small_log": variance, "fixed_large": beta, "fixed_large_log": beta}
    noisy = timesteps > 0
    n = len(timesteps)
    matrix = np.zeros((n, STATE_SLOTS, STATE_SLOTS + 3))
    matrix[:, 0, 0] = np.sqrt(1 - beta) * (1 - alpha_prev) / (1 - alpha)
    matrix[:, 0, X0] = np.sqrt(alpha_prev) * beta / (1 - alpha)
    matrix[:, 0, Z] = noisy * np.sqrt(fixed.get(variance_type, 1.0))
    x0_from, eps_from = predictions(prediction_type, alpha)
    learned_range = variance_type == "learned_range"
    return build(
        timesteps=timesteps,
        levels=vp_levels(alpha),
        x0_from=x0_from,
        eps_from=eps_from,
        matrix=matrix,
        draws_noise=noisy,
        log_variance=np.log(np.stack([variance, beta], axis=1)) if learned_range else None,
        variance_is_output=variance_type == "learned",
        **others,
    )


@dataclasses.dataclass(frozen=True)
class DDPMScheduler(DiffusionScheduler):
    """Ancestral sampling over any spacing of timesteps; what the official decoders come with."""

    variance_type: str = "fixed_small"

    CHOICES: ClassVar[Mapping[str, tuple[object, ...]]] = {
        **DiffusionScheduler.CHOICES,
        "variance_type": (
            "fixed_small",
            "fixed_small_log",
            "fixed_large",
            "fixed_large_log",
            "learned",
            "learned_range",
        ),
    }

    def _lay_out(self, num_inference_steps: int, begin: int) -> Schedule:
        timesteps = self._visited(num_inference_steps)
        alpha = self.alphas_cumprod[timesteps]
        alpha_prev = np.append(alpha[1:], 1.0)
        return posterior(
            timesteps=timesteps,
            alpha=alpha,
            alpha_prev=alpha_prev,
            beta=1 - alpha / alpha_prev,
            variance_type=self.variance_type,
            prediction_type=self.prediction_type,
            begin=begin,
            **self.limits(),
        )


@dataclasses.dataclass(frozen=True)
class UnCLIPScheduler(Scheduler):
    """The prior's scheduler: cosine schedule, timesteps from the last to 0 inclusive; needs two steps or more."""

    variance_type: str = "fixed_small_log"
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    prediction_type: str = "epsilon"
    beta_schedule: str = "squaredcos_cap_v2"

    CHOICES: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "variance_type": ("fixed_small_log", "learned_range"),
        "prediction_type": ("epsilon", "sample"),
        "beta_schedule": ("squaredcos_cap_v2",),
    }

    @property
    def betas(self) -> np.ndarray:
        """Float64 `[num_train_timesteps]`."""
        return betas_for_alpha_bar(self.num_train_timesteps)

    @property
    def alphas_cumprod(self) -> np.ndarray:
        return cumulative_alphas(self.betas)

    def steps(self, num_inference_steps: int) -> int:
        return self._check_steps(num_inference_steps, least=2)

    def _lay_out(self, num_inference_steps: int, begin: int) -> Schedule:
        steps = self.steps(num_inference_steps)
        ratio = (self.num_train_timesteps - 1) / (steps - 1)
        timesteps = (np.arange(steps) * ratio).round()[::-1].astype(np.int64)
        alpha = self.alphas_cumprod[timesteps]
        alpha_prev = np.append(alpha[1:], 1.0)
        # As the reference: a step to the neighbouring timestep takes the schedule's own beta. At timestep 0 the two
        # differ by 0.06 %, since 1 - 0.99996 has lost its last digits in float32.
        neighbour = np.append(timesteps[1:], -1) == timesteps - 1
        return posterior(
            timesteps=timesteps,
            alpha=alpha,
            alpha_prev=alpha_prev,
            beta=np.where(neighbour, self.betas[timesteps], 1 - alpha / alpha_prev),
            variance_type=self.variance_type,
            prediction_type=self.prediction_type,
            clip=self.clip_sample_range if self.clip_sample else np.inf,
            begin=begin,
        )
