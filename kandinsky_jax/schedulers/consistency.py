"""Samplers for consistency-distilled networks: each step predicts the picture and adds noise of a lower level.

LCM: Luo et al. 2023 (arXiv 2310.04378). TCD: Zheng et al. 2024 (arXiv 2402.19159). Reference: diffusers' LCM and
TCDScheduler. Other networks generate softer pictures with them.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from kandinsky_jax.schedulers.base import DiffusionScheduler, predictions, vp_levels
from kandinsky_jax.schedulers.noise_schedule import SchedulerError
from kandinsky_jax.schedulers.table import BASIS, EPS, STATE_SLOTS, X0, Schedule, Z, build

SIGMA_DATA = 0.5


@dataclasses.dataclass(frozen=True)
class ConsistencyScheduler(DiffusionScheduler):
    """Base of both: their fields and timesteps, which are some of the distillation's `original_inference_steps`."""

    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    original_inference_steps: int = 50
    clip_sample: bool = False
    set_alpha_to_one: bool = True
    timestep_scaling: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.original_inference_steps <= self.num_train_timesteps:
            raise SchedulerError(
                f"{type(self).__name__}: original_inference_steps={self.original_inference_steps} is out of range, "
                f"needed is 1 to {self.num_train_timesteps}"
            )

    def _most(self) -> int:
        return self.original_inference_steps

    def _spaced(self, steps: int) -> np.ndarray:
        whole = self.original_inference_steps
        original = np.arange(whole, 0, -1) * (self.num_train_timesteps // whole) - 1
        return original[np.floor(np.linspace(0, whole, steps, endpoint=False)).astype(np.int64)]


@dataclasses.dataclass(frozen=True)
class LCMScheduler(ConsistencyScheduler):
    """Predicts the picture and adds fresh noise."""

    def _lay_out(self, num_inference_steps: int, begin: int) -> Schedule:
        timesteps = self._visited(num_inference_steps)
        steps, alpha = len(timesteps), self.alphas_cumprod[timesteps]
        scaled = timesteps * self.timestep_scaling
        skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
        out = scaled / np.sqrt(scaled**2 + SIGMA_DATA**2)
        after = np.append(vp_levels(alpha)[1:], [[1.0, 0.0]], axis=0)  # the last picture gets no noise
        matrix = np.zeros((steps, STATE_SLOTS, STATE_SLOTS + 3))
        for i, (signal, sigma) in enumerate(after):
            matrix[i, 0] = signal * (out[i] * BASIS[X0] + skip[i] * BASIS[0]) + sigma * BASIS[Z]
        return build(
            timesteps=timesteps,
            levels=vp_levels(alpha),
            x0_from=predictions(self.prediction_type, alpha)[0],
            matrix=matrix,
            draws_noise=np.arange(steps) < steps - 1,
            begin=begin,
            **self.limits(),
        )


@dataclasses.dataclass(frozen=True)
class TCDScheduler(ConsistencyScheduler):
    """Steps below the next timestep by the share `eta` of it, and adds noise up to it; `eta` is an argument of `step`
    in the reference, 0.3 there. Limits of x0 are ignored, as in the reference."""

    eta: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.eta <= 1:
            raise SchedulerError(f"TCDScheduler: eta={self.eta} is out of range, needed is 0 to 1")

    def _lay_out(self, num_inference_steps: int, begin: int) -> Schedule:
        timesteps = self._visited(num_inference_steps)
        steps, cumulative = len(timesteps), self.alphas_cumprod
        following = np.append(timesteps[1:], 0)
        below = cumulative[np.floor(np.float32(1 - self.eta) * following.astype(np.float32)).astype(np.int64)]
        more = cumulative[following] / below
        noisy = (np.arange(steps) < steps - 1) & (self.eta > 0)
        matrix = np.zeros((steps, STATE_SLOTS, STATE_SLOTS + 3))
        for i, (signal, sigma) in enumerate(vp_levels(below)):
            line = signal * BASIS[X0] + sigma * BASIS[EPS]
            matrix[i, 0] = np.sqrt(more[i]) * line + np.sqrt(1 - more[i]) * BASIS[Z] if noisy[i] else line
        alpha = cumulative[timesteps]
        x0_from, eps_from = predictions(self.prediction_type, alpha)
        return build(
            timesteps=timesteps,
            levels=vp_levels(alpha),
            x0_from=x0_from,
            eps_from=eps_from,
            matrix=matrix,
            draws_noise=noisy,
            begin=begin,
        )
