"""DPM-Solver: Lu et al. 2022 (arXiv 2206.00927), and DPM-Solver++, with its stochastic forms (arXiv 2211.01095).

Reference: diffusers' DPMSolverMultistepScheduler and DPMSolverSinglestepScheduler.

With lambda = log(alpha / sigma) and h the way in lambda, all their updates are one formula. The "++" ones hold the
predicted picture to a polynomial in lambda over the step, the others the predicted noise; the integrals of exp(lambda)
times 1, lambda and lambda^2 are `_phi`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from kandinsky_jax.schedulers.base import eps_of_x0
from kandinsky_jax.schedulers.noise_schedule import SchedulerError
from kandinsky_jax.schedulers.sigmas import FEW, Grid, MultistepScheduler
from kandinsky_jax.schedulers.table import BASIS, EPS, X0, Schedule, Z


def _phi(w: float) -> tuple[float, float, float]:
    """exp(w) without its first term, without its first two over w, and without three over w^2."""
    first = np.expm1(w)
    if not np.isfinite(w) or w == 0:  # to sigma 0, where only the first order is taken; or no step at all
        return first, 0.0, 0.0
    return first, first / w - 1, (first - w) / w**2 - 0.5


@dataclasses.dataclass(frozen=True)
class DPMSolver(MultistepScheduler):
    """Base of both solvers: algorithm types, and the update of a step."""

    solver_order: int = 2
    algorithm_type: str = "dpmsolver++"
    solver_type: str = "midpoint"
    final_sigmas_type: str = "zero"
    lambda_min_clipped: float = -np.inf
    variance_type: str | None = None
    use_dynamic_shifting: bool = False

    CHOICES: ClassVar[Mapping[str, tuple[object, ...]]] = {
        **MultistepScheduler.CHOICES,
        "solver_order": (1, 2, 3),
        "algorithm_type": ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"),
        "solver_type": ("midpoint", "heun"),
    }
    SYNONYMS: ClassVar[Mapping[str, Mapping[object, object]]] = {
        "algorithm_type": {"deis": "dpmsolver++"},
        "solver_type": dict.fromkeys(("logrho", "bh1", "bh2"), "midpoint"),
    }
    CUSTOM: ClassVar[tuple[str, ...]] = ("custom_timesteps",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self._of_x0 and self.final_sigmas_type == "zero":
            raise SchedulerError(
                f"{type(self).__name__}: final_sigmas_type='zero' is not supported for algorithm_type="
                f"{self.algorithm_type!r}, which divides by the noise; choose final_sigmas_type='sigma_min'"
            )

    @property
    def _of_x0(self) -> bool:
        return self.algorithm_type.endswith("++")

    @property
    def _now(self) -> np.ndarray:
        return BASIS[X0 if self._of_x0 else EPS]

    @property
    def _noisy(self) -> bool:
        return self.algorithm_type.startswith("sde")

    def _last_sigma(self, training: np.ndarray, sigmas: np.ndarray, respaced: bool) -> float:
        return 0.0 if self.final_sigmas_type == "zero" else float(training[0])

    def _update(
        self, grid: Grid, start: int, end: int, sample: np.ndarray, terms: Sequence[np.ndarray], first: bool = False
    ) -> np.ndarray:
        """Compute the sample after moving between two points of the grid, as a row of a matrix.

        Args:
            sample: the line that is the sample at `start`.
            terms: the prediction there, and its derivatives in lambda, times h and h^2.
            first: the first derivative by the second integral for either solver type, as third-order steps do.
        """
        lambdas, (signal, sigma) = grid.log_snr(), grid.levels()[end]
        signal_before, sigma_before = grid.levels()[start]
        h = lambdas[end] - lambdas[start]
        if self._of_x0:
            w, scale = -h * (1 + self._noisy), signal
            kept = sigma / sigma_before * (np.exp(-h) if self._noisy else 1)
            spread = sigma * np.sqrt(-np.expm1(-2 * h))
        else:
            w, scale = h, sigma * (1 + self._noisy)
            kept = signal / signal_before
            spread = sigma * np.sqrt(np.expm1(2 * h))
        phi = list(_phi(w))
        if self._noisy and self._of_x0:
            phi[2] += 1  # the reference has the other sign before its half, at the third order
        if len(terms) == 2 and not first and self.solver_type == "midpoint":
            phi[1] = phi[0] / 2
        line = kept * sample
        for weight, term in zip(phi, terms, strict=False):
            line = line - scale * weight * term
        return line + spread * BASIS[Z] if self._noisy else line

    def _others(self, grid: Grid, begin: int) -> dict[str, Any]:
        """Of `build`."""
        others: dict[str, Any] = {"draws_noise": np.full(len(grid.timesteps) - begin, self._noisy)}
        if self.thresholding and not self._of_x0:
            others["eps_from"] = eps_of_x0(grid.alpha()[begin:-1])
        return others


@dataclasses.dataclass(frozen=True)
class DPMSolverMultistepScheduler(DPMSolver):
    """Multistep solver, which uses predictions of one or two earlier steps."""

    lower_order_final: bool = True
    euler_at_final: bool = False
    use_lu_lambdas: bool = False
    timestep_spacing: str = "linspace"
    steps_offset: int = 0
    rescale_betas_zero_snr: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.solver_order == 3 and self.algorithm_type == "sde-dpmsolver":
            raise SchedulerError("sde-dpmsolver has no third order; choose solver_order=2 or sde-dpmsolver++")

    def _respacings(self) -> tuple[str, ...]:
        return (*super()._respacings(), "use_lu_lambdas")

    def _respaced(self, sigmas: np.ndarray, steps: int) -> np.ndarray | None:
        if not self.use_lu_lambdas:
            return super()._respaced(sigmas, steps)
        return np.exp(np.linspace(float(np.log(sigmas[0])), float(np.log(sigmas[-1])), steps))

    def _to_int(self, timesteps: np.ndarray) -> np.ndarray:
        if (self.use_karras_sigmas or self.use_lu_lambdas) and self.beta_schedule != "squaredcos_cap_v2":
            timesteps = timesteps.round()
        return timesteps.astype(np.int64)

    def _lay_out(self, num_inference_steps: int, begin: int) -> Schedule:
        grid = self.grid(num_inference_steps)
        steps, lambdas = len(grid.timesteps), grid.log_snr()
        sample, now, before, earlier = BASIS[0], self._now, BASIS[1], BASIS[2]
        rows = []
        for i in range(begin, steps):
            h, way = lambdas[i + 1] - lambdas[i], lambdas[i] - lambdas[max(i - 2, 0) : i][::-1]
            order = min(self._order(i, steps), i - begin + 1)
            terms = [now]
            if order > 1:
                slope = (now - before) * h / way[0]
                terms.append(slope)
            if order > 2:
                change = slope - (before - earlier) * h / (way[1] - way[0])
                terms = [now, slope + way[0] / way[1] * change, h / way[1] * change]
            rows.append([self._update(grid, i, i + 1, sample, terms, first=order > 2), now, before])
        return self._build(grid, begin, rows, **self._others(grid, begin))

    def _order(self, i: int, steps: int) -> int:
        lower = self.lower_order_final and steps < FEW
        if i == steps - 1 and (self.euler_at_final or lower or self.final_sigmas_type == "zero"):
            return 1
        return min(self.solver_order, 2) if i == steps - 2 and lower else self.solver_order


@dataclasses.dataclass(frozen=True)
class DPMSolverSinglestepScheduler(DPMSolver):
    """Singlestep solver: steps in groups that start from a sample alone, without earlier predictions."""

    lower_order_final: bool = False

    CHOICES: ClassVar[Mapping[str, tuple[object, ...]]] = {
        **DPMSolver.CHOICES,
        "algorithm_type": ("dpmsolver", "dpmsolver++", "sde-dpmsolver++"),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.thresholding and not self._of_x0:
            raise SchedulerError("DPMSolverSinglestepScheduler: thresholding needs an algorithm_type with ++")

    def _lay_out(self, num_inference_steps: int, begin: int) -> Schedule:
        grid = self.grid(num_inference_steps)
        lambdas = grid.log_snr()
        sample, start, now, before, earlier = BASIS[0], BASIS[1], self._now, BASIS[2], BASIS[3]
        rows = []
        for i, order in enumerate(self._orders(len(grid.timesteps))):
            if i < begin:
                continue
            order = min(order, i - begin + 1)
            first, h = i - order + 1, lambdas[i + 1] - lambdas[i - order + 1]
            if order == 1:
                start, terms = sample, [now]
            elif order == 2:
                terms = [before, (now - before) * h / (lambdas[i] - lambdas[first])]
            else:
                ways = lambdas[[i, i - 1]] - lambdas[first]
                slopes = [(now - earlier) * h / ways[0], (before - earlier) * h / ways[1]]
                if self.solver_type == "midpoint":
                    terms = [earlier, slopes[0]]
                else:
                    slope = (ways[0] * slopes[1] - ways[1] * slopes[0]) / (ways[0] - ways[1])
                    change = 2 * (slopes[0] - slopes[1]) * h / (ways[0] - ways[1])
                    terms = [earlier, slope, change]
            line = self._update(grid, first, i + 1, start, terms, first=order > 2)
            rows.append([line, start, now, before])
            start = BASIS[1]
        return self._build(grid, begin, rows, **self._others(grid, begin))

    def _orders(self, steps: int) -> list[int]:
        """Return each step's order: groups of 1, 2, ... `solver_order`, arranged so that the last step is not alone."""
        order = self.solver_order
        # As the reference: it turns this on for numbers of steps that do not divide, and for a last sigma of zero.
        lower = self.lower_order_final or steps % order or self.final_sigmas_type == "zero"
        group = list(range(1, order + 1))
        if not lower or order == 1:
            orders = group * (steps // order)
        elif steps % order:
            orders = group * (steps // order) + group[: steps % order]
        else:
            # The last group's highest order is replaced by a lone first one.
            orders = group * (steps // order - 1) + group[:-1] + [1]
        if self.final_sigmas_type == "zero":
            orders[-1] = 1
        return orders
