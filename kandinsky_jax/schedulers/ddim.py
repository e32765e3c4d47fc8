"""DDIM: Song et al. 2020 (arXiv 2010.02502), equations 12 and 16. Reference: diffusers' DDIMScheduler."""

from __future__ import annotations

import dataclasses

import numpy as np

from kandinsky_jax.schedulers.base import DiffusionScheduler, eps_of_x0, predictions, vp_levels
from kandinsky_jax.schedulers.noise_schedule import SchedulerError
from kandinsky_jax.schedulers.table import EPS, STATE_SLOTS, X0, Schedule, Z, build


@dataclasses.dataclass(frozen=True)
class DDIMScheduler(DiffusionScheduler):
    """Deterministic steps along the probability flow for `eta` 0, with added noise above.

    `eta` (0: deterministic, 1: as noisy as DDPM) is an argument of `step` there, which no pipeline of the reference
    sets; here it is a field.
    """

    set_alpha_to_one: bool = True
    eta: float = 0.0
    use_clipped_model_output: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.eta <= 1:
            raise SchedulerError(f"DDIMScheduler: eta={self.eta} is out of range, needed is 0 to 1")

    def _lay_out(self, num_inference_steps: int, begin: int) -> Schedule:
        timesteps = self._visited(num_inference_steps)
        steps = len(timesteps)
        cumulative = self.alphas_cumprod
        final = 1.0 if self.set_alpha_to_one else cumulative[0]
        # The reference's step is always a whole share of the training steps; custom timesteps, which its DDIM has
        # not, go from one to the next.
        even = timesteps - self.num_train_timesteps // steps
        previous = even if self.custom_timesteps is None else np.append(timesteps[1:], -1)
        alpha = cumulative[timesteps]
        alpha_prev = np.where(previous >= 0, cumulative[np.maximum(previous, 0)], final)
        sigma = self.eta * np.sqrt((1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev))
        matrix = np.zeros((steps, STATE_SLOTS, STATE_SLOTS + 3))
        matrix[:, 0, X0] = np.sqrt(alpha_prev)
        matrix[:, 0, EPS] = np.sqrt(np.maximum(1 - alpha_prev - sigma**2, 0))
        matrix[:, 0, Z] = sigma
        x0_from, eps_from = predictions(self.prediction_type, alpha)
        if self.use_clipped_model_output:
            eps_from = eps_of_x0(alpha)
        return build(
            timesteps=timesteps,
            levels=vp_levels(alpha),
            x0_from=x0_from,
            eps_from=eps_from,
            matrix=matrix,
            draws_noise=np.full(steps, self.eta > 0),
            begin=begin,
            **self.limits(),
        )
