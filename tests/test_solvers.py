"""Every other solver's table against diffusers' class, stepped by hand, with each of its options at least once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kandinsky_jax.schedulers import SCHEDULERS, DEISMultistepScheduler, UniPCMultistepScheduler
from kandinsky_jax.schedulers.table import X0
from tests.solver_pairs import BOUND, EXACT, SHAPE, Pair, check, compare, described, grid

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
        *[c | {"solver_order": 3} for c in [*RESPACED, *SPACED, *BETAS[:3], *PREDICTIONS[1:]]],
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
        name: [*grid(spacing=[{}, *SPACED, *RESPACED], prediction=[PREDICTIONS[0], PREDICTIONS[2]]), *BETAS]
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


@pytest.mark.parametrize(("name", "config", "steps"), ALL, ids=described)
def test_as_the_reference(name, config, steps):
    check(SCHEDULERS[name], config, steps, exact=BOUND)


ROUNDED = [
    # Where DEIS makes the noise out of x0 again, at the last, small sigmas.
    *[(DEISMultistepScheduler, OFFICIAL | c | {"solver_order": 3}, s) for c in THRESHOLDS for s in (25, 50)],
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
