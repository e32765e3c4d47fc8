"""Solvers of Karras et al.'s differential equation (2022, arXiv 2206.00364): Euler, Heun, the midpoint rule, Adams.

Reference: diffusers' Euler, EulerAncestral, Heun, KDPM2, KDPM2Ancestral and LMSDiscreteScheduler, which follow
k-diffusion. The second-order ones evaluate the network twice per step, the last step excepted: two rows of the table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from kandinsky_jax.schedulers.noise_schedule import SchedulerError
from kandinsky_jax.schedulers.sigmas import Grid, KarrasScheduler, rounded, sigma_to_timestep
from kandinsky_jax.schedulers.table import BASIS, MAX_STEPS, STATE_SLOTS, X0, Schedule, Z

SAMPLE = BASIS[0]


def _lines(rows: int) -> np.ndarray:
    return np.zeros((rows, STATE_SLOTS, STATE_SLOTS + 3))


def _slope(sigma: float) -> np.ndarray:
    """The derivative of the sample in sigma, as a line of a matrix."""
    return (SAMPLE - BASIS[X0]) / sigma


def ancestral(sigma: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the sigmas to step down to, and the fresh noise that brings them up to `after`; as in k-diffusion."""
    up = np.sqrt(after**2 * (sigma**2 - after**2) / sigma**2)
    return np.sqrt(after**2 - up**2), up


@dataclasses.dataclass(frozen=True)
class EulerDiscreteScheduler(KarrasScheduler):
    """Euler's method."""

    interpolation_type: str = "linear"
    sigma_min: float | None = None
    sigma_max: float | None = None
    timestep_type: str = "discrete"
    rescale_betas_zero_snr: bool = False
    final_sigmas_type: str = "zero"
    custom_sigmas: tuple[float, ...] | None = dataclasses.field(default=None, kw_only=True)

    CHOICES: ClassVar[Mapping[str, tuple[object, ...]]] = {
        **KarrasScheduler.CHOICES,
        "interpolation_type": ("linear", "log_linear"),
        "timestep_type": ("discrete", "continuous"),
    }
    CUSTOM: ClassVar[tuple[str, ...]] = ("custom_timesteps", "custom_sigmas")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.custom_timesteps is not None and (self.custom_sigmas is not None or self._continuous):
            other = "custom_sigmas" if self.custom_sigmas is not None else "timestep_type='continuous'"
            raise SchedulerError(f"EulerDiscreteScheduler: custom_timesteps cannot be used with {other}")

    @property
    def _continuous(self) -> bool:
        return self.timestep_type == "continuous" and self.prediction_type == "v_prediction"

    def grid(self, num_inference_steps: int) -> Grid:
        training = self.training_sigmas()
        own = self._custom("custom_sigmas")
        if own is not None:
            if len(own) < 2:
                raise SchedulerError("custom_sigmas needs two numbers or more: the last one is where the sample ends")
            timesteps, sigmas = sigma_to_timestep(own[:-1], np.log(training)), rounded(own)
        else:
            timesteps, sigmas = super().grid(num_inference_steps)
            if self.interpolation_type == "log_linear":
                high, low = np.log(training[-1]), np.log(training[0])
                even = rounded(np.exp(np.linspace(high, low, len(timesteps) + 1)))
                respaced = self._respaced(even, len(timesteps))
                # As the reference: without another spacing, these are one sigma more than there are timesteps.
                sigmas = np.append(even if respaced is None else respaced, 0.0)
                if respaced is not None:
                    timesteps = sigma_to_timestep(respaced, np.log(training))
            if self.final_sigmas_type == "sigma_min":
                sigmas[-1] = training[0]
            sigmas = rounded(sigmas)
        if self._continuous:
            timesteps = 0.25 * np.log(sigmas[: len(timesteps)])
        return Grid(timesteps, sigmas)

    def _lay_out(self, num_inference_steps: int, begin: int) -> Schedule:
        grid = self.grid(num_inference_steps)
        matrix = _lines(len(grid.timesteps))
        for i in range(len(matrix)):
            sigma, after = grid.sigmas[i : i + 2]
            matrix[i, 0] = SAMPLE + (after - sigma) * _slope(sigma)
        return self._build(grid.timesteps, grid.sigmas[: len(matrix)], matrix, grid, begin=begin)


@dataclasses.dataclass(frozen=True)
class EulerAncestralDiscreteScheduler(KarrasScheduler):
    """Euler's method, with fresh noise after each step."""

    rescale_betas_zero_snr: bool = False

    CHOICES: ClassVar[Mapping[str, tuple[object, ...]]] = {
        **KarrasScheduler.CHOICES,
        "prediction_type": ("epsilon", "v_prediction"),
        **dict.fromkeys(("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"), (False,)),
    }

    def _lay_out(self, num_inference_steps: int, begin: int) -> Schedule:
        grid = self.grid(num_inference_steps)
        sigmas = grid.sigmas[:-1]
        matrix = _lines(len(sigmas))
        for i, (down, up) in enumerate(zip(*ancestral(sigmas, grid.sigmas[1:]), strict=True)):
            matrix[i, 0] = SAMPLE + (down - sigmas[i]) * _slope(sigmas[i]) + up * BASIS[Z]
        draws_noise = np.ones(len(sigmas), bool)
        return self._build(grid.timesteps, sigmas, matrix, grid, begin=begin, draws_noise=draws_noise)


