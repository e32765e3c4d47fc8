"""A scheduler as a table: everything a solver does, as numbers per step.

Every solver used here is linear in what it has: its state (the sample first, then what it kept from earlier
evaluations), the predictions x0 and eps, and fresh noise z. So a step is

    state' = matrix[i] @ [state, x0, eps, z]

and the device needs no scheduler's name, only these arrays. What is not linear stands between the network and the
matrix: clipping or dynamic thresholding of x0, and a learned variance, which scales z. The host computes a table in
float64, once per call; the device holds it in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kandinsky_jax.schedulers.noise_schedule import SchedulerError

STATE_SLOTS = 6  # the state's slots; six serve every multistep solver up to order three with a corrector
X0, EPS, Z = STATE_SLOTS, STATE_SLOTS + 1, STATE_SLOTS + 2  # columns of the matrix after those of the state
MAX_STEPS = 1024  # all tables have this length, so that the number of steps is no part of a program's shape

# What a new state is made of, as rows to be added and scaled: `0.5 * BASIS[0] + 2 * BASIS[X0]` is a row of a matrix.
BASIS = np.eye(STATE_SLOTS + 3)


class SolverCoefficients(NamedTuple):
    """The coefficients of each evaluation of the network, rows first; a schedule's table is padded to `MAX_STEPS`.

    Args:
        timestep: `[N]`, the network's second argument.
        input_scale: `[N]`; the sample is multiplied by this for the network.
        x0_from: `[N, 2]`: x0 = a * sample + b * output.
        eps_from: `[N, 3]`: eps = a * sample + b * x0 (clipped) + c * output.
        log_variance: `[N, 2]`, bounds for a learned share in -1..1; z gets exp(half of the result).
        variance_is_output: `[N]`, 1 where the network's second half is the variance itself.
        clip: `[N]`; x0 is clipped to +-clip, infinite for none.
        threshold: `[N, 3]`: on (1 or 0), quantile, largest bound of dynamic thresholding.
        matrix: `[N, STATE_SLOTS, STATE_SLOTS + 3]`: state' = matrix @ [state, x0, eps, z].
        levels: `[N, 2]`, the factors of signal and noise in the sample, see `Schedule`.
    """

    timestep: np.ndarray
    input_scale: np.ndarray
    x0_from: np.ndarray
    eps_from: np.ndarray
    log_variance: np.ndarray
    variance_is_output: np.ndarray
    clip: np.ndarray
    threshold: np.ndarray
    matrix: np.ndarray
    levels: np.ndarray


@dataclass(frozen=True)
class Schedule:
    """A scheduler's answer for a number of steps: the table for the device, and what the host must know.

    Args:
        table: the coefficients, padded to `MAX_STEPS` rows.
        timesteps: `[evaluations]`, as diffusers' `scheduler.timesteps`.
        draws_noise: bool `[evaluations]`, whether the reference draws random numbers at this one.
        levels: float64 `[evaluations, 2]`, the factors of signal and noise in the sample that each one takes;
            1 and sigma where the sample is not scaled down, as in Euler's schedulers.
        learned_variance: whether the network's second half of channels is used.
        init_noise_sigma: what the first noise is multiplied by.
    """

    table: SolverCoefficients
    timesteps: np.ndarray
    draws_noise: np.ndarray
    levels: np.ndarray
    learned_variance: bool
    init_noise_sigma: float = 1.0

    def __len__(self) -> int:
        """Evaluations of the network; two per step for second-order solvers."""
        return len(self.timesteps)


def build(
    *,
    timesteps: np.ndarray,
    levels: np.ndarray,
    x0_from: np.ndarray,
    matrix: np.ndarray,
    eps_from: np.ndarray | None = None,
    draws_noise: np.ndarray | None = None,
    input_scale: np.ndarray | None = None,
    log_variance: np.ndarray | None = None,
    variance_is_output: bool = False,
    clip: float = np.inf,
    threshold: tuple[float, float] | None = None,
    init_noise_sigma: float = 1.0,
    begin: int = 0,
) -> Schedule:
    """Put a table together from float64 arrays, one row per evaluation, and pad it.

    Args:
        timesteps: `[n]`, descending.
        levels: `[n, 2]`, see `Schedule`.
        x0_from: `[n, 2]`; eps_from: `[n, 3]`, None where eps is not used; see `SolverCoefficients`.
        matrix: `[n, STATE_SLOTS, STATE_SLOTS + 3]`.
        draws_noise: bool `[n]`, None for never.
        input_scale: `[n]`, None for 1.
        log_variance: `[n, 2]` for a learned variance, else None.
        variance_is_output: the network predicts the variance itself, not an interpolant.
        clip: bound of x0, in units of the sample.
        threshold: (quantile, largest bound) of dynamic thresholding, or None.
        begin: rows to leave out, for a sample that is already partly denoised.
    Raises:
        SchedulerError: where a coefficient is not finite, or the table would be longer than `MAX_STEPS`.
    """
    n = len(timesteps)
    if n - begin > MAX_STEPS:
        raise SchedulerError(f"{n - begin} evaluations of the network are more than the {MAX_STEPS} that a table holds")
    quantile, largest = threshold or (0.0, 1.0)
    table = SolverCoefficients(
        timestep=np.asarray(timesteps),
        input_scale=np.ones(n) if input_scale is None else input_scale,
        x0_from=x0_from,
        eps_from=np.zeros((n, 3)) if eps_from is None else eps_from,
        log_variance=np.zeros((n, 2)) if log_variance is None else log_variance,
        variance_is_output=np.full(n, float(variance_is_output)),
        clip=np.full(n, clip),
        threshold=np.tile([float(threshold is not None), quantile, largest], (n, 1)),
        matrix=matrix,
        levels=levels,
    )
    table = SolverCoefficients(*(_padded(column[begin:]) for column in table))
    if broken := [name for name in ("x0_from", "eps_from", "matrix") if not np.isfinite(getattr(table, name)).all()]:
        raise SchedulerError(f"these options divide by zero at {n} steps (coefficients: {', '.join(broken)})")
    return Schedule(
        table=table,
        timesteps=np.asarray(timesteps)[begin:],
        draws_noise=(np.zeros(n, bool) if draws_noise is None else np.asarray(draws_noise, bool))[begin:],
        levels=np.asarray(levels)[begin:],
        learned_variance=log_variance is not None or variance_is_output,
        init_noise_sigma=init_noise_sigma,
    )


def _padded(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, np.float64)
    with np.errstate(over="ignore"):
        return np.concatenate([values, np.zeros((MAX_STEPS - len(values), *values.shape[1:]))]).astype(np.float32)
