"""The schedulers' tables against diffusers' classes, stepped by hand.

Every comparison goes through one compiled `sampling.step`, whatever the scheduler and the number of steps. A small
nonlinear function stands for the network; the noise is torch's, replayed by `TorchGenerator`.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import sys
from typing import Any, NamedTuple
from unittest import mock

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from kandinsky_jax.noise import TorchGenerator
from kandinsky_jax.sampling import step
from kandinsky_jax.schedulers import (
    SCHEDULERS,
    DDIMScheduler,
    DDPMScheduler,
    Scheduler,
    SchedulerError,
    UnCLIPScheduler,
    scheduler_from_config,
)
from kandinsky_jax.schedulers.table import SLOTS
from tests.conftest import OFFICIAL, note

BOUND = 1e-4  # of the difference from the reference
EXACT = 1e-5  # of the difference from the reference in float64
SHAPE = (2, 4, 3, 5)  # torch's order; a step does not care
OFFICIAL_SCHEDULERS = sorted(path.parent.parent.name for path in OFFICIAL.glob("*/scheduler/scheduler_config.json"))
# What diffusers takes as arguments of `step`, not of the constructor.
STEP_ARGUMENTS = {"eta", "use_clipped_model_output"}


@jax.jit
def one_step(table, i, sample, output, variance, noise):
    state = jnp.zeros((SLOTS, *SHAPE)).at[0].set(sample)
    return step(jax.tree.map(lambda column: column[i], table), state, output, variance, noise)[0]


def network(sample: np.ndarray, timestep: int, variance_type: str) -> tuple[np.ndarray, np.ndarray]:
    """A prediction of about the sample's size, and a second half: a variance, or an interpolant in -1..1."""
    output = 1.1 * np.tanh(0.9 * sample + 0.3 * np.roll(sample, 1, axis=1)) + 0.1 * np.sin(timestep / 100)
    variance = np.tanh(np.roll(sample, 1, axis=2))
    if variance_type == "learned":
        variance = 0.5 + 0.4 * variance
    return output.astype(sample.dtype), variance.astype(sample.dtype)


class Pair:
    """Our schedule and diffusers' scheduler for one configuration, to be stepped side by side."""

    def __init__(self, cls: type[Scheduler], config: dict[str, Any], steps: int, theirs: dict[str, Any] | None = None):
        """`theirs` replaces fields in diffusers' configuration."""
        config = dict(config)
        self.schedule = cls(**config).schedule(steps)
        self.table = jax.tree.map(jnp.asarray, self.schedule.table)
        self.arguments = {k: config.pop(k) for k in STEP_ARGUMENTS & config.keys()}
        self.variance_type = config.get("variance_type", "")
        self.theirs = getattr(diffusers, cls.__name__)(**config | (theirs or {}))
        self.theirs.set_timesteps(steps)
        # The reference's arithmetic in float64, on the same float32 schedule.
        self.exact = copy.deepcopy(self.theirs)
        for name in {"betas", "alphas_cumprod", "final_alpha_cumprod", "one"} & vars(self.exact).keys():
            setattr(self.exact, name, getattr(self.exact, name).double())
        self.exact.alphas = 1 - self.exact.betas

    def ours(self, i: int, sample: np.ndarray, noise: np.ndarray) -> np.ndarray:
        output, variance = network(sample, int(self.schedule.timesteps[i]), self.variance_type)
        if not self.schedule.learned_variance:
            variance = np.zeros_like(variance)
        return np.asarray(one_step(self.table, i, sample, output, variance, noise))

    def reference(self, i: int, sample: np.ndarray, generator: torch.Generator) -> np.ndarray:
        return self._step(self.theirs, i, sample, generator)

    def exactly(self, i: int, sample: np.ndarray, noise: np.ndarray) -> np.ndarray:
        module = sys.modules[type(self.exact).__module__]
        draw = mock.patch.object(module, "randn_tensor", return_value=torch.from_numpy(noise).double())
        with draw:
            return self._step(self.exact, i, sample, None)

    def _step(self, scheduler: Any, i: int, sample: np.ndarray, generator: torch.Generator | None) -> np.ndarray:
        timesteps = scheduler.timesteps
        output, variance = network(sample, int(timesteps[i]), self.variance_type)
        full = np.concatenate([output, variance], axis=1) if "learned" in self.variance_type else output
        arguments = dict(self.arguments)
        if isinstance(scheduler, diffusers.UnCLIPScheduler):  # as the prior pipeline does
            arguments["prev_timestep"] = timesteps[i + 1] if i + 1 < len(timesteps) else None
        full, sample = torch.from_numpy(full), torch.from_numpy(sample)
        return scheduler.step(full, timesteps[i], sample, generator=generator, **arguments).prev_sample.numpy()


