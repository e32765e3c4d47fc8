"""Our schedule and diffusers' scheduler for one configuration, stepped in parallel.

Every comparison goes through one compiled `diffusion.solver_step`, whatever the scheduler and the number of steps. A
small nonlinear function stands for the network; the noise is torch's, replayed by `TorchGenerator`.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import sys
import warnings
from typing import Any, NamedTuple
from unittest import mock

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from kandinsky_jax.diffusion import prediction_from_output, solver_step
from kandinsky_jax.diffusion.rng import TorchGenerator
from kandinsky_jax.schedulers import Scheduler
from kandinsky_jax.schedulers.karras import SecondOrderScheduler
from kandinsky_jax.schedulers.table import STATE_SLOTS
from tests.conftest import note

BOUND = 1e-4  # of the difference from the reference
EXACT = 1e-5  # of the difference from the reference in float64
SHAPE = (2, 4, 3, 5)  # torch's order; a step does not care
# What diffusers takes as arguments of `step`, and of `set_timesteps`, not of the constructor.
STEP_ARGUMENTS = {"eta", "use_clipped_model_output"}
TIMESTEP_ARGUMENTS = {"custom_timesteps": "timesteps", "custom_sigmas": "sigmas"}


@jax.jit
def one_step(table, i, state, output, variance, noise):
    coefficients = jax.tree.map(lambda column: column[i], table)
    prediction = prediction_from_output(coefficients, state[0], output, variance)
    return solver_step(coefficients, state, prediction, noise)


def network(sample: np.ndarray, timestep: float, variance_type: str) -> tuple[np.ndarray, np.ndarray]:
    """A prediction of about the sample's size, and a second half: a variance, or an interpolant in -1..1."""
    output = 1.1 * np.tanh(0.9 * sample + 0.3 * np.roll(sample, 1, axis=1)) + 0.1 * np.sin(timestep / 100)
    variance = np.tanh(np.roll(sample, 1, axis=2))
    if variance_type == "learned":
        variance = 0.5 + 0.4 * variance
    return output.astype(sample.dtype), variance.astype(sample.dtype)


class Pair:
    """Our schedule and diffusers' scheduler for one configuration."""

    def __init__(
        self,
        cls: type[Scheduler],
        config: dict[str, Any],
        steps: int,
        theirs: dict[str, Any] | None = None,
        begin: int = 0,
    ):
        """`theirs` replaces fields in diffusers' configuration; `begin` is the first step to do."""
        config = dict(config)
        self.schedule = cls(**config).schedule(steps, begin)
        self.table = jax.tree.map(jnp.asarray, self.schedule.table)
        self.arguments = {k: config.pop(k) for k in STEP_ARGUMENTS & config.keys()}
        custom = {TIMESTEP_ARGUMENTS[k]: list(config.pop(k)) for k in TIMESTEP_ARGUMENTS.keys() & config.keys()}
        self.variance_type = config.get("variance_type") or ""
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # some forms are "deprecated"
            self.theirs = getattr(diffusers, cls.__name__)(**config | (theirs or {}))
        self.theirs.set_timesteps(**custom or {"num_inference_steps": steps})
        self.first = len(self.theirs.timesteps) - len(self.schedule)
        if hasattr(self.theirs, "set_begin_index"):
            self.theirs.set_begin_index(
                self.first
            )  # or it looks for the first timestep, and takes the second of two equal ones
        # The reference's arithmetic in float64, on the same float32 schedule.
        self.exact = copy.deepcopy(self.theirs)
        for name, value in vars(self.exact).items():
            if isinstance(value, torch.Tensor) and value.dtype == torch.float32 and name != "timesteps":
                setattr(self.exact, name, value.double())
        if hasattr(self.exact, "betas"):
            self.exact.alphas = 1 - self.exact.betas
        if cls.__name__ == "IPNDMScheduler":
            self.exact.alphas = (1 - self.exact.betas**2) ** 0.5

    def ours(self, i: int, state: np.ndarray, noise: np.ndarray) -> np.ndarray:
        scaled = state[0] * self.schedule.table.input_scale[i]
        output, variance = network(scaled, float(self.schedule.timesteps[i]), self.variance_type)
        if not self.schedule.learned_variance:
            variance = np.zeros_like(variance)
        return np.array(one_step(self.table, i, state, output, variance, noise))

    def reference(self, i: int, sample: np.ndarray, generator: torch.Generator) -> np.ndarray:
        return self._step(self.theirs, i, sample, generator)

    def exactly(self, i: int, sample: np.ndarray, noise: np.ndarray) -> np.ndarray:
        module = sys.modules[type(self.exact).__module__]
        drawn = torch.from_numpy(noise).double()
        with mock.patch.object(module, "randn_tensor", return_value=drawn, create=True):
            return self._step(self.exact, i, sample, None)

    def _step(self, scheduler: Any, i: int, sample: np.ndarray, generator: torch.Generator | None) -> np.ndarray:
        timesteps = scheduler.timesteps[self.first :]
        scaled = scheduler.scale_model_input(torch.from_numpy(sample), timesteps[i]).numpy()
        output, variance = network(scaled, float(timesteps[i]), self.variance_type)
        full = np.concatenate([output, variance], axis=1) if "learned" in self.variance_type else output
        arguments = dict(self.arguments)
        if isinstance(scheduler, diffusers.UnCLIPScheduler):  # as the prior pipeline does
            arguments["prev_timestep"] = timesteps[i + 1] if i + 1 < len(timesteps) else None
        if "generator" in inspect.signature(scheduler.step).parameters:
            arguments["generator"] = generator
        full, sample = torch.from_numpy(full), torch.from_numpy(sample)
        return scheduler.step(full, timesteps[i], sample, **arguments).prev_sample.numpy()


