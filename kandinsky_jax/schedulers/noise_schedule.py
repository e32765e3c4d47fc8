"""The forward process: how much noise at which training timestep, and which timesteps to visit."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np

from kandinsky_jax.common.errors import quote


class SchedulerError(ValueError):
    """A scheduler configuration or a number of steps is not supported."""


LEAST_ALPHA = 2.0**-24  # used instead of a terminal alpha of zero by solvers that divide by alpha


def _cosine(t: float) -> float:
    """Nichol & Dhariwal 2021 (arXiv 2102.09672), equation 17."""
    return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2


def _exponential(t: float) -> float:
    return math.exp(-12.0 * t)


def _laplace(t: float) -> float:
    """Hang & Gu 2024 (arXiv 2407.03297)."""
    ratio = math.exp(-0.5 * math.copysign(1, 0.5 - t) * math.log(1 - 2 * abs(0.5 - t) + 1e-6))
    return math.sqrt(ratio / (1 + ratio))


# Cumulative alphas at the fraction t of training, by diffusers' names.
ALPHA_BARS: dict[str, Callable[[float], float]] = {
    "squaredcos_cap_v2": _cosine,
    "exp": _exponential,
    "laplace": _laplace,
}


def betas_for_alpha_bar(steps: int, schedule: str = "squaredcos_cap_v2", largest: float = 0.999) -> np.ndarray:
    """The variances that make `ALPHA_BARS[schedule]`, none above `largest`; float64 `[steps]`."""
    alpha_bar = _alpha_bar(steps, schedule)
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], largest)


@functools.lru_cache(maxsize=16)
def _alpha_bar(steps: int, schedule: str) -> np.ndarray:
    """`ALPHA_BARS[schedule]` at each of the steps and before the first; float64 `[steps + 1]`, not to be changed."""
    return np.array([ALPHA_BARS[schedule](i / steps) for i in range(steps + 1)])


def make_betas(schedule: str, start: float, end: float, steps: int, trained: object = None) -> np.ndarray:
    """The variances of the forward process by diffusers' names of schedules; float64 `[steps]`."""
    if trained is not None:
        return np.asarray(trained, np.float64)
    if schedule in ALPHA_BARS:
        return betas_for_alpha_bar(steps, schedule)
    if schedule == "linear":
        return np.linspace(start, end, steps)
    if schedule == "scaled_linear":
        return np.linspace(start**0.5, end**0.5, steps) ** 2
    if schedule == "sigmoid":
        return (end - start) / (1 + np.exp(-np.linspace(-6, 6, steps))) + start
    known = ", ".join(["linear", "scaled_linear", "sigmoid", *ALPHA_BARS])
    raise SchedulerError(f"beta_schedule={quote(schedule)} is not supported, only {known}")


def rescaled_to_zero_snr(betas: np.ndarray) -> np.ndarray:
    """Variances whose last step leaves no signal; Lin et al. 2023 (arXiv 2305.08891), algorithm 1; float32 `[steps]`.

    In float32, as the reference, which loses digits of the last steps in these differences.
    """
    root = np.sqrt(cumulative_alphas(betas).astype(np.float32))
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    alpha_bar = root**2
    return np.float32(1) - np.append(alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1])


def cumulative_alphas(betas: np.ndarray) -> np.ndarray:
    """Return the cumulative products of alphas at each training timestep; float64 `[steps]`.

    The values are float32 numbers, rounded where the reference rounds: near 1 that is the schedule's own last digits,
    and 1 - alpha, by which solvers divide, would otherwise differ from the reference's by up to 0.07 %.
    """
    alphas = np.float32(1) - np.asarray(betas, np.float32)
    return np.cumprod(alphas.astype(np.float64)).astype(np.float32).astype(np.float64)


# Which timesteps. Lin et al. 2023 (arXiv 2305.08891), table 2, in three variants of the reference. "trailing" is an
# arange over floats, which gives one timestep too many for some numbers of steps, as it does there: that one is cut.

SPACINGS = ("leading", "linspace", "trailing")


def spaced_timesteps(spacing: str, steps: int, train_steps: int, offset: int) -> np.ndarray:
    """Descending int timesteps `[steps]` of the solvers that take a last step to the clean sample."""
    return spaced_points(spacing, steps, train_steps, offset).round().astype(np.int64)


def spaced_points(spacing: str, steps: int, train_steps: int, offset: int) -> np.ndarray:
    """The same, with the fractions that "linspace" has; float64 `[steps]`."""
    if spacing == "linspace":
        return np.linspace(0, train_steps - 1, steps)[::-1]
    if spacing == "leading":
        return (np.arange(steps) * (train_steps // steps))[::-1] + float(offset)
    return np.round(np.arange(train_steps, 0, -train_steps / steps)[:steps]) - 1.0


def spread_timesteps(spacing: str, steps: int, train_steps: int, offset: int, last: int | None = None) -> np.ndarray:
    """Descending int timesteps `[steps]` of the multistep solvers, which leave out the smallest of `steps + 1`.

    Args:
        last: timesteps from here on are not visited; None is `train_steps`.
    """
    last = train_steps if last is None else last
    if spacing == "linspace":
        return np.linspace(0, last - 1, steps + 1).round()[:0:-1].astype(np.int64)
    if spacing == "leading":
        return (np.arange(steps + 1) * (last // (steps + 1)))[:0:-1].astype(np.int64) + offset
    return np.arange(last, 0, -train_steps / steps)[:steps].round().astype(np.int64) - 1
