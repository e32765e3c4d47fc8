"""DEIS: Zhang & Chen 2022 (arXiv 2204.13902), its log-rho form. Reference: diffusers' DEISMultistepScheduler."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from kandinsky_jax.schedulers.base import eps_of_x0
from kandinsky_jax.schedulers.sigmas import FEW, MultistepScheduler
from kandinsky_jax.schedulers.table import BASIS, EPS, Schedule


@dataclasses.dataclass(frozen=True)
class DEISMultistepScheduler(MultistepScheduler):
    """Holds the predicted noise to a polynomial in log(sigma) through one to three evaluations."""

    solver_order: int = 2
    algorithm_type: str = "deis"
    solver_type: str = "logrho"
    lower_order_final: bool = True
    timestep_spacing: str = "linspace"
    steps_offset: int = 0
    use_dynamic_shifting: bool = False

    CHOICES: ClassVar[Mapping[str, tuple[object, ...]]] = {
        **MultistepScheduler.CHOICES,
        "solver_order": (1, 2, 3),
        "algorithm_type": ("deis",),
        "solver_type": ("logrho",),
    }
    SYNONYMS: ClassVar[Mapping[str, Mapping[object, object]]] = {
        "algorithm_type": dict.fromkeys(("dpmsolver", "dpmsolver++"), "deis"),
        "solver_type": dict.fromkeys(("midpoint", "heun", "bh1", "bh2"), "logrho"),
    }

    def _lay_out(self, num_inference_steps: int, begin: int) -> Schedule:
        grid = self.grid(num_inference_steps)
        steps, signal = len(grid.timesteps), grid.levels()[:, 0]
        kept = (BASIS[EPS], BASIS[1], BASIS[2])
        rows = []
        for i in range(begin, steps):
            order = min(self._order(i, steps), i - begin + 1)
            weights = _integrals(grid.sigmas[i + 1], grid.sigmas[i - order + 1 : i + 1][::-1])
            slope = sum((w * eps for w, eps in zip(weights, kept, strict=False)), np.zeros(len(BASIS)))
            rows.append([signal[i + 1] * (BASIS[0] / signal[i] + slope), *kept[:2]])
        return self._build(grid, begin, rows, eps_from=eps_of_x0(grid.alpha()[begin:-1]))

    def _order(self, i: int, steps: int) -> int:
        left = steps - i if self.lower_order_final and steps < FEW else self.solver_order
        return min(self.solver_order, left)


def _integrals(end: float, points: np.ndarray) -> np.ndarray:
    """From points[0] to `end` over sigma, of each Lagrange polynomial in log(sigma) through the points."""
    if end == points[0]:
        return np.zeros(len(points))
    logs = np.log(points)
    weights = []
    for i, log in enumerate(logs):
        others = np.delete(logs, i)
        polynomial = np.poly1d(others, r=True) / np.prod(log - others)

        # Of p(log s) the integral is s (p - p' + p'' - ...)(log s).
        def integral(sigma: float, p: np.poly1d = polynomial) -> float:
            terms = [(-1) ** k * np.polyval(np.polyder(p, k), np.log(sigma)) for k in range(len(points))]
            return sigma * sum(terms)

        weights.append(integral(end) - integral(points[0]))
    return np.array(weights)
