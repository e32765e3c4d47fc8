"""Solvers in terms of sigmas, the ratio of noise to signal: the grids of sigmas that they visit.

Two families, as in the reference. Multistep solvers keep the sample's variance and spread int timesteps or sigmas over
the whole forward process. Karras et al.'s (2022, arXiv 2206.00364) scale the sample up instead, so that noise of a
standard deviation sigma is added to a clean picture, and may visit fractions of timesteps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np

from kandinsky_jax.schedulers.base import BetaScheduler, predictions
from kandinsky_jax.schedulers.noise_schedule import LEAST_ALPHA, SchedulerError, spaced_points, spread_timesteps
from kandinsky_jax.schedulers.table import STATE_SLOTS, Schedule, build

FIXED_VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")
FEW = 15  # steps below which multistep solvers lower their order at the end, as the reference does


class Grid(NamedTuple):
    """The points that a solver visits."""

    timesteps: np.ndarray  # [steps]
    sigmas: np.ndarray  # float64 [steps + 1]; the last one is where the sample ends

    def log_snr(self) -> np.ndarray:
        """Half the logarithm of the signal-to-noise ratio, lambda in the DPM-Solver papers; infinite at the end."""
        with np.errstate(divide="ignore"):
            return -np.log(self.sigmas)

    def alpha(self) -> np.ndarray:
        """The cumulative products, `[steps + 1]`."""
        return 1 / (self.sigmas**2 + 1)

    def levels(self) -> np.ndarray:
        """Signal and noise of a sample that keeps its variance, `[steps + 1, 2]`."""
        signal = np.sqrt(self.alpha())
        return np.stack([signal, self.sigmas * signal], axis=1)


@dataclasses.dataclass(frozen=True)
class SigmaScheduler(BetaScheduler):
    """Base of both families; the three `use_*` are ways to space the sigmas, of which one at most can be on."""

    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    custom_timesteps: tuple[float, ...] | None = dataclasses.field(default=None, kw_only=True)

    CUSTOM: ClassVar[tuple[str, ...]] = ("custom_timesteps",)  # what the reference's `set_timesteps` takes

    def __post_init__(self) -> None:
        super().__post_init__()
        on = [name for name in self._respacings() if getattr(self, name)]
        if len(on) > 1:
            raise SchedulerError(f"{type(self).__name__}: only one of {', '.join(on)} can be used")
        for name in ("custom_timesteps", "custom_sigmas"):
            if getattr(self, name, None) is not None and name not in self.CUSTOM:
                raise SchedulerError(f"{type(self).__name__} takes no {name}")
        if self.custom_timesteps is not None and on:
            raise SchedulerError(f"{type(self).__name__}: custom_timesteps cannot be used with {on[0]}")

    def _respacings(self) -> tuple[str, ...]:
        return "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"

    def steps(self, num_inference_steps: int) -> int:
        for name in self.CUSTOM:
            if (own := self._custom(name)) is not None:
                return len(own) - (name == "custom_sigmas")
        return self._check_steps(num_inference_steps)

    def training_sigmas(self) -> np.ndarray:
        """Float32 `[num_train_timesteps]`, rising, as the reference rounds them."""
        alpha = self.alphas_cumprod.astype(np.float32)
        if getattr(self, "rescale_betas_zero_snr", False):
            alpha[-1] = LEAST_ALPHA
        return np.sqrt((np.float32(1) - alpha) / alpha)

    def _respaced(self, sigmas: np.ndarray, steps: int) -> np.ndarray | None:
        """Sigmas `[steps]` between the ends of falling ones, if a way to space them is on."""
        ends = (getattr(self, "sigma_max", None), getattr(self, "sigma_min", None))
        high, low = (float(x) if end is None else end for end, x in zip(ends, (sigmas[0], sigmas[-1]), strict=True))
        if self.use_karras_sigmas:  # equation 5, rho = 7
            first, last = high ** (1 / 7), low ** (1 / 7)
            return (first + np.linspace(0, 1, steps) * (last - first)) ** 7
        if self.use_exponential_sigmas:
            return np.exp(np.linspace(np.log(high), np.log(low), steps))
        if self.use_beta_sigmas:  # Lee et al. 2024, arXiv 2407.12173
            from scipy.special import betaincinv  # type: ignore[import-untyped]  # not at import: few need it

            return low + betaincinv(0.6, 0.6, 1 - np.linspace(0, 1, steps)) * (high - low)
        return None


def sigma_to_timestep(sigmas: np.ndarray, log_sigmas: np.ndarray) -> np.ndarray:
    """Fractions of timesteps `[n]` at which sigmas `[n]` are, between the rising logarithms `[T]` of the training's."""
    wanted = np.log(np.maximum(sigmas, 1e-10))
    reached = np.cumsum(wanted - log_sigmas[:, None] >= 0, axis=0)  # [T, n]
    low = np.minimum(reached.argmax(axis=0), len(log_sigmas) - 2)
    below, above = log_sigmas[low], log_sigmas[low + 1]
    share = np.clip((below - wanted) / (below - above), 0, 1)
    return (1 - share) * low + share * (low + 1)


def rounded(sigmas: np.ndarray) -> np.ndarray:
    """Float64 of the float32 numbers that the reference holds."""
    return sigmas.astype(np.float32).astype(np.float64)


