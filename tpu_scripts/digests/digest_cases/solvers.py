"""All solver classes with each option that has a branch of its own, on the embedded model's decoder."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

from digest_cases import Case, inputs
from digest_cases.modes import GUIDED, call

STEPS = 5
SHORT_NAMES = (
    "ddpm ddim dpm++2m dpm++3m dpm++2m-sde dpm++2s dpm++3s dpm++sde deis unipc sa euler euler-a heun dpm2 dpm2-a lms "
    "pndm plms ipndm lcm tcd dpm++2m-karras euler-exponential heun-beta dpm++2m-lu ddim-trailing"
)
_SPACINGS = [{"timestep_spacing": spacing} for spacing in ("linspace", "trailing")]  # the model's is leading
_SIGMAS = [{"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True}]
_KINDS = [{"prediction_type": kind} for kind in ("sample", "v_prediction")]  # the model's is epsilon
_ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
_THRESHOLD = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5}
_BETAS = [
    {"beta_schedule": name} for name in ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "exp", "laplace")
]
_CUSTOM = {"custom_timesteps": (900, 600, 300, 50)}
_ORDERS: list[dict[str, Any]] = [{"solver_order": order} for order in (1, 2, 3)]
_VARIANCES = [
    {"variance_type": kind}
    for kind in ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range")
]
_TO_SIGMA_MIN: dict[str, Any] = {"final_sigmas_type": "sigma_min"}
_FINAL = [{"final_sigmas_type": kind} for kind in ("zero", "sigma_min")]

# Options by class. A combination that a class refuses is a case too: the refusal must stay one.
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "DDPMScheduler": [
        *_SPACINGS, *_KINDS, *_BETAS, _THRESHOLD, _ZERO_SNR, _CUSTOM, {"clip_sample": True},
        {"clip_sample": True, "clip_sample_range": 0.5}, {"steps_offset": 1}, *_VARIANCES,
    ],
    "DDIMScheduler": [
        *_SPACINGS, *_KINDS, _THRESHOLD, _ZERO_SNR, _CUSTOM, {"clip_sample": True}, {"eta": 0.5}, {"eta": 1.0},
        {"eta": 0.5, "use_clipped_model_output": True}, {"use_clipped_model_output": True}, {"set_alpha_to_one": False},
        {"steps_offset": 1},
    ],
    "DPMSolverMultistepScheduler": [
        *_SPACINGS, *_KINDS, *_SIGMAS, _THRESHOLD, _ZERO_SNR, _CUSTOM, {"use_lu_lambdas": True},
        *(order | {"algorithm_type": kind} for order in _ORDERS for kind in ("dpmsolver++", "sde-dpmsolver++")),
        *(order | {"algorithm_type": kind} | _TO_SIGMA_MIN
          for order in _ORDERS for kind in ("dpmsolver", "sde-dpmsolver")),
        *({"solver_type": "heun", "algorithm_type": kind} for kind in ("dpmsolver++", "sde-dpmsolver++")),
        *({"solver_type": "heun", "algorithm_type": kind} | _TO_SIGMA_MIN for kind in ("dpmsolver", "sde-dpmsolver")),
        {"algorithm_type": "dpmsolver"}, _TO_SIGMA_MIN, _TO_SIGMA_MIN | {"lower_order_final": False},
        _TO_SIGMA_MIN | {"euler_at_final": True}, {"lambda_min_clipped": -3.0},
    ],
    "DPMSolverSinglestepScheduler": [
        *_KINDS, *_SIGMAS, _THRESHOLD, _CUSTOM, {"lower_order_final": True},
        *(order | {"algorithm_type": kind} for order in _ORDERS for kind in ("dpmsolver++", "sde-dpmsolver++")),
        {"algorithm_type": "dpmsolver"} | _TO_SIGMA_MIN, {"solver_type": "heun"},
        {"solver_type": "heun", "solver_order": 3}, _TO_SIGMA_MIN, {"lambda_min_clipped": -3.0},
    ],
    "DEISMultistepScheduler": [
        *_SPACINGS, *_KINDS, *_SIGMAS, _THRESHOLD, _CUSTOM, *_ORDERS, {"lower_order_final": False},
    ],
    "UniPCMultistepScheduler": [
        *_SPACINGS, *_KINDS, *_SIGMAS, _THRESHOLD, _ZERO_SNR, _CUSTOM, *_FINAL,
        *(order | {"solver_type": kind} for order in _ORDERS for kind in ("bh1", "bh2")), {"predict_x0": False},
        {"predict_x0": False, "solver_order": 3} | _TO_SIGMA_MIN, {"predict_x0": False} | _TO_SIGMA_MIN,
        {"lower_order_final": False} | _TO_SIGMA_MIN, {"disable_corrector": (0, 2)},
        {"use_karras_sigmas": True, "sigma_min": 0.05, "sigma_max": 50.0},
    ],
    "SASolverScheduler": [
        *_SPACINGS, *_KINDS, *_SIGMAS, _THRESHOLD, _CUSTOM, {"predictor_order": 1, "corrector_order": 1},
        {"predictor_order": 3, "corrector_order": 3}, {"predictor_order": 3, "corrector_order": 4},
        {"algorithm_type": "data_prediction"}, {"algorithm_type": "noise_prediction"}, {"lower_order_final": False},
    ],
    "EulerDiscreteScheduler": [
        *_SPACINGS, *_KINDS, *_SIGMAS, _ZERO_SNR, _CUSTOM, *_FINAL, {"interpolation_type": "log_linear"},
        {"timestep_type": "continuous", "prediction_type": "v_prediction"},
        {"custom_sigmas": (10.0, 3.0, 1.0, 0.1, 0.0)},
        {"use_karras_sigmas": True, "sigma_min": 0.05, "sigma_max": 50.0},
        {"interpolation_type": "log_linear", "use_karras_sigmas": True},
    ],
    "EulerAncestralDiscreteScheduler": [*_SPACINGS, *_KINDS, _ZERO_SNR],
    "HeunDiscreteScheduler": [*_SPACINGS, *_KINDS, *_SIGMAS, _CUSTOM, {"clip_sample": True}],
    "KDPM2DiscreteScheduler": [*_SPACINGS, *_KINDS, *_SIGMAS],
    "KDPM2AncestralDiscreteScheduler": [*_SPACINGS, *_KINDS, *_SIGMAS],
    "LMSDiscreteScheduler": [*_SPACINGS, *_KINDS, *_SIGMAS],
    "PNDMScheduler": [
        *_SPACINGS, *_KINDS, {"skip_prk_steps": True}, {"skip_prk_steps": False}, {"set_alpha_to_one": True},
        {"steps_offset": 1, "skip_prk_steps": True},
    ],
    "IPNDMScheduler": [],
    "LCMScheduler": [
        *_KINDS, _THRESHOLD, _CUSTOM, {"clip_sample": True}, {"timestep_scaling": 5.0}, {"set_alpha_to_one": False},
    ],
    "TCDScheduler": [*_KINDS, _THRESHOLD, _CUSTOM, {"clip_sample": True}, {"eta": 0.0}, {"eta": 1.0}],
    "UnCLIPScheduler": [
        {"variance_type": "learned_range"}, {"prediction_type": "sample"}, {"clip_sample": False},
        {"clip_sample_range": 0.5},
    ],
}  # fmt: skip
_QUICK = {"DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler", "LCMScheduler"}


def cases() -> list[Case]:
    """All cases of the module."""
    found: dict[str, Case] = {}
    for solver, options in OPTIONS.items():
        for changes in ({}, *options):
            name = f"solver/{solver}/{_said(changes)}"
            # The first case of each class, and every option of two of them.
            quick = not changes or (solver in _QUICK and len(changes) == 1)
            found[name] = Case(name, functools.partial(_sample, solver, changes), quick)
        found[f"solver/{solver}/torch seed 3"] = Case(
            f"solver/{solver}/torch seed 3", functools.partial(_sample, solver, {}, generator=("torch", 3))
        )
        found[f"solver/{solver}/img2img"] = Case(
            f"solver/{solver}/img2img", functools.partial(_sample, solver, {}, image=inputs.picture(), strength=0.7)
        )
        name = f"solver/{solver}/add_noise and configuration"
        found[name] = Case(name, functools.partial(_forward, solver), quick=True)
    for short in SHORT_NAMES.split():
        found[f"solver named {short}"] = Case(f"solver named {short}", functools.partial(_sample, short, None))
    return list(found.values())


def _said(changes: dict[str, Any]) -> str:
    """Options in a case's name."""
    return ", ".join(f"{name}={value}" for name, value in changes.items()) or "as the model's"