def error(ours: np.ndarray, reference: np.ndarray) -> float:
    assert np.isfinite(reference).all()
    return float(np.abs(ours - reference).max() / np.abs(reference).max())


class Errors(NamedTuple):
    """Largest relative errors over all steps."""

    step: float  # of each of our steps, from the reference's own sample
    drift: float  # of our whole trajectory
    exact: float  # of our whole trajectory, from the reference's in float64
    rounding: float  # of the reference's whole trajectory, from the same


def compare(cls: type[Scheduler], config: dict[str, Any], steps: int, theirs: dict[str, Any] | None = None) -> Errors:
    pair = Pair(cls, config, steps, theirs)
    np.testing.assert_array_equal(pair.schedule.timesteps, pair.theirs.timesteps)
    assert pair.schedule.init_noise_sigma == pair.theirs.init_noise_sigma
    generator, replayed = torch.Generator().manual_seed(5), TorchGenerator(5)
    sample = own = TorchGenerator(3).randn(*SHAPE)
    exact = sample.astype(np.float64)
    errors = []
    for i in range(steps):
        noise = replayed.randn(*SHAPE) if pair.schedule.draws_noise[i] else np.zeros(SHAPE, np.float32)
        ours = pair.ours(i, sample, noise)
        own = pair.ours(i, own, noise)
        sample = pair.reference(i, sample, generator)
        exact = pair.exactly(i, exact, noise)
        errors.append((error(ours, sample), error(own, sample), error(own, exact), error(sample, exact)))
    assert one_step._cache_size() == 1
    return Errors(*np.max(errors, axis=0))


def check(*case: Any, **kwargs: Any) -> None:
    errors = compare(*case, **kwargs)
    assert note(errors.step, "one step, max|d| / max|reference|") <= BOUND
    assert note(errors.drift, "whole trajectory, max|d| / max|reference|") <= BOUND
    assert note(errors.exact, "whole trajectory, against the reference in float64") <= EXACT


def grid(**axes: Any) -> list[dict[str, Any]]:
    """The product of the axes; a value that is a dictionary brings several fields."""
    rows = itertools.product(*([v if isinstance(v, dict) else {name: v} for v in vs] for name, vs in axes.items()))
    return [{k: v for part in row for k, v in part.items()} for row in rows]


def described(value: Any) -> str | None:
    return "-".join(map(str, value.values())) if isinstance(value, dict) else None


def parametrized(configs: list[dict[str, Any]]) -> Any:
    return pytest.mark.parametrize("config", configs, ids=described)


BOTH = pytest.mark.parametrize("cls", [DDPMScheduler, DDIMScheduler])
SPACINGS = grid(timestep_spacing=["leading", "linspace", "trailing"]) + grid(
    timestep_spacing=["leading"], steps_offset=[1]
)
LIMITS = [
    {"clip_sample": False},
    {"clip_sample": True},
    {"clip_sample": True, "clip_sample_range": 0.3},
    {"thresholding": True},
    {"thresholding": True, "sample_max_value": 3.0, "dynamic_thresholding_ratio": 0.9},
]
PREDICTIONS = ["epsilon", "sample", "v_prediction"]
SPREAD = ["linspace", "trailing"]
UNCLIP_VARIANCES = ["fixed_small_log", "learned_range"]
VARIANCES = ["fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range"]


@BOTH
@parametrized(SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 4, 10, 25, 50, 100])
def test_spacings(cls, config, steps):
    check(cls, config, steps)


@BOTH
@parametrized(SPACINGS)
def test_timesteps(cls, config):
    """Every number of steps for which the reference gives as many timesteps; "trailing" at times gives one more."""
    ours, theirs = cls(**config), getattr(diffusers, cls.__name__)(**config)
    for steps in range(1, 1000):
        theirs.set_timesteps(steps)
        if len(theirs.timesteps) == steps:
            np.testing.assert_array_equal(ours.schedule(steps).timesteps, theirs.timesteps)