# Solvers that keep the variance -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class MultistepScheduler(SigmaScheduler):
    """Base of the solvers that remember earlier predictions: DPM-Solver, DEIS, UniPC, SA-Solver."""

    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    # Flow matching is not what Kandinsky 2.2 was trained for.
    use_flow_sigmas: bool = False

    CHOICES: ClassVar[Mapping[str, tuple[object, ...]]] = {
        **BetaScheduler.CHOICES,
        "use_flow_sigmas": (False,),
        "use_dynamic_shifting": (False,),
        # Of a solver with a variance of its own: fixed ones are not used, a learned half of the output is left aside.
        "variance_type": (None, *FIXED_VARIANCES, "learned", "learned_range"),
    }
    CUSTOM: ClassVar[tuple[str, ...]] = ()

    def grid(self, num_inference_steps: int) -> Grid:
        """The points; int timesteps."""
        steps, training = self.steps(num_inference_steps), self.training_sigmas()
        timesteps = self._custom("custom_timesteps")
        respaced = self._respaced(training[::-1], steps)
        if respaced is not None:
            sigmas, timesteps = respaced, self._to_int(sigma_to_timestep(respaced, np.log(training)))
        else:
            if timesteps is None:
                timesteps = self._within(self._spread(steps, training))
            timesteps = timesteps.astype(np.int64)
            sigmas = np.interp(timesteps, np.arange(len(training)), training)
        last = self._last_sigma(training, sigmas, respaced is not None)
        return Grid(timesteps, rounded(np.append(sigmas, last)))

    def _spread(self, steps: int, training: np.ndarray) -> np.ndarray:
        last = self.num_train_timesteps - self._clipped(training)
        spacing, offset = getattr(self, "timestep_spacing", "linspace"), getattr(self, "steps_offset", 0)
        return spread_timesteps(spacing, steps, self.num_train_timesteps, offset, last)

    def _clipped(self, training: np.ndarray) -> int:
        """How many of the noisiest timesteps `lambda_min_clipped` leaves out."""
        least = getattr(self, "lambda_min_clipped", -np.inf)
        return int(np.searchsorted(-np.log(training.astype(np.float64))[::-1], least))

    def _to_int(self, timesteps: np.ndarray) -> np.ndarray:
        """Rounded with Karras' sigmas, cut off otherwise, as in the reference."""
        return (timesteps.round() if self.use_karras_sigmas else timesteps).astype(np.int64)

    def _last_sigma(self, training: np.ndarray, sigmas: np.ndarray, respaced: bool) -> float:
        if getattr(self, "final_sigmas_type", "sigma_min") == "zero":
            return 0.0
        return float(sigmas[-1] if respaced else training[0])

    def _build(self, grid: Grid, begin: int, rows: list[list[np.ndarray]], **others: Any) -> Schedule:
        """A schedule of the grid's points from `begin` on, by the first lines of each of its matrices."""
        matrix = np.zeros((len(rows), STATE_SLOTS, STATE_SLOTS + 3))
        for i, lines in enumerate(rows):
            matrix[i, : len(lines)] = lines
        alpha = grid.alpha()[begin:-1]
        x0_from, eps_from = predictions(self.prediction_type, alpha)
        return build(
            timesteps=grid.timesteps[begin:],
            levels=grid.levels()[begin:-1],
            matrix=matrix,
            **{"x0_from": x0_from, "eps_from": eps_from} | self.limits() | others,
        )


# Solvers that scale the sample up ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class KarrasScheduler(SigmaScheduler):
    """Base of Euler, Heun and their like: the sample is a clean picture plus noise of standard deviation sigma."""

    timestep_spacing: str = "linspace"
    steps_offset: int = 0

    CUSTOM: ClassVar[tuple[str, ...]] = ()

    def noise_levels(self, timesteps: np.ndarray) -> np.ndarray:
        sigma = np.atleast_1d(self.training_sigmas()[np.asarray(timesteps)].astype(np.float64))
        return np.stack([np.ones_like(sigma), sigma], axis=1)

    def grid(self, num_inference_steps: int) -> Grid:
        """The points; float timesteps."""
        steps, training = self.steps(num_inference_steps), self.training_sigmas()
        timesteps = self._custom("custom_timesteps")
        if timesteps is None:
            points = spaced_points(self.timestep_spacing, steps, self.num_train_timesteps, self.steps_offset)
            timesteps = self._within(points)
        timesteps = timesteps.astype(np.float32)
        sigmas = np.interp(timesteps, np.arange(len(training)), training)
        respaced = self._respaced(sigmas, steps)
        if respaced is not None:
            sigmas, timesteps = respaced, sigma_to_timestep(respaced, np.log(training))
        return Grid(timesteps, rounded(np.append(sigmas, 0.0)))

    def initial_sigma(self, grid: Grid) -> float:
        """The standard deviation of the first noise."""
        largest = float(grid.sigmas.max())
        return largest if self.timestep_spacing in ("linspace", "trailing") else float(np.hypot(largest, 1))

    def _build(
        self, timesteps: np.ndarray, sigmas: np.ndarray, matrix: np.ndarray, grid: Grid, **others: Any
    ) -> Schedule:
        """A schedule of evaluations at sigmas `[n]`, which a second-order solver has more of than the grid has points.

        Their matrices see x0; the slope of the sample's way is (sample - x0) / sigma.
        """
        zero, one = np.zeros_like(sigmas), np.ones_like(sigmas)
        variance = sigmas**2 + 1
        x0_from = {
            "epsilon": (one, -sigmas),
            "sample": (zero, one),
            "v_prediction": (1 / variance, -sigmas / np.sqrt(variance)),
        }[self.prediction_type]
        return build(
            timesteps=timesteps,
            levels=np.stack([one, sigmas], axis=1),
            x0_from=np.stack(x0_from, axis=1),
            input_scale=1 / np.sqrt(variance),
            matrix=matrix,
            init_noise_sigma=self.initial_sigma(grid),
            **self.limits() | others,
        )
