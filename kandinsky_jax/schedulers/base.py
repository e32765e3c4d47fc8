"""Base of all schedulers: configuration, adding noise, and prediction types."""

from __future__ import annotations

import dataclasses
import difflib
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from kandinsky_jax.common.arrays import to_numpy
from kandinsky_jax.common.attribute_dict import AttributeDict
from kandinsky_jax.common.errors import quote, shorten, summarize
from kandinsky_jax.common.fields import Bounds, field_faults
from kandinsky_jax.schedulers.compatibility import UNSET, SchedulerMixin
from kandinsky_jax.schedulers.noise_schedule import (
    SPACINGS,
    SchedulerError,
    cumulative_alphas,
    make_betas,
    rescaled_to_zero_snr,
    spaced_timesteps,
)
from kandinsky_jax.schedulers.table import MAX_STEPS, Schedule

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
_INTERNAL = ("extra", "unset")
MAX_TRAIN_TIMESTEPS = 10_000  # the tables of the forward process are this long; the longest known is 4,000


def _freeze(value: object) -> Any:
    """Convert lists to tuples, and arrays and numbers of NumPy, JAX or PyTorch to Python's."""
    if isinstance(value, list | tuple):
        return tuple(map(_freeze, value))
    if not hasattr(value, "__array__"):
        return value
    try:
        plain = np.asarray(value.detach() if hasattr(value, "detach") else value).tolist()
    except (TypeError, ValueError, RuntimeError):
        return value  # `field_faults` says what is needed
    return tuple(map(_freeze, plain)) if isinstance(plain, list) else plain


def near(name: object, known: Iterable[str]) -> str:
    """Suggest similar names, for the end of an error message."""
    known = sorted(known)
    close = difflib.get_close_matches(str(name), known, n=3)
    return f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(known)}"


