"""Pseudo numerical methods: Liu et al. 2022 (arXiv 2202.09778). Reference: diffusers' PNDM and IPNDMScheduler."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from kandinsky_jax.schedulers.base import BetaScheduler, Scheduler, predictions, vp_levels
from kandinsky_jax.schedulers.noise_schedule import SchedulerError, spaced_timesteps
from kandinsky_jax.schedulers.table import BASIS, EPS, MAX_STEPS, STATE_SLOTS, Schedule, build

# The network's output itself goes through the column of eps. Adams-Bashforth's weights, the newest output first.
ADAMS = {1: (1.0,), 2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}
RUNGE_KUTTA = 12  # evaluations, four for each of three steps
WARM_UP = 3


def _adams(outputs: list[np.ndarray]) -> np.ndarray:
    weights = ADAMS[len(outputs)]
    return np.sum([w * output for w, output in zip(weights, outputs, strict=True)], axis=0)


def _raw(n: int) -> dict[str, Any]:
    """Return `build`'s arguments for solvers that use the network's output directly."""
    return {"x0_from": np.zeros((n, 2)), "eps_from": np.tile([0.0, 0.0, 1.0], (n, 1))}


@dataclasses.dataclass(frozen=True)
class PNDMScheduler(BetaScheduler):
    """Adams-Bashforth of order four on the outputs; three Runge-Kutta steps of four evaluations each come before it,
    unless `skip_prk_steps`, which evaluates the second timestep twice instead."""

    skip_prk_steps: bool = False
    set_alpha_to_one: bool = False
    timestep_spacing: str = "leading"
    steps_offset: int = 0

    CHOICES: ClassVar[Mapping[str, tuple[object, ...]]] = {
        **BetaScheduler.CHOICES,
        "prediction_type": ("epsilon", "v_prediction"),
    }

    def steps(self, num_inference_steps: int) -> int:
        if self.skip_prk_steps:
            return self._check_steps(num_inference_steps, least=2, most=MAX_STEPS - 1)
        return self._check_steps(num_inference_steps, least=WARM_UP + 1, most=MAX_STEPS - (RUNGE_KUTTA - WARM_UP))

    def _lay_out(self, num_inference_steps: int, begin: int) -> Schedule:
        steps = self.steps(num_inference_steps)
        visited = self._within(
            spaced_timesteps(self.timestep_spacing, steps, self.num_train_timesteps, self.steps_offset)
        )[begin:]
        if len(visited) < (least := 2 if self.skip_prk_steps else WARM_UP + 1):
            raise SchedulerError(
                f"PNDMScheduler needs {least} steps or more, {len(visited)} are left; give more, a higher strength"
                + ("" if self.skip_prk_steps else ", or skip_prk_steps=True")
            )
        stride = self.num_train_timesteps // steps
        ways, matrix = self._multistep(visited, stride) if self.skip_prk_steps else self._runge_kutta(visited, stride)
        alpha = self.alphas_cumprod[ways]
        x0_from, _ = predictions(self.prediction_type, alpha)  # for guiders; the solver takes the output
        return build(timesteps=ways, levels=vp_levels(alpha), matrix=matrix, **_raw(len(ways)) | {"x0_from": x0_from})

    def _way(self, start: int, end: int, sample: np.ndarray, output: np.ndarray) -> np.ndarray:
        """The sample after the way between two timesteps, as a line of a matrix (the paper's equation 11)."""
        cumulative = self.alphas_cumprod
        final = 1.0 if self.set_alpha_to_one else cumulative[0]
        alpha, after = cumulative[start], cumulative[end] if end >= 0 else final
        if self.prediction_type == "v_prediction":
            output = np.sqrt(alpha) * output + np.sqrt(1 - alpha) * sample
        below = alpha * np.sqrt(1 - after) + np.sqrt(alpha * (1 - alpha) * after)
        return np.sqrt(after / alpha) * sample - (after - alpha) / below * output

    def _multistep(self, visited: np.ndarray, stride: int) -> tuple[np.ndarray, np.ndarray]:
        """Timesteps and matrices without Runge-Kutta steps; slots: the first sample, then three outputs."""
        timesteps = np.insert(visited, 1, visited[1])
        matrix = np.zeros((len(timesteps), STATE_SLOTS, STATE_SLOTS + 3))
        now, start, kept = BASIS[EPS], BASIS[1], list(BASIS[2:5])
        for i, t in enumerate(timesteps):
            if i == 1:  # the same way again, with the mean of the outputs at its ends
                line, outputs = self._way(t + stride, t, start, (now + kept[0]) / 2), kept
            else:
                outputs = [now, *kept]
                line = self._way(t, t - stride, BASIS[0], _adams(outputs[: max(1, min(i, 4))]))
            matrix[i, :5] = [line, BASIS[0] if i == 0 else start, *outputs[:3]]
        return timesteps, matrix

    def _runge_kutta(self, visited: np.ndarray, stride: int) -> tuple[np.ndarray, np.ndarray]:
        """Timesteps and matrices; slots: a step's first sample, its sum of outputs, then three outputs."""
        half = stride // 2
        firsts, thirds = visited[:WARM_UP], visited[1 : WARM_UP + 1]
        early = np.stack([firsts, thirds + half, thirds + half, thirds], axis=1).ravel()
        timesteps = np.concatenate([early, visited[WARM_UP:]])
        matrix = np.zeros((len(timesteps), STATE_SLOTS, STATE_SLOTS + 3))
        now, start, total, kept = BASIS[EPS], BASIS[1], BASIS[2], list(BASIS[3:6])
        for i, t in enumerate(timesteps):
            outputs, phase = kept, i % 4
            if i >= RUNGE_KUTTA:
                outputs = [now, *kept]
                lines = [self._way(t, t - stride, BASIS[0], _adams(outputs)), start, total]
            elif phase == 0:
                outputs = [now, *kept]
                lines = [self._way(t, t - half, BASIS[0], now), BASIS[0], now / 6]
            else:
                first, end = timesteps[i - phase], t - (half if phase == 2 else 0)
                output = total + now / 6 if phase == 3 else now
                lines = [self._way(first, end, start, output), start, total + now / 3]
            matrix[i] = [*lines, *outputs[:3]]
        return timesteps, matrix


@dataclasses.dataclass(frozen=True)
class IPNDMScheduler(Scheduler):
    """Adams-Bashforth on a schedule of its own, with timesteps from 1 to 0: for networks that were trained for it.

    The decoders were not: to them that is no noise at all, here as in diffusers.
    """

    trained_betas: tuple[float, ...] | None = None

    CHOICES: ClassVar[Mapping[str, tuple[object, ...]]] = {"trained_betas": (None,)}

    def noise_levels(self, timesteps: np.ndarray) -> np.ndarray:
        angle = np.atleast_1d(timesteps) * np.pi / 2
        return np.stack([np.cos(angle), np.sin(angle)], axis=1)

    @property
    def alphas_cumprod(self) -> np.ndarray:
        return self.noise_levels(np.linspace(0, 1, self.num_train_timesteps))[:, 0] ** 2

    def _lay_out(self, num_inference_steps: int, begin: int) -> Schedule:
        steps = self._check_steps(num_inference_steps)
        sigma = np.sin(np.linspace(1, 0, steps + 1) * np.pi / 2) ** 2
        signal = np.sqrt(1 - sigma**2)
        matrix = np.zeros((steps, STATE_SLOTS, STATE_SLOTS + 3))
        kept = list(BASIS[1:4])
        for i in range(begin, steps):
            now = sigma[i] * BASIS[0] + signal[i] * BASIS[EPS]
            eps = _adams([now, *kept][: min(i - begin + 1, 4)])
            x0 = (BASIS[0] - sigma[i] * eps) / max(signal[i], 1e-8)
            matrix[i, :4] = [signal[i + 1] * x0 + sigma[i + 1] * eps, now, *kept[:2]]
        timesteps = np.arctan2(sigma, signal)[:-1] / np.pi * 2
        levels = np.stack([signal, sigma], axis=1)[:-1]
        return build(timesteps=timesteps, levels=levels, matrix=matrix, begin=begin, **_raw(steps))
