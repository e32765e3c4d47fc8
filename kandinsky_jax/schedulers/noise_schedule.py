"""The forward process: how much noise at which training timestep, and which timesteps to visit."""

from __future__ import annotations

from typing import Any

import numpy as np


class SchedulerError(ValueError):
    """A scheduler configuration or a number of steps that cannot be followed."""


def betas_for_alpha_bar(steps: int, largest: float = 0.999) -> np.ndarray:
    """The cosine schedule of Nichol & Dhariwal 2021 (arXiv 2102.09672), "squaredcos_cap_v2"; float64 `[steps]`."""
    grid = np.arange(steps + 1) / steps
    alpha_bar = np.cos((grid + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], largest)


def make_betas(schedule: str, start: float, end: float, steps: int, trained: Any = None) -> np.ndarray:
    """The variances of the forward process by diffusers' names of schedules; float64 `[steps]`."""
    if trained is not None:
        return np.asarray(trained, np.float64)
    if schedule == "linear":
        return np.linspace(start, end, steps)
    if schedule == "scaled_linear":
        return np.linspace(start**0.5, end**0.5, steps) ** 2
    if schedule == "squaredcos_cap_v2":
        return betas_for_alpha_bar(steps)
    if schedule == "sigmoid":
        return (end - start) / (1 + np.exp(-np.linspace(-6, 6, steps))) + start
    known = "linear, scaled_linear, squaredcos_cap_v2, sigmoid"
    raise SchedulerError(f"beta_schedule={schedule!r} is not supported, only {known}")


def cumulative_alphas(betas: np.ndarray) -> np.ndarray:
    """The share of the signal's variance that is left at each training timestep; float64 `[steps]`.

    The values are float32 numbers, rounded where the reference rounds: near 1 that is the schedule's own last digits,
    and 1 - alpha, by which solvers divide, would otherwise differ from the reference's by up to 0.07 %.
    """
    alphas = np.float32(1) - np.asarray(betas, np.float32)
    return np.cumprod(alphas.astype(np.float64)).astype(np.float32).astype(np.float64)


def spaced_timesteps(spacing: str, steps: int, train_steps: int, offset: int) -> np.ndarray:
    """Descending int timesteps `[steps]`; Lin et al. 2023 (arXiv 2305.08891), table 2."""
    if spacing == "linspace":
        return np.linspace(0, train_steps - 1, steps).round()[::-1].astype(np.int64)
    if spacing == "leading":
        return (np.arange(steps) * (train_steps // steps))[::-1].astype(np.int64) + offset
    if spacing == "trailing":
        # arange over floats gives one timestep too many for some numbers of steps, as it does in the reference.
        return np.round(np.arange(train_steps, 0, -train_steps / steps)[:steps]).astype(np.int64) - 1
    raise SchedulerError(f"timestep_spacing={spacing!r} is not supported, only leading, linspace, trailing")