@dataclasses.dataclass(frozen=True)
class Scheduler(SchedulerMixin):
    """Base of the schedulers: an immutable configuration that computes a table.

    Fields have the names and defaults of the diffusers class of the same name, and are given by name.
    """

    CHOICES: ClassVar[Mapping[str, tuple[object, ...]]] = {}
    # Other solvers' values, which configurations carry from one to the other, and what they are here.
    SYNONYMS: ClassVar[Mapping[str, Mapping[object, object]]] = {}

    # The range of a number, where any other one is a mistake.
    BOUNDS: ClassVar[Bounds] = {
        "num_train_timesteps": (1, MAX_TRAIN_TIMESTEPS),
        "steps_offset": (-MAX_TRAIN_TIMESTEPS, MAX_TRAIN_TIMESTEPS),
        "beta_start": (0, 1),
        "beta_end": (0, 1),
        "trained_betas": (0, 1),
        "clip_sample_range": (0, np.inf),
        "dynamic_thresholding_ratio": (0, 1),
        "sample_max_value": (0, np.inf),
        "sigma_min": (0, np.inf),
        "sigma_max": (0, np.inf),
    }

    num_train_timesteps: int = 1000
    extra: tuple[tuple[str, object], ...] = dataclasses.field(default=(), kw_only=True, repr=False)
    unset: frozenset[str] | None = dataclasses.field(default=None, kw_only=True, repr=False, compare=False)

    def __post_init__(self) -> None:
        for field in self.fields():
            object.__setattr__(self, field.name, _freeze(getattr(self, field.name)))
        faults = field_faults(
            self, self.BOUNDS, (*_INTERNAL, "custom_timesteps", "custom_sigmas"), ("lambda_min_clipped",)
        )
        if faults:
            raise SchedulerError(f"{type(self).__name__}: {summarize(faults)}")
        if self.unset is None:
            unset = {f.name for f in self.fields() if getattr(self, f.name) == f.default}
            object.__setattr__(self, "unset", frozenset(unset))
        for name, synonyms in self.SYNONYMS.items():
            object.__setattr__(self, name, synonyms.get(getattr(self, name), getattr(self, name)))
        faults = [
            f"{name}={quote(getattr(self, name))} is not supported, only {', '.join(map(repr, allowed))}"
            for name, allowed in self.CHOICES.items()
            if hasattr(self, name) and getattr(self, name) not in allowed
        ]
        if faults:
            raise SchedulerError(f"{type(self).__name__}: {summarize(faults)}")

    def schedule(self, num_inference_steps: int, begin: int = 0) -> Schedule:
        """Compute the table for this number of steps.

        Args:
            num_inference_steps: ignored by a scheduler with custom timesteps or sigmas.
            begin: steps to skip, for a sample that is already partly denoised. Multistep solvers start anew there.
        Raises:
            SchedulerError: for a number of steps that the reference does not take, or options that divide by zero.
        """
        with np.errstate(divide="ignore", invalid="ignore"):  # reported by `build`
            return self._lay_out(num_inference_steps, begin)

    def _lay_out(self, num_inference_steps: int, begin: int) -> Schedule:
        raise NotImplementedError

    def steps(self, num_inference_steps: int) -> int:
        """Return the number of steps: as given, unless the scheduler has custom ones."""
        return self._check_steps(num_inference_steps)

    @property
    def alphas_cumprod(self) -> np.ndarray:
        """Float64 `[num_train_timesteps]`, see `kandinsky_jax.schedulers.noise_schedule.cumulative_alphas`."""
        raise NotImplementedError

    def _check_steps(self, steps: object, least: int = 1, most: int = MAX_STEPS) -> int:
        if isinstance(steps, bool) or not isinstance(steps, int | np.integer):
            raise SchedulerError(f"num_inference_steps must be an integer, got {quote(steps)}")
        most = min(self.num_train_timesteps, most)
        if not least <= steps <= most:
            raise SchedulerError(
                f"num_inference_steps={shorten(steps)} is out of range for {type(self).__name__}, "
                f"which takes {least} to {most}"
            )
        return int(steps)

    def noise_levels(self, timesteps: np.ndarray) -> np.ndarray:
        """Return the factors of signal and noise at int timesteps `[n]`; float64 `[n, 2]`."""
        return vp_levels(np.atleast_1d(self.alphas_cumprod[np.asarray(timesteps)]))

    def add_noise(self, original: jax.Array, noise: jax.Array, timesteps: np.ndarray) -> jax.Array:
        """Diffuse `original [B, ...]` to the int timesteps `[B]` (or one for all) with `noise [B, ...]`."""
        return linear_combination(self.noise_levels(_plain(timesteps)), original, noise)

    def get_velocity(self, sample: jax.Array, noise: jax.Array, timesteps: np.ndarray) -> jax.Array:
        """Compute the target of v_prediction (Salimans & Ho 2022, arXiv 2202.00512) for the clean `sample [B, ...]`
        diffused with `noise` to the int timesteps `[B]` (or one for all)."""
        alpha = self.alphas_cumprod[_plain(timesteps)]
        return linear_combination(np.stack([-np.sqrt(1 - alpha), np.sqrt(alpha)], axis=-1), sample, noise)

    # Configuration ------------------------------------------------------------------------------------------------

    @classmethod
    def fields(cls) -> list[dataclasses.Field[Any]]:
        return [f for f in dataclasses.fields(cls) if f.name not in _INTERNAL]

    @property
    def config(self) -> AttributeDict:
        """The configuration, also as attributes, with what other schedulers' fields it was loaded with.

        As in diffusers, `_use_default_values` lists the fields that were not set, so that another scheduler made from
        this configuration takes its own defaults for them.
        """
        own = {f.name: getattr(self, f.name) for f in self.fields()}
        named = {"_class_name": type(self).__name__, UNSET: sorted(self.unset or ()), **dict(self.extra), **own}
        return AttributeDict(named)

    @classmethod
    def from_config(cls, config: Mapping[str, object], return_unused_kwargs: bool = False, **changes: Any) -> Any:
        """Build this scheduler from any scheduler's configuration, as in diffusers; `changes` override fields.

        Fields of other schedulers are kept for them; one that no diffusers scheduler has warns. A field that is null is
        one that was not set. With `return_unused_kwargs`, those of `changes` that are not fields are returned with the
        scheduler, as a dictionary; without, they are errors.
        """
        if not isinstance(config, Mapping) or not all(isinstance(name, str) for name in config):
            raise SchedulerError(
                f"{cls.__name__}.from_config takes a configuration as a dictionary, got {quote(config)}; "
                "from_pretrained takes the name of a folder or repository"
            )
        names = {f.name for f in cls.fields()}
        if return_unused_kwargs:
            used = {name: value for name, value in changes.items() if name in names}
            return cls.from_config(config, **used), {k: v for k, v in changes.items() if k not in names}
        if unknown := changes.keys() - names:
            wrong = min(unknown)
            raise SchedulerError(f"{cls.__name__} has no field {quote(wrong)}; {near(wrong, names)}")
        listed = config.get(UNSET) or ()
        if not isinstance(listed, list | tuple) or not all(isinstance(name, str) for name in listed):
            raise SchedulerError(f"{cls.__name__}: {UNSET} must be a list of fields' names, got {shorten(listed)}")
        unset = set(listed) - changes.keys()
        raw = {k: v for k, v in {**config, **changes}.items() if not k.startswith("_") and k not in unset}
        if strange := raw.keys() - names - _FOREIGN:
            unknown_names = shorten(sorted(strange), 240)
            warnings.warn(f"no scheduler knows {unknown_names}, which {cls.__name__} does not use", stacklevel=2)
        own = {k: _freeze(v) for k, v in raw.items() if k in names and v is not None}
        extra = tuple(sorted((k, _freeze(v)) for k, v in raw.items() if k not in names))
        return cls(**own, extra=extra, unset=frozenset(names - own.keys()))