def error(ours: Any, reference: np.ndarray) -> float:
    assert np.isfinite(reference).all()
    return float(np.abs(np.asarray(ours) - reference).max() / np.abs(reference).max())


class Errors(NamedTuple):
    """Largest relative errors over all steps."""

    step: float | None  # of each of our steps, from the reference's own sample; None for what has a memory
    drift: float  # of our whole trajectory
    exact: float  # of our whole trajectory, from the reference's in float64
    rounding: float  # of the reference's whole trajectory, from the same


def compare(
    cls: type[Scheduler], config: dict[str, Any], steps: int, theirs: dict[str, Any] | None = None, begin: int = 0
) -> Errors:
    pair = Pair(cls, config, steps, theirs, begin)
    evaluations = len(pair.schedule)
    assert pair.first == begin * (2 if isinstance(cls(**config), SecondOrderScheduler) else 1)
    whole = pair.schedule.timesteps.dtype.kind == "i"
    # The reference finds fractions of timesteps in float32: between sigmas that are hardly apart, or by way of a
    # difference of nearly equal ones.
    apart = 0.2 if "Ancestral" in cls.__name__ else 0.02
    visited = pair.theirs.timesteps[pair.first :]
    np.testing.assert_allclose(pair.schedule.timesteps, visited, rtol=0, atol=0 if whole else apart)
    np.testing.assert_allclose(pair.schedule.init_noise_sigma, float(pair.theirs.init_noise_sigma), rtol=1e-6)
    generator, replayed = torch.Generator().manual_seed(5), TorchGenerator(5)
    sample = TorchGenerator(3).randn(*SHAPE) * np.float32(pair.schedule.init_noise_sigma)
    own = np.zeros((STATE_SLOTS, *SHAPE), np.float32)
    own[0] = sample
    exact = sample.astype(np.float64)
    memory = bool(pair.schedule.table.matrix[:, 0, 1:STATE_SLOTS].any())
    steps_alone, errors = [], []
    for i in range(evaluations):
        noise = replayed.randn(*SHAPE) if pair.schedule.draws_noise[i] else np.zeros(SHAPE, np.float32)
        if not memory:
            alone = pair.ours(i, np.concatenate([sample[None], own[1:]]), noise)[0]
        own = pair.ours(i, own, noise)
        sample = pair.reference(i, sample, generator)
        exact = pair.exactly(i, exact, noise)
        if not memory:
            steps_alone.append(error(alone, sample))
        errors.append((error(own[0], sample), error(own[0], exact), error(sample, exact)))
    assert one_step._cache_size() == 1
    return Errors(max(steps_alone, default=None), *np.max(errors, axis=0))


def check(*case: Any, exact: float = EXACT, **kwargs: Any) -> None:
    errors = compare(*case, **kwargs)
    if errors.step is not None:
        assert note(errors.step, "one step, max|d| / max|reference|") <= BOUND
    assert note(errors.drift, "whole trajectory, max|d| / max|reference|") <= BOUND
    assert note(errors.exact, "whole trajectory, against the reference in float64") <= exact


def grid(**axes: Any) -> list[dict[str, Any]]:
    """The product of the axes; a value that is a dictionary brings several fields."""
    rows = itertools.product(*([v if isinstance(v, dict) else {name: v} for v in vs] for name, vs in axes.items()))
    return [{k: v for part in row for k, v in part.items()} for row in rows]


def described(value: Any) -> str | None:
    return "-".join(map(str, value.values())) if isinstance(value, dict) else None


def parametrized(configs: list[dict[str, Any]]) -> Any:
    return pytest.mark.parametrize("config", configs, ids=described)
