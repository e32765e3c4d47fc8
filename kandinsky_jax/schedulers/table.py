"""A scheduler as a table: everything a solver does, as numbers per step.

Every solver used here is linear in what it has: its state (the sample first, then what it kept from earlier
evaluations), the predictions x0 and eps, and fresh noise z. So a step is

    state' = matrix[i] @ [state, x0, eps, z]

and the device needs no scheduler's name, only these arrays. What is not linear stands between the network and the
matrix: clipping or dynamic thresholding of x0, and a learned variance, which scales z. The host computes a table in
float64, once per call; the device holds it in float32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

SLOTS = 6  # the state's slots; six serve every multistep solver up to order three with a corrector
X0, EPS, Z = SLOTS, SLOTS + 1, SLOTS + 2  # columns of the matrix after those of the state
ROWS = 1024  # all tables have this length, so that the number of steps is no part of a program's shape


class Table(NamedTuple):
    """The coefficients of each evaluation of the network, padded to `ROWS`; rows first."""

    timestep: np.ndarray  # [N] what the network is told
    input_scale: np.ndarray  # [N] the sample is multiplied by this for the network
    x0_from: np.ndarray  # [N, 2] x0 = a * sample + b * output
    eps_from: np.ndarray  # [N, 3] eps = a * sample + b * x0 (clipped) + c * output
    log_variance: np.ndarray  # [N, 2] bounds for a learned share in -1..1; z gets exp(half of the result)
    variance_is_output: np.ndarray  # [N] 1 where the network's second half is the variance itself
    clip: np.ndarray  # [N] x0 is clipped to +-clip; infinite for none
    threshold: np.ndarray  # [N, 3] on (1 or 0), quantile, largest bound of dynamic thresholding
    matrix: np.ndarray  # [N, SLOTS, SLOTS + 3]


@dataclass(frozen=True)
class Schedule:
    """A scheduler's answer for a number of steps: the table for the device, and what the host must know."""

    table: Table
    timesteps: np.ndarray  # int [steps], as diffusers' scheduler.timesteps
    draws_noise: np.ndarray  # bool [steps], whether the reference draws random numbers at this step
    learned_variance: bool  # whether the network's second half of channels is used
    init_noise_sigma: float = 1.0

    def __len__(self) -> int:
        return len(self.timesteps)

    def last(self, steps: int) -> Schedule:
        """The schedule's last steps, for a sample that is already partly drawn."""
        first = len(self) - steps
        rows = [np.concatenate([column[first:], column[:first]]) for column in self.table]
        return replace(self, table=Table(*rows), timesteps=self.timesteps[first:], draws_noise=self.draws_noise[first:])


def build(
    *,
    timesteps: np.ndarray,
    x0_from: np.ndarray,
    eps_from: np.ndarray,
    matrix: np.ndarray,
    draws_noise: np.ndarray,
    log_variance: np.ndarray | None = None,
    variance_is_output: bool = False,
    clip: float = np.inf,
    threshold: tuple[float, float] | None = None,
) -> Schedule:
    """Put a table together from float64 arrays, one row per step, and pad it.

    Args:
        timesteps: int `[n]`, descending.
        x0_from: `[n, 2]`; eps_from: `[n, 3]`; matrix: `[n, SLOTS, SLOTS + 3]`: see `Table`.
        draws_noise: bool `[n]`.
        log_variance: `[n, 2]` for a learned variance, else None.
        variance_is_output: the network predicts the variance itself, not an interpolant.
        clip: bound of x0, in units of the sample.
        threshold: (quantile, largest bound) of dynamic thresholding, or None.
    """
    n = len(timesteps)

    def pad(values: np.ndarray) -> np.ndarray:
        values = np.asarray(values, np.float64)
        return np.concatenate([values, np.zeros((ROWS - n, *values.shape[1:]))]).astype(np.float32)

    quantile, largest = threshold or (0.0, 1.0)
    table = Table(
        timestep=pad(timesteps),
        input_scale=pad(np.ones(n)),
        x0_from=pad(x0_from),
        eps_from=pad(eps_from),
        log_variance=pad(np.zeros((n, 2)) if log_variance is None else log_variance),
        variance_is_output=pad(np.full(n, float(variance_is_output))),
        clip=pad(np.full(n, clip)),
        threshold=pad(np.tile([float(threshold is not None), quantile, largest], (n, 1))),
        matrix=pad(matrix),
    )
    learned = log_variance is not None or variance_is_output
    return Schedule(table, np.asarray(timesteps), np.asarray(draws_noise, bool), learned)