def _plain(array: Any) -> Any:
    """Convert a PyTorch tensor to NumPy; return anything else unchanged."""
    return to_numpy(array, "the array") if hasattr(array, "detach") else array


def linear_combination(levels: np.ndarray, signal: jax.Array, noise: jax.Array) -> jax.Array:
    """Combine signal and noise `[B, ...]` with float32 factors `[B or 1, 2]`; they may be PyTorch tensors."""
    signal, noise = _plain(signal), _plain(noise)
    shares = np.asarray(levels, np.float32).reshape(-1, 2, *[1] * (signal.ndim - 1))
    return jnp.asarray(shares[:, 0]) * signal + jnp.asarray(shares[:, 1]) * noise


def predictions(kind: str, alpha: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return coefficients that compute x0 and eps from (sample, output), for a network that predicts `kind`.

    Args:
        kind: "epsilon", "sample" or "v_prediction" (Salimans & Ho 2022, arXiv 2202.00512).
        alpha: the cumulative products at the timesteps, `[n]`.
    Returns:
        x0_from `[n, 2]` and eps_from `[n, 3]` of a `SolverCoefficients`; eps is not affected by clipping of x0.
    """
    signal, sigma, zero = np.sqrt(alpha), np.sqrt(1 - alpha), np.zeros_like(alpha)
    if kind == "epsilon" and not alpha.all():
        raise SchedulerError(
            "at a terminal signal-to-noise ratio of zero the noise says nothing of the picture: that is for networks "
            "that predict v or the sample, not epsilon"
        )
    columns = {
        "epsilon": ((1 / signal, -sigma / signal), (zero, zero, zero + 1)),
        "sample": ((zero, zero + 1), (1 / sigma, zero, -signal / sigma)),
        "v_prediction": ((signal, -sigma), (sigma, zero, signal)),
    }[kind]
    return np.stack(columns[0], axis=1), np.stack(columns[1], axis=1)


def eps_of_x0(alpha: np.ndarray) -> np.ndarray:
    """Return an `eps_from [n, 3]` that uses the clipped x0."""
    sigma = np.sqrt(1 - alpha)
    return np.stack([1 / sigma, -np.sqrt(alpha) / sigma, np.zeros_like(alpha)], axis=1)


@dataclasses.dataclass(frozen=True)
class BetaScheduler(Scheduler):
    """The fields that diffusers' schedulers for DDPM-trained networks share."""

    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    prediction_type: str = "epsilon"

    CHOICES: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "exp", "laplace"),
        "prediction_type": ("epsilon", "sample", "v_prediction"),
        "timestep_spacing": SPACINGS,
        "final_sigmas_type": ("zero", "sigma_min"),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trained_betas is not None and len(self.trained_betas) != self.num_train_timesteps:
            raise SchedulerError(
                f"{type(self).__name__}: trained_betas has {len(self.trained_betas)} items for "
                f"num_train_timesteps={self.num_train_timesteps}"
            )

    @property
    def betas(self) -> np.ndarray:
        """Float64 `[num_train_timesteps]`, after `rescale_betas_zero_snr`."""
        betas = make_betas(
            self.beta_schedule, self.beta_start, self.beta_end, self.num_train_timesteps, self.trained_betas
        )
        return rescaled_to_zero_snr(betas) if getattr(self, "rescale_betas_zero_snr", False) else betas

    @property
    def alphas(self) -> np.ndarray:
        """1 - betas."""
        return 1 - self.betas

    @property
    def alphas_cumprod(self) -> np.ndarray:
        return cumulative_alphas(self.betas)

    def _within(self, timesteps: np.ndarray) -> np.ndarray:
        """Return the timesteps, if they are within the training range."""
        if not 0 <= timesteps.min() <= timesteps.max() <= self.num_train_timesteps - 1:
            raise SchedulerError(
                f"{type(self).__name__}: steps_offset={getattr(self, 'steps_offset', 0)} puts the {len(timesteps)} "
                f"timesteps outside 0 to {self.num_train_timesteps - 1}"
            )
        return timesteps

    def _custom(self, name: str) -> np.ndarray | None:
        """Return custom timesteps or sigmas, descending, if there are any."""
        given = getattr(self, name, None)
        if given is None:
            return None
        try:
            values = np.asarray(given, np.float64)
        except (TypeError, ValueError):
            values = np.zeros(0)
        if values.ndim != 1 or not values.size or not np.isfinite(values).all() or (np.diff(values) >= 0).any():
            raise SchedulerError(f"{name} must be falling numbers, got {quote(given)}")
        if name == "custom_timesteps" and not 0 <= values[-1] <= values[0] <= self.num_train_timesteps - 1:
            raise SchedulerError(
                f"custom_timesteps must lie in 0 to {self.num_train_timesteps - 1}, got {quote(given)}"
            )
        if values[-1] < 0:
            raise SchedulerError(f"{name} must not be negative, got {quote(given)}")
        return values

    def limits(self) -> dict[str, Any]:
        """Return the arguments clip and threshold of `build`; thresholding takes precedence."""
        if getattr(self, "thresholding", False):
            return {"threshold": (self.dynamic_thresholding_ratio, self.sample_max_value)}
        return {"clip": self.clip_sample_range if getattr(self, "clip_sample", False) else np.inf}