@BOTH
@parametrized(grid(prediction_type=PREDICTIONS, limits=LIMITS, beta_schedule=["linear", "squaredcos_cap_v2"]))
def test_predictions_and_limits(cls, config):
    check(cls, config, 10)


@parametrized(grid(variance_type=VARIANCES, prediction_type=PREDICTIONS, steps_offset=[0, 1]))
def test_ddpm_variances(config):
    check(DDPMScheduler, config, 25)


@pytest.mark.parametrize("steps", [1, 4, 25])
def test_fixed_large_log_is_fixed_large(steps):
    """The reference takes the square root of a logarithm of less than 1 there."""
    broken = Pair(DDPMScheduler, {"variance_type": "fixed_large_log"}, 4)
    assert np.isnan(broken.reference(0, np.ones(SHAPE, np.float32), torch.Generator())).any()
    check(DDPMScheduler, {"variance_type": "fixed_large_log"}, steps, theirs={"variance_type": "fixed_large"})


SIGMOID = {"beta_schedule": "sigmoid"}  # which diffusers' DDIM lacks
BETAS = [
    {"beta_schedule": "linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "scaled_linear"},
    SIGMOID,
    {"trained_betas": tuple(np.linspace(0.002, 0.3, 40).tolist()), "num_train_timesteps": 40},
    {"num_train_timesteps": 64},
    {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 130},
]


@pytest.mark.parametrize(
    ("cls", "config"),
    [
        (cls, config)
        for cls in (DDPMScheduler, DDIMScheduler)
        for config in BETAS
        if cls is DDPMScheduler or config != SIGMOID
    ],
    ids=described,
)
def test_noise_schedules(cls, config):
    check(cls, config, 10)
    alphas = Pair(cls, config, 1).theirs.alphas_cumprod
    np.testing.assert_allclose(cls(**config).alphas_cumprod(), alphas, rtol=3e-6, atol=0)


@parametrized(
    grid(
        eta=[0, 0.5, 1],
        set_alpha_to_one=[True, False],
        use_clipped_model_output=[True, False],
        prediction_type=PREDICTIONS,
        steps_offset=[0, 1],
    )
)
def test_ddim(config):
    check(DDIMScheduler, config, 25)


@parametrized(
    grid(
        variance_type=UNCLIP_VARIANCES,
        prediction_type=["epsilon", "sample"],
        limits=[{"clip_sample": False}, {"clip_sample": True}, {"clip_sample_range": 10.0}],
    )
)
@pytest.mark.parametrize("steps", [2, 25, 50])  # for 3 see below
def test_unclip(config, steps):
    check(UnCLIPScheduler, config, steps)


@pytest.mark.parametrize("steps", [64, 39])
def test_unclip_of_another_length(steps):
    check(UnCLIPScheduler, {"num_train_timesteps": 64}, steps)


COSINE = {"beta_schedule": "squaredcos_cap_v2"}
ROUNDED = [
    # 1 - alpha_prev - sigma**2, where alpha_prev is nearly 0 and sigma nearly 1
    *[(DDIMScheduler, 4, COSINE | c) for c in grid(prediction_type=PREDICTIONS, timestep_spacing=SPREAD, eta=[1])],
    # 1 - beta, where beta is nearly 1
    *[(UnCLIPScheduler, 3, c) for c in grid(prediction_type=["epsilon", "sample"], variance_type=UNCLIP_VARIANCES)],
]


@pytest.mark.parametrize(("cls", "steps", "config"), ROUNDED, ids=described)
def test_where_the_reference_rounds(cls, steps, config):
    """From noise alone (alpha about 1e-9) in few steps, float32 differences of nearly equal numbers cost the reference
    about four digits. It is further from itself in float64 than this library is."""
    errors = compare(cls, config, steps)
    assert errors.exact <= EXACT
    assert errors.rounding > 10 * errors.exact
    assert errors.step <= errors.rounding + BOUND


def test_draws_noise_is_not_always():
    """What makes a replayed stream go wrong: DDPM draws at t > 0 only, DDIM only with eta."""
    assert DDPMScheduler().schedule(4).draws_noise.tolist() == [True, True, True, False]
    assert DDPMScheduler(steps_offset=1).schedule(4).draws_noise.all()
    assert UnCLIPScheduler().schedule(4).draws_noise.tolist() == [True, True, True, False]
    assert not DDIMScheduler().schedule(4).draws_noise.any()
    assert DDIMScheduler(eta=0.1).schedule(4).draws_noise.all()


# Configurations ------------------------------------------------------------------------------------------------------


def official(repository: str) -> dict[str, Any]:
    return json.loads((OFFICIAL / repository / "scheduler" / "scheduler_config.json").read_text())


@pytest.mark.parametrize("repository", OFFICIAL_SCHEDULERS)
def test_official_configurations(repository):
    raw = official(repository)
    scheduler = scheduler_from_config(raw)
    assert scheduler == type(scheduler).from_pretrained(OFFICIAL / repository / "scheduler")
    assert type(scheduler).__name__ == raw["_class_name"]
    expected = getattr(diffusers, raw["_class_name"]).from_config(raw).config
    assert {k: v for k, v in visible(scheduler.config).items() if k in raw or k in expected} == visible(expected)
    check(type(scheduler), {k: v for k, v in raw.items() if k in names(scheduler)}, 25)


def names(scheduler: Scheduler | type[Scheduler]) -> set[str]:
    return {field.name for field in dataclasses.fields(scheduler)} - {"extra", "unset"}


def visible(config: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in config.items() if not k.startswith("_")}


def test_foreign_fields_survive_a_change_of_class():
    ddpm = scheduler_from_config(official("kandinsky-2-2-decoder"))
    assert "set_alpha_to_one" not in names(ddpm)
    ddim = DDIMScheduler.from_config(ddpm.config)
    assert (ddim.set_alpha_to_one, ddim.steps_offset) == (False, 1)
    expected = diffusers.DDIMScheduler.from_config(diffusers.DDPMScheduler.from_config(ddpm.config).config).config
    assert {k: ddim.config[k] for k in visible(expected)} == visible(expected)
    changed = DDIMScheduler.from_config(ddpm.config, eta=0.5, steps_offset=0)
    assert visible(changed.config) == visible(ddim.config) | {"eta": 0.5, "steps_offset": 0}


def test_fields_that_nobody_set_take_the_new_classes_defaults():
    """As in diffusers: UnCLIP's cosine schedule is its default, not something a DDPM made from it is told."""
    ddpm = DDPMScheduler.from_config(UnCLIPScheduler(clip_sample_range=5.0).config)
    expected = diffusers.DDPMScheduler.from_config(diffusers.UnCLIPScheduler(clip_sample_range=5.0).config).config
    assert (ddpm.beta_schedule, ddpm.clip_sample_range) == ("linear", 5.0)
    assert {k: ddpm.config[k] for k in visible(expected)} == visible(expected)


def test_null_is_not_set():
    """What diffusers' configurations of other solvers carry."""
    assert DDPMScheduler.from_config({"variance_type": None}) == DDPMScheduler()


def test_change_of_class_and_back():
    ddpm = scheduler_from_config(official("kandinsky-2-2-decoder"))
    back = DDPMScheduler.from_config(DDIMScheduler.from_config(ddpm.config).config)
    assert {k: back.config[k] for k in visible(ddpm.config)} == visible(ddpm.config)


@pytest.mark.parametrize(
    "scheduler",
    [
        DDPMScheduler(trained_betas=(0.1, 0.2, 0.3), num_train_timesteps=3),
        DDPMScheduler.from_config(official("kandinsky-2-2-decoder")),
        DDIMScheduler(steps_offset=1, set_alpha_to_one=False),
        UnCLIPScheduler(prediction_type="sample", clip_sample_range=10.0),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_saved_configurations_load_in_diffusers(scheduler, tmp_path):
    scheduler.save_pretrained(tmp_path / "new" / "folder")
    assert type(scheduler).from_pretrained(tmp_path / "new" / "folder") == scheduler
    theirs = getattr(diffusers, type(scheduler).__name__).from_pretrained(tmp_path / "new" / "folder")
    shared = names(scheduler) - STEP_ARGUMENTS
    assert shared <= theirs.config.keys()
    listed = {k: list(v) if isinstance(v, tuple) else v for k, v in scheduler.config.items()}
    assert {k: theirs.config[k] for k in shared} == {k: listed[k] for k in shared}


def test_unknown_fields_warn():
    with pytest.warns(UserWarning, match=r"no scheduler knows \['beta_strat'\]"):
        scheduler = DDPMScheduler.from_config({"beta_strat": 0.1, "_class_name": "DDPMScheduler", "solver_order": 2})
    assert scheduler.config["beta_strat"] == 0.1
    with pytest.raises(SchedulerError, match="beta_strat"):
        DDPMScheduler.from_config({}, beta_strat=0.1)
    with pytest.raises(SchedulerError, match="EulerDiscreteScheduler"):
        scheduler_from_config({"_class_name": "EulerDiscreteScheduler"})


UNSUPPORTED = {
    "beta_schedule": "laplace",
    "prediction_type": "flow",
    "timestep_spacing": "karras",
    "rescale_betas_zero_snr": True,
    "variance_type": "fixed",
    "eta": 1.5,
}


@pytest.mark.parametrize(
    ("cls", "field"), [(cls, field) for cls in SCHEDULERS.values() for field in UNSUPPORTED if field in names(cls)]
)
def test_unsupported_values(cls, field):
    value = UNSUPPORTED[field]
    for make in (lambda **kwargs: cls(**kwargs), lambda **kwargs: cls.from_config({}, **kwargs)):
        with pytest.raises(SchedulerError, match=f"{cls.__name__}: {field}={value!r} is "):
            make(**{field: value})


@pytest.mark.parametrize("cls", SCHEDULERS.values())
@pytest.mark.parametrize("steps", [0, -1, 1001, 2.5, True, None, "10"])
def test_numbers_of_steps_out_of_range(cls, steps):
    with pytest.raises(SchedulerError, match="num_inference_steps"):
        cls().schedule(steps)


def test_range_of_steps():
    assert len(DDPMScheduler().schedule(np.int64(1000))) == len(UnCLIPScheduler().schedule(1000)) == 1000
    for scheduler, steps in ((UnCLIPScheduler(), 1), (DDPMScheduler(num_train_timesteps=64), 65)):
        with pytest.raises(SchedulerError, match=f"num_inference_steps={steps} is out of range"):
            scheduler.schedule(steps)


@pytest.mark.parametrize(
    ("config", "steps", "field"),
    [
        ({"steps_offset": 1}, 1000, "steps_offset"),
        ({"steps_offset": 20}, 50, "steps_offset"),
        ({"trained_betas": (0.1,) * 10}, 5, "trained_betas"),
    ],
)
def test_timesteps_beyond_the_training(config, steps, field):
    with pytest.raises(SchedulerError, match=field):
        DDPMScheduler(**config).schedule(steps)


@BOTH
def test_trailing_gives_as_many_timesteps_as_asked(cls):
    """The reference's `arange` over floats gives one more for 62 numbers of steps up to 1000."""
    scheduler = cls(timestep_spacing="trailing")
    for steps in (61, 103, 201):
        timesteps = scheduler.schedule(steps).timesteps
        assert len(timesteps) == steps
        assert timesteps.min() >= 0


@pytest.mark.parametrize("cls", SCHEDULERS.values())
@pytest.mark.parametrize("timesteps", [[0, 999], [500, 3], [700]])
def test_add_noise(cls, timesteps):
    generator = torch.Generator().manual_seed(1)
    original, noise = (torch.randn(SHAPE, generator=generator) for _ in range(2))
    ours = cls().add_noise(jnp.asarray(original.numpy()), jnp.asarray(noise.numpy()), np.array(timesteps))
    theirs = getattr(diffusers, cls.__name__)().add_noise(original, noise, torch.tensor(timesteps))
    assert ours.dtype == jnp.float32
    assert error(np.asarray(ours), theirs.numpy()) <= 1e-6


@pytest.mark.parametrize("steps", [1, 7, 20])
def test_the_last_steps_of_a_schedule(steps):
    """The same rows, timesteps and draws, from the first step that is left."""
    whole = DDPMScheduler().schedule(20)
    rest = whole.last(steps)
    assert len(rest) == steps
    np.testing.assert_array_equal(rest.timesteps, whole.timesteps[20 - steps :])
    np.testing.assert_array_equal(rest.draws_noise, whole.draws_noise[20 - steps :])
    for mine, all_rows in zip(rest.table, whole.table, strict=True):
        assert mine.shape == all_rows.shape
        np.testing.assert_array_equal(mine[:steps], all_rows[20 - steps : 20])
