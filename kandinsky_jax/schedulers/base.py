"""What all schedulers share: configuration, adding noise, what the network's output means."""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from kandinsky_jax.schedulers.noise_schedule import (
    SchedulerError,
    cumulative_alphas,
    make_betas,
    spaced_timesteps,
)
from kandinsky_jax.schedulers.table import ROWS, Schedule

# Fields of diffusers' other schedulers. They are kept, so that `Other.from_config(this.config)` finds them, and not
# warned about, because diffusers' own files carry them from scheduler to scheduler.
_FOREIGN = frozenset(
    "set_alpha_to_one skip_prk_steps solver_order solver_type algorithm_type lower_order_final euler_at_final "
    "final_sigmas_type use_karras_sigmas use_exponential_sigmas use_beta_sigmas lambda_min_clipped variance_type "
    "clip_sample clip_sample_range thresholding dynamic_thresholding_ratio sample_max_value steps_offset "
    "timestep_spacing prediction_type rescale_betas_zero_snr trained_betas beta_start beta_end beta_schedule eta "
    "num_train_timesteps interpolation_type use_flow_sigmas flow_shift predict_x0 original_inference_steps "
    "use_clipped_model_output use_lu_lambdas use_dynamic_shifting time_shift_type shift_terminal solver_p "
    "disable_corrector sigma_min sigma_max sigma_data sigma_schedule rho timestep_type timestep_scaling "
    "predictor_order corrector_order tau_func".split()
)
_UNSET = "_use_default_values"  # diffusers' name for the fields that a configuration did not name


def _freeze(value: Any) -> Any:
    return tuple(map(_freeze, value)) if isinstance(value, list | tuple) else value


@dataclasses.dataclass(frozen=True)
class Scheduler:
    """Base of the schedulers: an immutable configuration that can lay out a table.

    Fields bear the names and defaults of the diffusers class of the same name.
    """

    CHOICES: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    num_train_timesteps: int = 1000
    extra: tuple[tuple[str, Any], ...] = dataclasses.field(default=(), kw_only=True, repr=False)
    unset: frozenset[str] | None = dataclasses.field(default=None, kw_only=True, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.unset is None:
            unset = {f.name for f in self._fields() if getattr(self, f.name) == f.default}
            object.__setattr__(self, "unset", frozenset(unset))
        faults = [
            f"{name}={getattr(self, name)!r} is not supported, only {', '.join(map(repr, allowed))}"
            for name, allowed in self.CHOICES.items()
            if getattr(self, name) not in allowed
        ]
        if faults:
            raise SchedulerError(f"{type(self).__name__}: " + "; ".join(faults))

    def schedule(self, num_inference_steps: int) -> Schedule:
        """The table for this number of steps.

        Raises:
            SchedulerError: where the number is not one that the reference takes.
        """
        raise NotImplementedError

    def alphas_cumprod(self) -> np.ndarray:
        """See `kandinsky_jax.schedulers.noise_schedule.cumulative_alphas`."""
        raise NotImplementedError

    def _check_steps(self, steps: Any, least: int = 1) -> int:
        if isinstance(steps, bool) or not isinstance(steps, int | np.integer):
            raise SchedulerError(f"num_inference_steps must be an integer, got {steps!r}")
        most = min(self.num_train_timesteps, ROWS)
        if not least <= steps <= most:
            raise SchedulerError(
                f"num_inference_steps={steps} is out of range for {type(self).__name__}, which takes {least} to {most}"
            )
        return int(steps)

    def noise_levels(self, timesteps: np.ndarray) -> np.ndarray:
        """How much signal and how much noise a sample has at int timesteps `[n]`; float64 `[n, 2]`."""
        alpha = self.alphas_cumprod()[np.asarray(timesteps)]
        return np.stack([np.sqrt(alpha), np.sqrt(1 - alpha)], axis=-1)

    def add_noise(self, original: jax.Array, noise: jax.Array, timesteps: np.ndarray) -> jax.Array:
        """Diffuse `original [B, ...]` to the int timesteps `[B]` (or one for all) with `noise [B, ...]`."""
        levels = self.noise_levels(timesteps).reshape(-1, 2, *[1] * (original.ndim - 1))
        signal, sigma = (jnp.asarray(level, jnp.float32) for level in (levels[:, 0], levels[:, 1]))
        return signal * original + sigma * noise

    # Configuration ------------------------------------------------------------------------------------------------

    @classmethod
    def _fields(cls) -> list[dataclasses.Field[Any]]:
        return [f for f in dataclasses.fields(cls) if f.name not in ("extra", "unset")]

    @property
    def config(self) -> dict[str, Any]:
        """The configuration, with what other schedulers' fields it was loaded with.

        As in diffusers, `_use_default_values` lists the fields that nobody set, so that another scheduler made from
        this configuration takes its own defaults for them.
        """
        own = {f.name: getattr(self, f.name) for f in self._fields()}
        return {_UNSET: sorted(self.unset or ()), **dict(self.extra), **own}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **changes: Any) -> Self:
        """Build this scheduler from any scheduler's configuration, as in diffusers; `changes` override fields.

        Fields of other schedulers are kept for them; one that no diffusers scheduler has warns. A field that is null is
        one that was not set.
        """
        names = {f.name for f in cls._fields()}
        if unknown := changes.keys() - names:
            raise SchedulerError(f"{cls.__name__} has no field {sorted(unknown)}; it has {sorted(names)}")
        unset = set(config.get(_UNSET, ())) - changes.keys()
        raw = {k: v for k, v in {**config, **changes}.items() if not k.startswith("_") and k not in unset}
        if strange := raw.keys() - names - _FOREIGN:
            warnings.warn(f"no scheduler knows {sorted(strange)}, which {cls.__name__} does not use", stacklevel=2)
        own = {k: _freeze(v) for k, v in raw.items() if k in names and v is not None}
        extra = tuple(sorted((k, _freeze(v)) for k, v in raw.items() if k not in names))
        return cls(**own, extra=extra, unset=frozenset(names - own.keys()))

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> Self:
        """Read `scheduler_config.json` from a folder."""
        return cls.from_config(json.loads((Path(folder) / "scheduler_config.json").read_text()))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `scheduler_config.json`, for this library or diffusers, into `folder` (made where it is missing)."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        fields = {k: v for k, v in self.config.items() if k != _UNSET}
        named = {"_class_name": type(self).__name__, **fields}
        (Path(folder) / "scheduler_config.json").write_text(json.dumps(named, indent=2, sort_keys=True) + "\n")