@dataclasses.dataclass(frozen=True)
class LMSDiscreteScheduler(KarrasScheduler):
    """Adams-Bashforth on four slopes, for uneven steps."""

    ORDER: ClassVar[int] = 4

    def _lay_out(self, num_inference_steps: int, begin: int) -> Schedule:
        grid = self.grid(num_inference_steps)
        steps = len(grid.timesteps)
        matrix = _lines(steps)
        for i in range(begin, steps):
            points = grid.sigmas[max(begin, i - self.ORDER + 1) : i + 1][::-1]
            slopes = [_slope(points[0]), *BASIS[1 : self.ORDER]]
            weights = [_integral(points, k, *grid.sigmas[i : i + 2]) for k in range(len(points))]
            matrix[i, 0] = SAMPLE + sum(w * slope for w, slope in zip(weights, slopes, strict=False))
            matrix[i, 1 : self.ORDER] = slopes[:-1]
        return self._build(grid.timesteps, grid.sigmas[:-1], matrix, grid, begin=begin)


def _integral(points: np.ndarray, k: int, start: float, end: float) -> float:
    """Of the k-th Lagrange polynomial through the points."""
    others = np.delete(points, k)
    whole = np.polyint(np.poly1d(others, r=True) / np.prod(points[k] - others))
    return float(np.polyval(whole, end) - np.polyval(whole, start))


# Two evaluations per step -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SecondOrderScheduler(KarrasScheduler):
    """Base of the solvers that evaluate the slope at a second point in each step."""

    order: ClassVar[int] = 2

    beta_start: float = 0.00085
    beta_end: float = 0.012

    def steps(self, num_inference_steps: int) -> int:
        own = self._custom("custom_timesteps")
        return self._check_steps(num_inference_steps, most=(MAX_STEPS + 1) // 2) if own is None else len(own)

    def _inner(self, grid: Grid) -> np.ndarray:
        """The sigma of each step's second evaluation, `[steps - 1]`; the last step has none."""
        raise NotImplementedError

    def _inner_timesteps(self, grid: Grid, inner: np.ndarray) -> np.ndarray:
        return sigma_to_timestep(inner, np.log(self.training_sigmas()))

    def _pairs(self, outer: np.ndarray, inner: np.ndarray) -> np.ndarray:
        """`[steps]` and `[steps - 1]` in turns."""
        pairs = np.empty(2 * len(outer) - 1)
        pairs[::2], pairs[1::2] = outer, inner
        return pairs

    def _lay_out(self, num_inference_steps: int, begin: int) -> Schedule:
        grid = self.grid(num_inference_steps)
        steps, inner = len(grid.timesteps), self._inner(grid)
        matrix = _lines(2 * steps - 1)
        for i in range(steps):
            sigma, after = grid.sigmas[i : i + 2]
            # First to the second point, storing the sample and its slope; from the last sigma directly to the end.
            place = inner[i] if i < steps - 1 else after
            matrix[2 * i, :3] = [SAMPLE + (place - sigma) * _slope(sigma), SAMPLE, _slope(sigma)]
            if i < steps - 1:
                matrix[2 * i + 1, 0] = self._second(sigma, place, after)
        draws_noise = np.zeros(len(matrix), bool)
        draws_noise[1::2] = matrix[1::2, 0, Z] != 0
        return self._build(
            self._pairs(grid.timesteps, self._inner_timesteps(grid, inner)),
            self._pairs(grid.sigmas[:-1], inner),
            matrix,
            grid,
            begin=2 * begin,
            draws_noise=draws_noise,
        )

    def _second(self, sigma: float, place: float, after: float) -> np.ndarray:
        """The sample after the step, as a line of a matrix whose slots 1 and 2 are the sample and slope before it."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class HeunDiscreteScheduler(SecondOrderScheduler):
    """Heun's method: the mean of the slopes at both ends."""

    clip_sample: bool = False
    clip_sample_range: float = 1.0

    CUSTOM: ClassVar[tuple[str, ...]] = ("custom_timesteps",)

    def _inner(self, grid: Grid) -> np.ndarray:
        return grid.sigmas[1:-1]

    def _inner_timesteps(self, grid: Grid, inner: np.ndarray) -> np.ndarray:
        return grid.timesteps[1:]

    def _second(self, sigma: float, place: float, after: float) -> np.ndarray:
        return BASIS[1] + (after - sigma) * (BASIS[2] + _slope(place)) / 2


@dataclasses.dataclass(frozen=True)
class KDPM2DiscreteScheduler(SecondOrderScheduler):
    """The midpoint rule in log(sigma): DPM-Solver-2 of arXiv 2206.00927."""

    CHOICES: ClassVar[Mapping[str, tuple[object, ...]]] = {
        **SecondOrderScheduler.CHOICES,
        "prediction_type": ("epsilon", "v_prediction"),
    }

    def grid(self, num_inference_steps: int) -> Grid:
        timesteps, sigmas = super().grid(num_inference_steps)
        return Grid(timesteps.round() if self.use_karras_sigmas else timesteps, sigmas)

    def _target(self, sigma: Any, after: Any) -> tuple[Any, Any]:
        """Down to which sigma a step goes, and how much noise is added then."""
        return after, np.zeros_like(after)

    def _inner(self, grid: Grid) -> np.ndarray:
        sigma, after = grid.sigmas[:-2], grid.sigmas[1:-1]
        return np.sqrt(sigma * self._target(sigma, after)[0])

    def _second(self, sigma: float, place: float, after: float) -> np.ndarray:
        down, up = self._target(sigma, after)
        return BASIS[1] + (down - sigma) * _slope(place) + up * BASIS[Z]


@dataclasses.dataclass(frozen=True)
class KDPM2AncestralDiscreteScheduler(KDPM2DiscreteScheduler):
    """The midpoint rule, with fresh noise after each step."""

    def _target(self, sigma: Any, after: Any) -> tuple[Any, Any]:
        return ancestral(sigma, after)
