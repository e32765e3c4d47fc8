"""Schedulers: float64 NumPy on the host; a configuration and a number of steps -> a table of coefficients."""

from kandinsky_jax.schedulers.base import Scheduler
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
from kandinsky_jax.schedulers.names import NAMES, SCHEDULERS, scheduler_from_config, scheduler_named
from kandinsky_jax.schedulers.noise_schedule import SchedulerError
from kandinsky_jax.schedulers.pndm import IPNDMScheduler, PNDMScheduler
from kandinsky_jax.schedulers.sa_solver import SASolverScheduler
from kandinsky_jax.schedulers.table import MAX_STEPS, Schedule, SolverCoefficients
from kandinsky_jax.schedulers.unipc import UniPCMultistepScheduler

__all__ = [
    "MAX_STEPS",
    "NAMES",
    "SCHEDULERS",
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "IPNDMScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "Schedule",
    "Scheduler",
    "SchedulerError",
    "SolverCoefficients",
    "TCDScheduler",
    "UnCLIPScheduler",
    "UniPCMultistepScheduler",
    "scheduler_from_config",
    "scheduler_named",
]
