"""Host maths, float64 NumPy: a configuration and a number of steps -> a table of coefficients."""

from collections.abc import Mapping
from typing import Any

from kandinsky_jax.schedulers.base import Scheduler
from kandinsky_jax.schedulers.ddim import DDIMScheduler
from kandinsky_jax.schedulers.ddpm import DDPMScheduler, UnCLIPScheduler
from kandinsky_jax.schedulers.noise_schedule import SchedulerError
from kandinsky_jax.schedulers.table import ROWS, Schedule, Table

SCHEDULERS: dict[str, type[Scheduler]] = {cls.__name__: cls for cls in (DDIMScheduler, DDPMScheduler, UnCLIPScheduler)}


def scheduler_from_config(config: Mapping[str, Any], source: str = "scheduler_config.json") -> Scheduler:
    """The scheduler that a `scheduler_config.json` names in `_class_name`."""
    name = config.get("_class_name")
    if name not in SCHEDULERS:
        raise SchedulerError(f"{source} names {name!r}, which is not supported; there are {sorted(SCHEDULERS)}")
    return SCHEDULERS[name].from_config(config)


__all__ = [
    "ROWS",
    "SCHEDULERS",
    "DDIMScheduler",
    "DDPMScheduler",
    "Schedule",
    "Scheduler",
    "SchedulerError",
    "Table",
    "UnCLIPScheduler",
    "scheduler_from_config",
]