@dataclasses.dataclass(frozen=True)
class DiffusionScheduler(BetaScheduler):
    """Base of DDPM, DDIM and the consistency samplers, which work with timesteps rather than sigmas."""

    clip_sample: bool = True
    clip_sample_range: float = 1.0
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    rescale_betas_zero_snr: bool = False
    custom_timesteps: tuple[int, ...] | None = dataclasses.field(default=None, kw_only=True)

    def steps(self, num_inference_steps: int) -> int:
        own = self._custom("custom_timesteps")
        return self._check_steps(num_inference_steps, most=self._most()) if own is None else len(own)

    def _visited(self, num_inference_steps: int) -> np.ndarray:
        """Descending int timesteps `[steps]`."""
        own = self._custom("custom_timesteps")
        return self._spaced(self.steps(num_inference_steps)) if own is None else own.astype(np.int64)

    def _most(self) -> int:
        """Steps that can be asked for."""
        return MAX_STEPS

    def _spaced(self, steps: int) -> np.ndarray:
        return self._within(spaced_timesteps(self.timestep_spacing, steps, self.num_train_timesteps, self.steps_offset))


def vp_levels(alpha: np.ndarray) -> np.ndarray:
    """Return factors of signal and noise `[n, 2]` of variance-preserving samples, from cumulative products `[n]`."""
    return np.stack([np.sqrt(alpha), np.sqrt(1 - alpha)], axis=1)