def _sample(solver: str, changes: dict[str, Any] | None, _: Path, **extra: Any) -> Any:
    """Latents after a few steps, or in which words the options are refused."""
    import kandinsky_jax as kj

    pipe = inputs.pipeline("KandinskyV22Img2ImgPipeline" if "image" in extra else "KandinskyV22Pipeline", inputs.TINY)
    before = pipe.scheduler
    try:
        if changes is None:
            pipe.scheduler = kj.scheduler_named(solver, before.config)
        else:
            pipe.scheduler = _made(solver, before.config, changes)
        return call(pipe, **GUIDED, num_inference_steps=STEPS, output_type="latent", **extra)
    except (kj.SchedulerError, kj.CheckpointError) as error:
        return {"refused": type(error).__name__}
    finally:
        pipe.scheduler = before


def _made(solver: str, config: Any, changes: dict[str, Any]) -> Any:
    """A scheduler of a class for the model's noise schedule, which UnCLIP has not."""
    import kandinsky_jax as kj

    cls = getattr(kj, solver)
    return cls(**changes) if solver == "UnCLIPScheduler" else cls.from_config(config, **changes)


def _forward(solver: str, folder: Path) -> Any:
    """The forward process, and the files of the configuration."""
    before = inputs.pipeline("KandinskyV22Pipeline", inputs.TINY).scheduler
    scheduler = _made(solver, before.config, {})
    rng = np.random.default_rng(0)
    clean, noise = (rng.normal(size=(3, 4, 4, 4)).astype(np.float32) for _ in range(2))
    scheduler.save_pretrained(folder)
    return {
        "noisy": scheduler.add_noise(clean, noise, np.array([1, 500, 999])),
        "alphas_cumprod": scheduler.alphas_cumprod,
        "file": (folder / "scheduler_config.json").read_bytes(),
    }
