"""Schedulers by name: the classes that a `scheduler_config.json` names, and the short names of the command line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kandinsky_jax.common.errors import quote
from kandinsky_jax.common.reading import of_file
from kandinsky_jax.schedulers.base import Scheduler, near
from kandinsky_jax.schedulers.consistency import LCMScheduler, TCDScheduler
from kandinsky_jax.schedulers.ddim import DDIMScheduler
from kandinsky_jax.schedulers.ddpm import DDPMScheduler, UnCLIPScheduler
from kandinsky_jax.schedulers.deis import DEISMultistepScheduler
from kandinsky_jax.schedulers.dpm_solver import DPMSolverMultistepScheduler, DPMSolverSinglestepScheduler
from kandinsky_jax.schedulers.karras import (
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LMSDiscreteScheduler,
)
from kandinsky_jax.schedulers.noise_schedule import SchedulerError
from kandinsky_jax.schedulers.pndm import IPNDMScheduler, PNDMScheduler
from kandinsky_jax.schedulers.sa_solver import SASolverScheduler
from kandinsky_jax.schedulers.unipc import UniPCMultistepScheduler

# Common names from k-diffusion and its user interfaces: class and fields.
NAMES: dict[str, tuple[type[Scheduler], dict[str, Any]]] = {
    "ddpm": (DDPMScheduler, {}),
    "ddim": (DDIMScheduler, {}),
    "dpm++2m": (DPMSolverMultistepScheduler, {"solver_order": 2}),
    "dpm++3m": (DPMSolverMultistepScheduler, {"solver_order": 3}),
    "dpm++2m-sde": (DPMSolverMultistepScheduler, {"solver_order": 2, "algorithm_type": "sde-dpmsolver++"}),
    "dpm++2s": (DPMSolverSinglestepScheduler, {"solver_order": 2}),
    "dpm++3s": (DPMSolverSinglestepScheduler, {"solver_order": 3}),
    "dpm++sde": (DPMSolverSinglestepScheduler, {"solver_order": 2, "algorithm_type": "sde-dpmsolver++"}),
    "deis": (DEISMultistepScheduler, {}),
    "unipc": (UniPCMultistepScheduler, {}),
    "sa": (SASolverScheduler, {}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler-a": (EulerAncestralDiscreteScheduler, {}),
    "heun": (HeunDiscreteScheduler, {}),
    "dpm2": (KDPM2DiscreteScheduler, {}),
    "dpm2-a": (KDPM2AncestralDiscreteScheduler, {}),
    "lms": (LMSDiscreteScheduler, {}),
    "pndm": (PNDMScheduler, {"skip_prk_steps": False}),
    "plms": (PNDMScheduler, {"skip_prk_steps": True}),
    "ipndm": (IPNDMScheduler, {}),
    "lcm": (LCMScheduler, {}),
    "tcd": (TCDScheduler, {}),
}
# Suffixes of these names, for classes that have the field.
SUFFIXES: dict[str, dict[str, Any]] = {
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "lu": {"use_lu_lambdas": True},
    **{spacing: {"timestep_spacing": spacing} for spacing in ("leading", "linspace", "trailing")},
}

SCHEDULERS: dict[str, type[Scheduler]] = {cls.__name__: cls for cls, _ in NAMES.values()} | {
    "UnCLIPScheduler": UnCLIPScheduler
}


def scheduler_from_config(config: Mapping[str, object], source: str = "scheduler_config.json") -> Scheduler:
    """Build the scheduler that a `scheduler_config.json` names in `_class_name`."""
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in SCHEDULERS:
        given, known = quote(name, 60), near(name, SCHEDULERS)
        raise SchedulerError(of_file(source, f"names the scheduler {given}, which is not supported; {known}"))
    try:
        return SCHEDULERS[name].from_config(config)
    except SchedulerError as error:
        raise SchedulerError(of_file(source, error)) from None


def scheduler_named(name: str, config: Mapping[str, object]) -> Scheduler:
    """Build the scheduler of a short name, such as "dpm++2m-karras", with the noise schedule of `config`."""
    stem, suffixes = name, []
    while stem not in NAMES and "-" in stem and stem.rsplit("-", 1)[1] in SUFFIXES:
        stem, suffix = stem.rsplit("-", 1)
        suffixes.append(suffix)
    if stem not in NAMES:
        raise SchedulerError(f"there is no scheduler {quote(name)}; {near(stem, NAMES)}")
    cls, changes = NAMES[stem]
    fields = {field.name for field in cls.fields()}
    for suffix in suffixes:
        if not SUFFIXES[suffix].keys() <= fields:
            possible = [s for s, extra in SUFFIXES.items() if extra.keys() <= fields]
            raise SchedulerError(f"{stem} takes no -{suffix}, only {', '.join(possible) or 'nothing'} behind its name")
        changes = changes | SUFFIXES[suffix]
    return cls.from_config(config, **changes)
