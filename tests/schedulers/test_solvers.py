"""Tables of all other solvers compared with diffusers' classes step by step, with each option at least once."""

from __future__ import annotations

import json

import diffusers
import numpy as np
import pytest
import torch

from kandinsky_jax.schedulers import (
    NAMES,
    SCHEDULERS,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    SASolverScheduler,
    SchedulerError,
    UniPCMultistepScheduler,
    scheduler_from_config,
    scheduler_named,
)
from kandinsky_jax.schedulers.table import X0, Z
from tests.conftest import OFFICIAL as OFFICIAL_CONFIGS
from tests.conftest import note
from tests.schedulers.solver_pairs import BOUND, EXACT, SHAPE, Pair, check, compare, described, grid

STEPS = (4, 10, 25, 50)
OFFICIAL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "linear"}
PREDICTIONS = [{"prediction_type": p} for p in ("epsilon", "sample", "v_prediction")]
RESPACED = [{"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True}]
SPACED = [
    {"timestep_spacing": "leading", "steps_offset": 1},
    {"timestep_spacing": "leading"},
    {"timestep_spacing": "trailing"},
]
BETAS = [
    {"beta_schedule": "scaled_linear"},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    {"trained_betas": tuple(np.linspace(0.002, 0.1, 70).tolist()), "num_train_timesteps": 70},
]
THRESHOLDS = [
    {"thresholding": True},
    {"thresholding": True, "sample_max_value": 3.0, "dynamic_thresholding_ratio": 0.9},
]
ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
CUSTOM = {"custom_timesteps": (999, 850, 600, 300, 100, 20)}
SIGMA_MIN = {"final_sigmas_type": "sigma_min"}
NOISE_FORMS = [{"algorithm_type": form} | SIGMA_MIN for form in ("dpmsolver", "sde-dpmsolver")]

CASES = {
    "DPMSolverMultistepScheduler": [
        *grid(
            algorithm_type=["dpmsolver++", "sde-dpmsolver++"],
            solver_order=[1, 2, 3],
            solver_type=["midpoint", "heun"],
            final_sigmas_type=["zero", "sigma_min"],
        ),
        *grid(form=NOISE_FORMS, solver_order=[1, 2], solver_type=["midpoint", "heun"]),
        {"algorithm_type": "dpmsolver", "solver_order": 3, **SIGMA_MIN},
        *[c | {"solver_order": 3} for c in [*RESPACED, *SPACED, *BETAS, *PREDICTIONS, *THRESHOLDS, ZERO_SNR, CUSTOM]],
        {"use_lu_lambdas": True},
        {"use_lu_lambdas": True, "beta_schedule": "squaredcos_cap_v2"},
        {"use_karras_sigmas": True, "beta_schedule": "squaredcos_cap_v2"},
        {"lambda_min_clipped": -5.1, "beta_schedule": "squaredcos_cap_v2"},
        {"lower_order_final": False, **SIGMA_MIN},
        {"euler_at_final": True, **SIGMA_MIN},
        *[NOISE_FORMS[0] | c for c in (*PREDICTIONS[1:], THRESHOLDS[0])],
        {"solver_type": "bh2", "algorithm_type": "deis", **SIGMA_MIN},  # what other solvers' configurations carry
    ],
    "DPMSolverSinglestepScheduler": [
        *grid(
            algorithm_type=["dpmsolver++", "sde-dpmsolver++"],
            solver_order=[1, 2, 3],
            solver_type=["midpoint", "heun"],
            final_sigmas_type=["zero", "sigma_min"],
        ),
        *grid(form=NOISE_FORMS[:1], solver_order=[2, 3], solver_type=["midpoint", "heun"]),
        *[c | {"solver_order": 3} for c in [*RESPACED, *BETAS, *PREDICTIONS[1:], *THRESHOLDS, CUSTOM]],
        {"lower_order_final": True, **SIGMA_MIN},
        {"lambda_min_clipped": -5.1, "beta_schedule": "squaredcos_cap_v2"},
        *[NOISE_FORMS[0] | c for c in PREDICTIONS[1:]],
    ],
    "DEISMultistepScheduler": [
        *grid(solver_order=[1, 2, 3], lower_order_final=[True, False]),
        *[c | {"solver_order": 3} for c in [*RESPACED, *SPACED, *BETAS[:3]]],
        *PREDICTIONS[1:],
        {"thresholding": True},
    ],
    "UniPCMultistepScheduler": [
        *grid(solver_order=[1, 2, 3], solver_type=["bh2"], final_sigmas_type=["zero", "sigma_min"]),
        *grid(solver_order=[1, 2, 3], solver_type=["bh1"], final_sigmas_type=["sigma_min"]),
        *grid(predict_x0=[False], solver_order=[1, 2, 3], final_sigmas_type=["sigma_min"], prediction=PREDICTIONS),
        *[c | {"solver_order": 3} for c in [*RESPACED, *SPACED, *BETAS, *PREDICTIONS[1:], *THRESHOLDS, ZERO_SNR]],
        {"disable_corrector": (0, 2)},
        {"lower_order_final": False, **SIGMA_MIN},
        {"use_karras_sigmas": True, "sigma_min": 0.05, "sigma_max": 12.0},
    ],
    "SASolverScheduler": [
        *grid(predictor_order=[1, 2, 3], corrector_order=[1, 2, 3]),
        {"predictor_order": 4, "corrector_order": 4},
        *grid(algorithm_type=["noise_prediction"], predictor_order=[1, 2, 3], prediction=PREDICTIONS),
        *RESPACED,
        *SPACED,
        *BETAS,
        *PREDICTIONS[1:],
        *THRESHOLDS,
        {"lower_order_final": False},
    ],
    "EulerDiscreteScheduler": [
        *grid(spacing=[{}, *SPACED], prediction=PREDICTIONS),
        *grid(spacing=RESPACED, final_sigmas_type=["zero", "sigma_min"]),
        *BETAS,
        ZERO_SNR,
        CUSTOM,
        {"custom_sigmas": (20.0, 9.0, 4.0, 1.0, 0.3, 0.0)},
        {"use_karras_sigmas": True, "sigma_min": 0.05, "sigma_max": 12.0},
        {"interpolation_type": "log_linear"},
        {"interpolation_type": "log_linear", "use_karras_sigmas": True},
        {"timestep_type": "continuous", "prediction_type": "v_prediction"},
    ],
    "EulerAncestralDiscreteScheduler": [
        *grid(spacing=[{}, *SPACED], prediction=[PREDICTIONS[0], PREDICTIONS[2]]),
        *BETAS,
        ZERO_SNR,
    ],
    "HeunDiscreteScheduler": [
        *grid(spacing=[{}, *SPACED, *RESPACED], prediction=PREDICTIONS),
        *BETAS,
        {"beta_schedule": "exp"},
        {"clip_sample": True},
        {"clip_sample": True, "clip_sample_range": 0.3},
        CUSTOM,
    ],
    **{
        name: [
            *grid(spacing=[{}, *SPACED, *RESPACED], prediction=[PREDICTIONS[0], PREDICTIONS[2]]),
            # Not the cosine: from its largest sigma, 24000, the reference steps down to a float32 difference of equals.
            *(BETAS if "Ancestral" not in name else [BETAS[0], *BETAS[2:]]),
        ]
        for name in ("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler")
    },
    "LMSDiscreteScheduler": [*grid(spacing=[{}, *SPACED, *RESPACED], prediction=PREDICTIONS), *BETAS],
    "PNDMScheduler": [
        *grid(spacing=[{}, *SPACED], prediction=[PREDICTIONS[0], PREDICTIONS[2]], skip_prk_steps=[True, False]),
        {"timestep_spacing": "linspace"},
        {"set_alpha_to_one": True},
        *BETAS,
    ],
    "IPNDMScheduler": [{}],
    "LCMScheduler": [
        *PREDICTIONS,
        *BETAS[:3],
        *THRESHOLDS,
        {"clip_sample": True, "clip_sample_range": 0.5},
        {"original_inference_steps": 100},
        {"timestep_scaling": 0.1},
        ZERO_SNR,
        CUSTOM,
    ],
    "TCDScheduler": [
        *grid(eta=[0.0, 0.3, 1.0], prediction=PREDICTIONS),
        *BETAS[:3],
        {"original_inference_steps": 100},
        ZERO_SNR,
        CUSTOM,
    ],
}
PLAIN = {"IPNDMScheduler"}  # has no betas
ALL = [
    (name, (OFFICIAL if name not in PLAIN and "trained_betas" not in config else {}) | config, STEPS[i % len(STEPS)])
    for name, configs in CASES.items()
    for i, config in enumerate(configs)
]
# The first configuration of each, at every number of steps.
ALL += [(n, c, s) for name in CASES for n, c, _ in [next(x for x in ALL if x[0] == name)] for s in STEPS[1:]]
ALL = [case if i % 3 == 0 else pytest.param(*case, marks=pytest.mark.slow) for i, case in enumerate(ALL)]


@pytest.mark.parametrize(("name", "config", "steps"), ALL, ids=described)
def test_as_the_reference(name, config, steps):
    check(SCHEDULERS[name], config, steps, exact=BOUND)


ROUNDED = [
    # Where DEIS makes the noise out of x0 again, at the last, small sigmas.
    (DEISMultistepScheduler, OFFICIAL | THRESHOLDS[0] | {"solver_order": 3}, 25),
    (DEISMultistepScheduler, OFFICIAL | THRESHOLDS[1] | {"solver_order": 3}, 50),
    *[(DEISMultistepScheduler, OFFICIAL | c | {"solver_order": 3}, 50) for c in PREDICTIONS[1:]],
    (DEISMultistepScheduler, BETAS[3] | {"solver_order": 3}, 50),
]


@pytest.mark.parametrize(("cls", "config", "steps"), ROUNDED, ids=described)
def test_where_the_reference_rounds(cls, config, steps):
    """Differences of nearly equal float32 numbers cost the reference more than the bound. It is further from itself in
    float64 than this library is."""
    errors = compare(cls, config, steps)
    assert errors.exact <= EXACT
    assert errors.rounding > 10 * errors.exact
    assert errors.drift <= errors.rounding + EXACT


@pytest.mark.parametrize("steps", STEPS)
def test_unipc_bh1_ends_at_zero(steps):
    """The reference's last step is 0 * inf there. At first order, bh1 and bh2 are the same."""
    config = OFFICIAL | {"solver_type": "bh1", "solver_order": 1}
    pair = Pair(UniPCMultistepScheduler, config, steps)
    broken = UniPCMultistepScheduler(**config).schedule(steps).table
    np.testing.assert_array_equal(broken.matrix[:, 0, [0, X0]][steps - 1], [0, 1])
    sample = np.ones(SHAPE, np.float32)
    for i in range(steps):
        sample = pair.reference(i, sample, torch.Generator())
        assert np.isfinite(sample).all() == (i < steps - 1)


# The rest of a schedule ----------------------------------------------------------------------------------------------

BEGINS = [name for name in CASES if name not in ("PNDMScheduler", "LMSDiscreteScheduler")]


@pytest.mark.parametrize("name", BEGINS)
@pytest.mark.parametrize("begin", [3, 7])
def test_begins_within_a_schedule(name, begin):
    """Image-to-image: what remembers earlier steps starts afresh, as the reference does."""
    config = {} if name in PLAIN else OFFICIAL
    if "solver_order" in {field.name for field in SCHEDULERS[name].fields()}:
        config = config | {"solver_order": 3}
    errors = compare(SCHEDULERS[name], config, 10, begin=begin)
    assert note(errors.drift, "from a step on, max|d| / max|reference|") <= BOUND


@pytest.mark.parametrize("begin", [3, 6])
def test_lms_begins_within_a_schedule(begin):
    """The reference takes the weights of an order whose slopes it does not have yet. Ours starts at order one."""
    whole, rest = LMSDiscreteScheduler().schedule(10), LMSDiscreteScheduler().schedule(10, begin=begin)
    euler = EulerDiscreteScheduler().schedule(10).table
    np.testing.assert_allclose(rest.table.matrix[0, 0], euler.matrix[begin, 0], rtol=1e-6)
    np.testing.assert_array_equal(rest.table.matrix[3 : 10 - begin], whole.table.matrix[begin + 3 : 10])
    np.testing.assert_array_equal(rest.timesteps, whole.timesteps[begin:])


@pytest.mark.parametrize("skip", [True, False])
def test_pndm_begins_within_a_schedule(skip):
    """The reference would go on in the middle of a Runge-Kutta step. Ours lays the rest out anew."""
    scheduler = PNDMScheduler(skip_prk_steps=skip)
    rest = scheduler.schedule(20, begin=10)
    assert len(rest) == (11 if skip else 19)
    assert rest.timesteps[0] == scheduler.schedule(20).timesteps[-10]
    assert (np.diff(rest.timesteps) <= (0 if skip else 25)).all()
    with pytest.raises(SchedulerError, match=r"or more, 1 are left; give more, a higher strength"):
        scheduler.schedule(20, begin=19)


@pytest.mark.parametrize("name", NAMES)
def test_every_evaluation_leaves_less_noise(name):
    """What image-to-image and inpainting take for the noise of a sample that a row is given."""
    config = json.loads((OFFICIAL_CONFIGS / "kandinsky-2-2-decoder/scheduler/scheduler_config.json").read_text())
    schedule = scheduler_named(name, config).schedule(20)
    ratio = schedule.levels[:, 1] / np.maximum(schedule.levels[:, 0], 1e-9)
    up = np.diff(ratio) > 1e-9
    assert not up.any()
    start = schedule.levels[0] @ np.array([0, 1])
    np.testing.assert_allclose(start, schedule.init_noise_sigma, rtol=0.05)


# Bad input -----------------------------------------------------------------------------------------------------------

REFUSED = [
    ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver"}, "final_sigmas_type='zero' is not supported"),
    ("DPMSolverSinglestepScheduler", {"algorithm_type": "dpmsolver"}, "choose final_sigmas_type='sigma_min'"),
    (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver", "solver_order": 3, **SIGMA_MIN},
        "no third order",
    ),
    ("DPMSolverSinglestepScheduler", {"algorithm_type": "sde-dpmsolver", **SIGMA_MIN}, "algorithm_type='sde-dpms"),
    ("DPMSolverSinglestepScheduler", NOISE_FORMS[0] | {"thresholding": True}, "thresholding needs"),
    ("SASolverScheduler", {"algorithm_type": "noise_prediction", "thresholding": True}, "thresholding needs"),
    ("EulerDiscreteScheduler", RESPACED[0] | RESPACED[1], "only one of use_karras_sigmas, use_exponential_sigmas"),
    ("DPMSolverMultistepScheduler", RESPACED[0] | {"use_lu_lambdas": True}, "only one of use_karras_sigmas, use_lu"),
    ("DPMSolverMultistepScheduler", RESPACED[0] | CUSTOM, "custom_timesteps cannot be used with use_karras_sigmas"),
    ("HeunDiscreteScheduler", RESPACED[2] | CUSTOM, "custom_timesteps cannot be used with use_beta_sigmas"),
    ("EulerDiscreteScheduler", CUSTOM | {"custom_sigmas": (2.0, 1.0)}, "cannot be used with custom_sigmas"),
    ("UniPCMultistepScheduler", CUSTOM, "takes no custom_timesteps"),
    ("UniPCMultistepScheduler", {"predict_x0": False}, "needs predict_x0 and lower_order_final"),
    ("KDPM2DiscreteScheduler", {"prediction_type": "sample"}, "prediction_type='sample' is not supported"),
    ("EulerAncestralDiscreteScheduler", {"prediction_type": "sample"}, "prediction_type='sample' is not supported"),
    ("PNDMScheduler", {"prediction_type": "sample"}, "prediction_type='sample' is not supported"),
    ("LCMScheduler", {"original_inference_steps": 2000}, "original_inference_steps=2000 is out of range"),
    ("TCDScheduler", {"eta": 2.0}, "eta=2.0 is out of range"),
]


@pytest.mark.parametrize(("name", "config", "message"), REFUSED)
def test_what_the_reference_refuses(name, config, message):
    with pytest.raises(SchedulerError, match=message):
        SCHEDULERS[name](**config)


BAD_POINTS = [
    ("custom_timesteps", (1, 2, 3), "must be falling numbers"),
    ("custom_timesteps", (500, 500, 3), "must be falling numbers"),
    ("custom_timesteps", (), "must be falling numbers"),
    ("custom_timesteps", ("a", "b"), "must be falling numbers"),
    ("custom_timesteps", (1000, 3), "must lie in 0 to 999"),
    ("custom_timesteps", (10, -3), "must lie in 0 to 999"),
    ("custom_sigmas", (1.0, 2.0), "must be falling numbers"),
    ("custom_sigmas", (1.0, -0.1), "must not be negative"),
    ("custom_sigmas", (1.0,), "two numbers or more"),
    ("custom_sigmas", (float("nan"), 0.1), "must be falling numbers"),
]


@pytest.mark.parametrize(("field", "value", "message"), BAD_POINTS)
def test_custom_points_that_do_not_fall(field, value, message):
    with pytest.raises(SchedulerError, match=message):
        EulerDiscreteScheduler(**{field: value}).schedule(4)


TOO_MANY = [
    ("HeunDiscreteScheduler", {}, 513, "takes 1 to 512"),
    ("LCMScheduler", {}, 51, "takes 1 to 50"),
    ("PNDMScheduler", {}, 3, "takes 4 to 1000"),
    ("EulerDiscreteScheduler", {"num_train_timesteps": 70}, 71, "takes 1 to 70"),
    ("DPMSolverMultistepScheduler", {"timestep_spacing": "leading"}, 1000, "divide by zero"),
    ("DDIMScheduler", ZERO_SNR | {"prediction_type": "epsilon", "timestep_spacing": "trailing"}, 10, "not epsilon"),
]


@pytest.mark.parametrize(("name", "config", "steps", "message"), TOO_MANY)
def test_steps_that_cannot_be_laid_out(name, config, steps, message):
    with pytest.raises(SchedulerError, match=message):
        SCHEDULERS[name](**config).schedule(steps)


def test_names():
    config = {"beta_start": 0.00085, "beta_schedule": "scaled_linear", "variance_type": "learned_range"}
    scheduler = scheduler_named("dpm++2m-sde-karras-trailing", config)
    assert type(scheduler).__name__ == "DPMSolverMultistepScheduler"
    expected = {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True, "timestep_spacing": "trailing"}
    assert expected.items() <= scheduler.config.items()
    assert config.items() <= scheduler.config.items()
    assert {cls.__name__ for cls, _ in NAMES.values()} == SCHEDULERS.keys() - {"UnCLIPScheduler"}
    for wrong, message in [
        ("dpmpp2m", r"there is no scheduler 'dpmpp2m'; did you mean .*dpm\+\+2m"),
        ("xyz", "there is no scheduler 'xyz'; there are ddim"),
        ("euler-karas", "there is no scheduler 'euler-karas'; did you mean"),
        ("ddim-karras", "ddim takes no -karras, only leading, linspace, trailing"),
        ("ipndm-trailing", "ipndm takes no -trailing, only nothing behind its name"),
    ]:
        with pytest.raises(SchedulerError, match=message):
            scheduler_named(wrong, {})
    with pytest.raises(SchedulerError, match="has no field 'solver_oder'; did you mean solver_order"):
        DPMSolverMultistepScheduler.from_config({}, solver_oder=3)


def test_a_function_cannot_be_saved(tmp_path):
    scheduler = SASolverScheduler(tau_func=lambda t: 1.0)
    assert (scheduler.schedule(10).table.matrix[:10, 0, Z] > 0).all()
    assert not SASolverScheduler(tau_func=lambda t: 0.0).schedule(10).table.matrix[:10, 0, Z].any()
    with pytest.raises(SchedulerError, match="tau_func of SASolverScheduler is a function, which no file can hold"):
        scheduler.save_pretrained(tmp_path)


@pytest.mark.parametrize("name", sorted(SCHEDULERS.keys() - {"UnCLIPScheduler"}))
def test_configurations_go_from_class_to_class(name, tmp_path):
    """As in diffusers: each takes its own fields out of any other's, and keeps the rest for the next."""
    config = json.loads((OFFICIAL_CONFIGS / "kandinsky-2-2-decoder/scheduler/scheduler_config.json").read_text())
    start = DDPMScheduler.from_config(config)
    there = SCHEDULERS[name].from_config(start.config)
    theirs = getattr(diffusers, name).from_config(diffusers.DDPMScheduler.from_config(config).config).config
    shared = {name for name in theirs.keys() & there.config.keys() if not name.startswith("_")}
    listed = {k: list(v) if isinstance(v, tuple) else v for k, v in there.config.items()}
    assert {k: listed[k] for k in shared} == {k: theirs[k] for k in shared}
    assert DDPMScheduler.from_config(there.config) == start
    there.save_pretrained(tmp_path)
    assert type(there).from_pretrained(tmp_path) == there
    assert scheduler_from_config(json.loads((tmp_path / "scheduler_config.json").read_text())) == there
    getattr(diffusers, name).from_pretrained(tmp_path)