def predictions(kind: str, alpha: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How (sample, output) give x0 and eps, for a network that predicts `kind`.

    Args:
        kind: "epsilon", "sample" or "v_prediction" (Salimans & Ho 2022, arXiv 2202.00512).
        alpha: the cumulative products at the timesteps, `[n]`.
    Returns:
        x0_from `[n, 2]` and eps_from `[n, 3]` of a `Table`; eps does not see the clipping of x0.
    """
    signal, sigma, zero = np.sqrt(alpha), np.sqrt(1 - alpha), np.zeros_like(alpha)
    columns = {
        "epsilon": ((1 / signal, -sigma / signal), (zero, zero, zero + 1)),
        "sample": ((zero, zero + 1), (1 / sigma, zero, -signal / sigma)),
        "v_prediction": ((signal, -sigma), (sigma, zero, signal)),
    }[kind]
    return np.stack(columns[0], axis=1), np.stack(columns[1], axis=1)


@dataclasses.dataclass(frozen=True)
class DiffusionScheduler(Scheduler):
    """The fields that diffusers' schedulers for DDPM-trained networks share."""

    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    clip_sample: bool = True
    prediction_type: str = "epsilon"
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    clip_sample_range: float = 1.0
    sample_max_value: float = 1.0
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    rescale_betas_zero_snr: bool = False

    CHOICES: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"),
        "prediction_type": ("epsilon", "sample", "v_prediction"),
        "timestep_spacing": ("leading", "linspace", "trailing"),
        "rescale_betas_zero_snr": (False,),
    }

    def alphas_cumprod(self) -> np.ndarray:
        betas = make_betas(
            self.beta_schedule, self.beta_start, self.beta_end, self.num_train_timesteps, self.trained_betas
        )
        return cumulative_alphas(betas)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trained_betas is not None and len(self.trained_betas) != self.num_train_timesteps:
            raise SchedulerError(
                f"{type(self).__name__}: trained_betas has {len(self.trained_betas)} items for "
                f"num_train_timesteps={self.num_train_timesteps}"
            )

    def timesteps(self, steps: int) -> np.ndarray:
        """Descending int timesteps `[steps]`."""
        chosen = spaced_timesteps(self.timestep_spacing, steps, self.num_train_timesteps, self.steps_offset)
        if not 0 <= chosen.min() <= chosen.max() < self.num_train_timesteps:
            raise SchedulerError(
                f"{type(self).__name__}: steps_offset={self.steps_offset} puts the {steps} timesteps outside 0 to "
                f"{self.num_train_timesteps - 1}"
            )
        return chosen

    def limits(self) -> dict[str, Any]:
        """`build`'s clip and threshold; thresholding goes before clipping."""
        if self.thresholding:
            return {"threshold": (self.dynamic_thresholding_ratio, self.sample_max_value)}
        return {"clip": self.clip_sample_range if self.clip_sample else np.inf}
