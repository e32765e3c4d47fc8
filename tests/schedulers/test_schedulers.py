"""Tables of DDPM, DDIM and UnCLIP compared with diffusers' classes step by step; and configurations."""

from __future__ import annotations

import json
from typing import Any

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from kandinsky_jax.schedulers import (
    SCHEDULERS,
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    IPNDMScheduler,
    Scheduler,
    SchedulerError,
    UnCLIPScheduler,
    scheduler_from_config,
)
from kandinsky_jax.schedulers.sigmas import SigmaScheduler
from tests.conftest import OFFICIAL
from tests.schedulers.solver_pairs import (
    BOUND,
    EXACT,
    SHAPE,
    STEP_ARGUMENTS,
    TIMESTEP_ARGUMENTS,
    Pair,
    check,
    compare,
    described,
    error,
    grid,
    parametrized,
)

OFFICIAL_SCHEDULERS = sorted(path.parent.parent.name for path in OFFICIAL.glob("*/scheduler/scheduler_config.json"))

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
    np.testing.assert_allclose(cls(**config).alphas_cumprod, alphas, rtol=3e-6, atol=0)


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


FURTHER = [
    *[
        (cls, c)
        for cls in (DDPMScheduler, DDIMScheduler)
        for c in grid(
            timestep_spacing=SPREAD,
            snr=[{"rescale_betas_zero_snr": True, "prediction_type": p, "clip_sample": False} for p in PREDICTIONS[1:]],
        )
    ],
    (DDPMScheduler, {"custom_timesteps": (999, 850, 600, 300, 100, 20)}),
    (DDPMScheduler, {"custom_timesteps": (700, 300, 0), "variance_type": "learned_range"}),
    (DDPMScheduler, {"beta_schedule": "laplace"}),
]


@pytest.mark.parametrize(("cls", "config"), FURTHER, ids=described)
def test_further_options(cls, config):
    check(cls, config, 10)


def test_noise_is_not_used_in_every_step():
    """Which steps use noise, on which a replayed stream depends: DDPM at t > 0 only, DDIM only with eta."""
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
    return {field.name for field in scheduler.fields()}


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


def test_fields_that_were_not_set_take_the_new_classes_defaults():
    """As in diffusers: UnCLIP's cosine schedule is its default, which a DDPM made from it does not inherit."""
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
    shared = names(scheduler) - STEP_ARGUMENTS - TIMESTEP_ARGUMENTS.keys() - {"tau_func"}
    assert shared <= theirs.config.keys()
    listed = {k: list(v) if isinstance(v, tuple) else v for k, v in scheduler.config.items()}
    assert {k: theirs.config[k] for k in shared} == {k: listed[k] for k in shared}


def test_unknown_fields_warn():
    with pytest.warns(UserWarning, match=r"no scheduler knows \['beta_strat'\]"):
        scheduler = DDPMScheduler.from_config({"beta_strat": 0.1, "_class_name": "DDPMScheduler", "solver_order": 2})
    assert scheduler.config["beta_strat"] == 0.1
    with pytest.raises(SchedulerError, match="beta_strat"):
        DDPMScheduler.from_config({}, beta_strat=0.1)
    with pytest.raises(
        SchedulerError, match="'EulerDiskreteScheduler', which is not supported; did you mean EulerDisc"
    ):
        scheduler_from_config({"_class_name": "EulerDiskreteScheduler"})


UNSUPPORTED = {
    "beta_schedule": "lapland",
    "prediction_type": "flow",
    "timestep_spacing": "karras",
    "variance_type": "fixed",
    "use_flow_sigmas": True,
    "use_dynamic_shifting": True,
    "algorithm_type": "dpm",
    "solver_type": "hein",
    "final_sigmas_type": "none",
    "solver_order": 4,
    "interpolation_type": "cubic",
    "predictor_order": 5,
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
    """The reference's sigma schedulers know the timesteps that they were laid out for, here all of them."""
    generator = torch.Generator().manual_seed(1)
    original, noise = (torch.randn(SHAPE, generator=generator) for _ in range(2))
    scheduler, theirs = cls(), getattr(diffusers, cls.__name__)()
    arrays = [jnp.asarray(x.numpy()) for x in (original, noise)]
    ours = scheduler.add_noise(*arrays, np.array(timesteps))
    assert ours.dtype == jnp.float32
    if cls is IPNDMScheduler:
        return  # the reference has none
    at = torch.tensor(timesteps)
    if issubclass(cls, SigmaScheduler):
        theirs.sigmas = torch.from_numpy(scheduler.training_sigmas()[::-1].copy())
        theirs.timesteps = torch.arange(999.0, -1, -1)
    assert error(ours, theirs.add_noise(original, noise, at).numpy()) <= 1e-6
    # The reference's Euler counts its timesteps from the noisy end, and its cumulative products from the other.
    if hasattr(theirs, "get_velocity") and cls is not EulerDiscreteScheduler:
        velocity = scheduler.get_velocity(*arrays, np.array(timesteps))
        assert error(velocity, theirs.get_velocity(original, noise, at.to(theirs.timesteps.dtype)).numpy()) <= 1e-6


@pytest.mark.parametrize("steps", [1, 7, 20])
def test_the_last_steps_of_a_schedule(steps):
    """The same coefficients, timesteps and noise flags, from the first remaining step on."""
    whole = DDPMScheduler().schedule(20)
    rest = DDPMScheduler().schedule(20, begin=20 - steps)
    assert len(rest) == steps
    np.testing.assert_array_equal(rest.timesteps, whole.timesteps[20 - steps :])
    np.testing.assert_array_equal(rest.draws_noise, whole.draws_noise[20 - steps :])
    np.testing.assert_array_equal(rest.levels, whole.levels[20 - steps :])
    for mine, all_rows in zip(rest.table, whole.table, strict=True):
        assert mine.shape == all_rows.shape
        np.testing.assert_array_equal(mine[:steps], all_rows[20 - steps : 20])
