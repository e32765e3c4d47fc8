"""UniPC: Zhao et al. 2023 (arXiv 2302.04867). Reference: diffusers' UniPCMultistepScheduler."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from kandinsky_jax.schedulers.noise_schedule import SchedulerError
from kandinsky_jax.schedulers.sigmas import Grid, MultistepScheduler
from kandinsky_jax.schedulers.table import BASIS, EPS, X0, Schedule


@dataclasses.dataclass(frozen=True)
class UniPCMultistepScheduler(MultistepScheduler):
    """A predictor of each step, and at the next evaluation a corrector of the step before, at no evaluation more.

    `disable_corrector` lists steps that are not corrected.
    """

    solver_order: int = 2
    predict_x0: bool = True
    solver_type: str = "bh2"
    lower_order_final: bool = True
    disable_corrector: tuple[int, ...] = ()
    solver_p: None = None
    timestep_spacing: str = "linspace"
    steps_offset: int = 0
    use_dynamic_shifting: bool = False
    final_sigmas_type: str = "zero"
    rescale_betas_zero_snr: bool = False
    sigma_min: float | None = None
    sigma_max: float | None = None

    CHOICES: ClassVar[Mapping[str, tuple[object, ...]]] = {
        **MultistepScheduler.CHOICES,
        "solver_order": (1, 2, 3),
        "solver_type": ("bh1", "bh2"),
        "solver_p": (None,),  # another scheduler as the predictor
    }
    SYNONYMS: ClassVar[Mapping[str, Mapping[object, object]]] = {
        "solver_type": dict.fromkeys(("midpoint", "heun", "logrho"), "bh2"),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.final_sigmas_type == "zero" and not (self.predict_x0 and self.lower_order_final):
            raise SchedulerError(
                "UniPCMultistepScheduler: final_sigmas_type='zero' needs predict_x0 and lower_order_final; choose "
                "final_sigmas_type='sigma_min'"
            )

    def _lay_out(self, num_inference_steps: int, begin: int) -> Schedule:
        grid = self.grid(num_inference_steps)
        steps = len(grid.timesteps)
        now, kept = BASIS[X0 if self.predict_x0 else EPS], list(BASIS[2:5])
        rows, order = [], 0
        for i in range(begin, steps):
            sample = BASIS[0]
            if i > begin and i - 1 not in self.disable_corrector:
                sample = self._update(grid, i - 1, order, BASIS[1], kept, corrector=now)
            left = steps - i if self.lower_order_final else self.solver_order
            order = min(self.solver_order, left, i - begin + 1)
            rows.append([self._update(grid, i, order, sample, [now, *kept]), sample, now, *kept[:2]])
        return self._build(grid, begin, rows, **{} if self.predict_x0 else {"clip": np.inf, "threshold": None})

    def _update(
        self,
        grid: Grid,
        i: int,
        order: int,
        sample: np.ndarray,
        kept: Sequence[np.ndarray],
        corrector: np.ndarray | None = None,
    ) -> np.ndarray:
        """The sample at point i + 1, as a line of a matrix.

        Args:
            sample: the line that is the sample at point i.
            kept: the predictions at points i, i - 1, ...
            corrector: the prediction at point i + 1, for the corrector.
        """
        lambdas, levels = grid.log_snr(), grid.levels()
        h = lambdas[i + 1] - lambdas[i]
        (signal, sigma), (signal_before, sigma_before) = levels[i + 1], levels[i]
        share, scale, w = (sigma / sigma_before, signal, -h) if self.predict_x0 else (signal / signal_before, sigma, h)
        first = np.expm1(w)
        line = share * sample - scale * first * kept[0]
        size = first if self.solver_type == "bh2" else w
        ways = [(lambdas[i - k] - lambdas[i]) / h for k in range(1, order)]
        changes = [(kept[k] - kept[0]) / ways[k - 1] for k in range(1, order)]
        if corrector is not None:
            ways, changes = [*ways, 1.0], [*changes, corrector - kept[0]]
        for weight, change in zip(self._weights(w, size, ways, order), changes, strict=True):
            line = line - scale * size * weight * change
        return line

    @staticmethod
    def _weights(w: float, size: float, ways: Sequence[float], order: int) -> np.ndarray:
        """Of the changes: they match the first derivatives of the prediction (the paper's equation 5)."""
        count = len(ways)
        if count == 0:
            return np.zeros(0)
        if count == 1:  # the reference does not solve this system, for neither
            return np.array([0.5])
        phi = np.expm1(w) / w - 1
        sums = []
        for k in range(1, count + 1):
            sums.append(phi * math.factorial(k) / size)
            phi = phi / w - 1 / math.factorial(k + 1)
        return np.linalg.solve(np.vander(ways, increasing=True).T, np.array(sums))
