"""SA-Solver: Xue et al. 2023 (arXiv 2309.05019). Reference: diffusers' SASolverScheduler."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import numpy as np

from kandinsky_jax.schedulers.noise_schedule import SchedulerError
from kandinsky_jax.schedulers.sigmas import Grid, MultistepScheduler
from kandinsky_jax.schedulers.table import BASIS, EPS, STATE_SLOTS, X0, Schedule, Z

LAST_SAMPLE, LAST_NOISE, KEPT = 1, 2, 3  # slots


def noisy_in_the_middle(timestep: int) -> float:
    """The reference's tau: noise as in the stochastic differential equation from timestep 800 to 200, none outside."""
    return float(200 <= timestep <= 800)


@dataclasses.dataclass(frozen=True)
class SASolverScheduler(MultistepScheduler):
    """Stochastic Adams: a predictor of each step, and at the next evaluation a corrector of the step before.

    `tau_func` gives the amount of noise of a step, by its timestep; None is `noisy_in_the_middle`.
    """

    predictor_order: int = 2
    corrector_order: int = 2
    tau_func: Callable[[int], float] | None = None
    algorithm_type: str = "data_prediction"
    lower_order_final: bool = True
    lambda_min_clipped: float = -np.inf
    variance_type: str | None = None
    timestep_spacing: str = "linspace"
    steps_offset: int = 0

    CHOICES: ClassVar[Mapping[str, tuple[object, ...]]] = {
        **MultistepScheduler.CHOICES,
        "predictor_order": (1, 2, 3, 4),
        "corrector_order": (1, 2, 3, 4),
        "algorithm_type": ("data_prediction", "noise_prediction"),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.thresholding and not self._of_x0:
            raise SchedulerError("SASolverScheduler: thresholding needs algorithm_type='data_prediction'")

    @property
    def _of_x0(self) -> bool:
        return self.algorithm_type == "data_prediction"

    def _lay_out(self, num_inference_steps: int, begin: int) -> Schedule:
        grid = self.grid(num_inference_steps)
        steps = len(grid.timesteps)
        tau = [float((self.tau_func or noisy_in_the_middle)(int(t))) for t in grid.timesteps]
        now, kept = BASIS[X0 if self._of_x0 else EPS], list(BASIS[KEPT:STATE_SLOTS])
        rows, order = [], 0
        for i in range(begin, steps):
            sample = BASIS[0]
            if i > begin:
                points = list(range(i, i - order, -1))
                sample = self._update(
                    grid, i - 1, points, tau[i - 1], BASIS[LAST_SAMPLE], BASIS[LAST_NOISE], [now, *kept]
                )
            left = steps - i if self.lower_order_final else steps
            points = list(range(i, i - min(self.predictor_order, left, i - begin + 1), -1))
            new = self._update(grid, i, points, tau[i], sample, BASIS[Z], [now, *kept])
            order = min(self.corrector_order, left + 1, i - begin + 2)
            rows.append([new, sample, BASIS[Z], now, *kept[:2]])
        return self._build(grid, begin, rows, draws_noise=np.ones(len(rows), bool))

    def _update(
        self,
        grid: Grid,
        i: int,
        points: Sequence[int],
        tau: float,
        sample: np.ndarray,
        noise: np.ndarray,
        kept: Sequence[np.ndarray],
    ) -> np.ndarray:
        """The sample at point i + 1, as a line of a matrix.

        Args:
            points: those at which the predictions `kept` were made; i + 1 is one of them for the corrector.
            sample, noise: lines of the sample at point i, and of its noise.
        """
        lambdas, levels = grid.log_snr(), grid.levels()
        start, end = lambdas[i], lambdas[i + 1]
        h, (signal, sigma), (signal_before, sigma_before) = end - start, levels[i + 1], levels[i]
        rate = 1 + tau**2 if self._of_x0 else -1.0
        weights = _integrals(rate, start, end, lambdas[list(points)])
        if not self._of_x0:
            line = signal / signal_before * sample + tau * sigma * np.sqrt(np.expm1(2 * h)) * noise
            scale = -(1 + tau**2) * signal
        else:
            line = np.exp(-(tau**2) * h) * sigma / sigma_before * sample
            line = line + sigma * np.sqrt(-np.expm1(-2 * tau**2 * h)) * noise
            scale = (1 + tau**2) * sigma * np.exp(-(tau**2) * end)
            if len(points) == 2:
                weights = weights + self._correction(rate, h, end, lambdas[list(points)], points[0] > i)
        for weight, prediction in zip(weights, kept, strict=False):
            line = line + scale * weight * prediction
        return line

    @staticmethod
    def _correction(rate: float, h: float, end: float, lambdas: np.ndarray, corrector: bool) -> np.ndarray:
        """What the reference adds to the weights at order two, so that they make a DPM-Solver++ 2M where tau is 0."""
        curve = (h * rate - 1 + np.exp(-rate * h)) / rate**2
        change = (h / 2 - curve / h) if corrector else (h**2 / 2 - curve) / (lambdas[0] - lambdas[1])
        return np.exp(rate * end) * change * np.array([1.0, -1.0])


def _integrals(rate: float, start: float, end: float, points: np.ndarray) -> np.ndarray:
    """From start to end of exp(rate x) times each Lagrange polynomial through the points."""
    weights = []
    for i, point in enumerate(points):
        others = np.delete(points, i)
        polynomial = np.poly1d(others, r=True) / np.prod(point - others)
        # Of exp(r x) p(x) the integral is exp(r x) (p / r - p' / r^2 + p'' / r^3 - ...).
        terms = [np.polyder(polynomial, k) * (-1) ** k / rate ** (k + 1) for k in range(len(points))]
        ends = [np.exp(rate * x) * sum(float(np.polyval(term, x)) for term in terms) for x in (end, start)]
        weights.append(ends[0] - ends[1])
    return np.array(weights)
