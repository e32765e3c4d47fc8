"""Members of diffusers' schedulers besides the solver: files, configurations, and errors for unsupported members."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from kandinsky_jax.common.atomic import replace_file
from kandinsky_jax.common.attribute_dict import AttributeDict
from kandinsky_jax.common.errors import shorten
from kandinsky_jax.common.reading import of_file
from kandinsky_jax.schedulers.noise_schedule import SchedulerError

UNSET = "_use_default_values"  # diffusers' name for the fields that a configuration did not name
# Ours: diffusers takes these as arguments of `step` or `set_timesteps`. Saved only where they are set.
STEP_ARGUMENTS = frozenset({"eta", "use_clipped_model_output", "custom_timesteps", "custom_sigmas", "tau_func"})

HOOKS: dict[str, Callable[..., Any]] = {}  # load_config and saved, which kandinsky_jax.checkpoint.pretrained puts here

_SCHEDULE = "a scheduler has no state here: schedule = scheduler.schedule(num_inference_steps) has"
_TABLE = f"{_SCHEDULE} every step's coefficients in schedule.table"
_FILES = "from_pretrained and save_pretrained read and write scheduler_config.json, from_config takes a dictionary"
# Members of diffusers' schedulers that have no use here, and what to write instead.
INSTEAD: dict[str, str] = {
    "set_timesteps": f"{_SCHEDULE} timesteps; timesteps or sigmas of your own are the fields custom_timesteps and "
    "custom_sigmas",
    "timesteps": f"{_SCHEDULE} timesteps",
    "num_inference_steps": f"{_SCHEDULE} timesteps, len(schedule) of them",
    "init_noise_sigma": f"{_SCHEDULE} init_noise_sigma",
    "sigmas": f"{_SCHEDULE} levels, the signal and noise of each step",
    "step": f"{_TABLE}, and kandinsky_jax.pipelines.denoising steps through it",
    "scale_model_input": f"{_SCHEDULE} table.input_scale",
    "set_begin_index": "give begin= to scheduler.schedule(num_inference_steps, begin)",
    "push_to_hub": "call save_pretrained(FOLDER), then `hf upload OWNER/NAME FOLDER`",
    "register_for_auto_class": "import your class, no code of a repository is run",
    "register_to_config": "fields are given to the constructor, and dataclasses.replace changes them",
    "extract_init_dict": _FILES,
    "get_config_dict": _FILES,
    **dict.fromkeys(
        "alphas begin_index betas convert_model_output counter cur_model_output cur_sample derivatives dt ets "
        "final_alpha_cumprod index_for_timestep is_scale_input_called lambda_t last_sample log_sigmas lower_order_nums "
        "model_outputs alpha_t one order_list plms_timesteps pndm_order predict_x0 prev_derivative previous_timestep "
        "prk_timesteps sample sigma_t sigmas_down sigmas_interpol sigmas_up state_in_first_order step_index "
        "step_plms step_prk stretch_shift_to_terminal time_shift timestep_list get_order_list get_lms_coefficient "
        "get_coefficients_exponential_negative get_coefficients_exponential_positive get_coefficients_fn "
        "get_scalings_for_boundary_condition_discrete lagrange_polynomial_coefficient".split(),
        _TABLE,
    ),
}


class SchedulerMixin:
    """Members of diffusers' `SchedulerMixin` and `ConfigMixin`."""

    config_name: ClassVar[str] = "scheduler_config.json"
    ignore_for_config: ClassVar[tuple[str, ...]] = ()
    order: ClassVar[int] = 1  # evaluations of the network per step, as diffusers' pipelines count them

    num_train_timesteps: int
    unset: frozenset[str] | None
    if TYPE_CHECKING:
        from_config: ClassVar[Callable[..., Any]]

        @property
        def config(self) -> AttributeDict: ...

    def __len__(self) -> int:
        """The timesteps of training, as in diffusers."""
        return self.num_train_timesteps

    def __getattr__(self, name: str) -> object:
        instead = INSTEAD.get(name) or (_TABLE if name.endswith("_update") else "")
        raise AttributeError(
            f"{type(self).__name__} has no {shorten(name, 80)!r}" + (f": {instead}" if instead else "")
        )

    @property
    def has_compatibles(self) -> bool:
        """Whether other schedulers can be made from this one's configuration."""
        return bool(self.compatibles)

    @property
    def compatibles(self) -> list[type[SchedulerMixin]]:
        """The classes whose `from_config` takes this scheduler's configuration."""
        from kandinsky_jax.schedulers.base import BetaScheduler
        from kandinsky_jax.schedulers.names import SCHEDULERS

        known: list[type[SchedulerMixin]] = [cls for cls in SCHEDULERS.values() if issubclass(cls, BetaScheduler)]
        return known if isinstance(self, BetaScheduler) else []

    @classmethod
    def load_config(cls, name: str | os.PathLike[str], subfolder: str | None = None, **options: Any) -> Any:
        """Load `scheduler_config.json`; arguments and errors: see `from_pretrained`."""
        return HOOKS["load_config"](name, cls.config_name, subfolder=subfolder, **options)

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        subfolder: str | None = None,
        return_unused_kwargs: bool = False,
        **changes: Any,
    ) -> Self:
        """Build the scheduler from a `scheduler_config.json`.

        Args:
            name: a scheduler's folder, that of a model, a Hub repository, or an embedded model such as
                "tiny/kandinsky-2-2-decoder".
            subfolder: of the scheduler, such as "scheduler".
            return_unused_kwargs: whether to return the scheduler and those of `changes` that are not fields of it.
            changes: fields to change, see `from_config`; also revision, cache_dir, token, local_files_only and
                force_download of `kandinsky_jax.checkpoint.hub.HubOptions`.
        Raises:
            SchedulerError: for a configuration that is not supported.
            CheckpointError: for a missing or damaged file, or an unknown folder or repository.
        """
        options = {key: changes.pop(key) for key in _HUB_OPTIONS if key in changes}
        config = cls.load_config(name, subfolder, **options)
        try:
            return cls.from_config(config, return_unused_kwargs=return_unused_kwargs, **changes)
        except SchedulerError as error:
            raise SchedulerError(of_file(Path(name) / (subfolder or "") / cls.config_name, error)) from None

    def _saved(self) -> dict[str, object]:
        """The configuration as it is written to a file."""
        named: dict[str, object] = {"_class_name": type(self).__name__}
        for name, value in self.config.items():
            if callable(value):
                raise SchedulerError(f"{name} of {type(self).__name__} is a function, which no file can hold")
            if name not in (UNSET, "_class_name") and not (name in STEP_ARGUMENTS and name in (self.unset or ())):
                named[name] = value
        return named

    def to_json_string(self) -> str:
        """The configuration as JSON, for this library or diffusers."""
        try:
            return json.dumps(self._saved(), indent=2, sort_keys=True) + "\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise SchedulerError(
                f"the configuration of {type(self).__name__} cannot be written as JSON: {shorten(str(error), 200)}"
            ) from None

    def to_json_file(self, path: str | os.PathLike[str]) -> None:
        """Write the configuration to a file."""
        replace_file(Path(path), self.to_json_string().encode())

    def save_pretrained(self, folder: str | os.PathLike[str], push_to_hub: bool = False, **_: object) -> None:
        """Write `scheduler_config.json`, for this library or diffusers, into `folder`, created if missing."""
        if push_to_hub:
            raise NotImplementedError(f"push_to_hub is not supported: {INSTEAD['push_to_hub']}")
        text = self.to_json_string()
        Path(folder).mkdir(parents=True, exist_ok=True)
        replace_file(Path(folder) / self.config_name, text.encode())
        HOOKS["saved"](folder)

    def save_config(self, folder: str | os.PathLike[str], push_to_hub: bool = False, **_: object) -> None:
        """Alias, as in diffusers."""
        self.save_pretrained(folder, push_to_hub)


_HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only", "force_download")
