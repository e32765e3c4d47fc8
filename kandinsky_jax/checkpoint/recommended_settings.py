"""Settings that a model's makers recommend: a file beside `model_index.json`, which diffusers ignores.

The command line and batch jobs use them where the user says nothing; pipelines keep diffusers' defaults.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kandinsky_jax.common.errors import CheckpointError, quote
from kandinsky_jax.common.reading import ReadError, of_file, read_json_object
from kandinsky_jax.schedulers import NAMES, SchedulerError, scheduler_named

FILE = "recommended_settings.json"
FORMAT_VERSION = 2  # with a fast adapter; 1 without one, which older releases read too
MAX_STEPS, MAX_SCALE, SIDES = 1000, 100.0, (64, 8192)
MAX_BYTES = 1 << 16  # of the file
_LORA_FILE = re.compile(r"\w[\w .+-]{0,180}\.(safetensors|bin)")  # no path, and nothing that a pattern could match


@dataclasses.dataclass(frozen=True)
class FastSettings:
    """Fast adapters, LoRA files distilled for few steps, and the settings that they were made for.

    Args:
        lora: file of the adapter in the model's folder, for its UNet or, in the folder of a prior, for the prior.
        prior_lora: the same for the prior of a combined pipeline in one folder.
        num_inference_steps, prior_num_inference_steps, guidance_scale, prior_guidance_scale, scheduler: as in
            `RecommendedSettings`.
    """

    lora: str | None = None
    prior_lora: str | None = None
    num_inference_steps: int | None = None
    prior_num_inference_steps: int | None = None
    guidance_scale: float | None = None
    prior_guidance_scale: float | None = None
    scheduler: str | None = None

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of a combined pipeline's call, without the scheduler."""
        return {name: value for name, value in self.given().items() if name != "scheduler"}

    def given(self) -> dict[str, Any]:
        """Return the settings that are given, without the files."""
        return {name: value for name, value in _given(self).items() if name not in ("lora", "prior_lora")}

    def prior_arguments(self) -> dict[str, Any]:
        """Return those arguments that are the prior's."""
        return {name: value for name, value in self.arguments().items() if name.startswith("prior_")}


@dataclasses.dataclass(frozen=True)
class RecommendedSettings:
    """Settings of a combined call; None where the model recommends none.

    Args:
        num_inference_steps, prior_num_inference_steps: of the decoder, 1..1000, and the prior, 2..1000.
        guidance_scale, prior_guidance_scale: of the decoder and the prior, 0..100.
        height, width: of the pictures in pixels, 64..8192.
        scheduler: a short name of the decoder's, see `kandinsky_jax.scheduler_named`.
        fast: the model's fast adapter, see `Pipeline.load_fast`.
    """

    num_inference_steps: int | None = None
    prior_num_inference_steps: int | None = None
    guidance_scale: float | None = None
    prior_guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    scheduler: str | None = None
    fast: FastSettings | None = None

    def arguments(self) -> dict[str, Any]:
        """Return the recommended arguments of a combined pipeline's call, without the scheduler."""
        return {name: value for name, value in _given(self).items() if name not in ("scheduler", "fast")}

    def prior_arguments(self) -> dict[str, Any]:
        """Return those arguments that are the prior's."""
        return {name: value for name, value in self.arguments().items() if name.startswith("prior_")}

    def with_prior(self, prior: RecommendedSettings) -> RecommendedSettings:
        """Return the settings with a prior that has its own: those of the prior, else these."""
        return dataclasses.replace(self, **prior.prior_arguments())

    def with_fast(self, fast: FastSettings) -> RecommendedSettings:
        """Return the settings of the model with its fast adapter: those of the adapter, else its own."""
        return dataclasses.replace(self, **fast.given())


def _given(settings: FastSettings | RecommendedSettings) -> dict[str, Any]:
    """Return the fields that are not None, by name."""
    names = [field.name for field in dataclasses.fields(settings)]
    return {name: value for name in names if (value := getattr(settings, name)) is not None}


NO_SETTINGS = RecommendedSettings()
# What commands and batch jobs use where neither the user nor the model says anything.
USUAL_STEPS, USUAL_PRIOR_STEPS, USUAL_SCALE = 50, 25, 4.0
FALLBACK = RecommendedSettings(USUAL_STEPS, USUAL_PRIOR_STEPS, USUAL_SCALE, USUAL_SCALE)
# The settings by the names of options of commands, and of columns of batch jobs.
BY_OPTION = {
    "steps": "num_inference_steps",
    "prior_steps": "prior_num_inference_steps",
    "guidance_scale": "guidance_scale",
    "prior_guidance_scale": "prior_guidance_scale",
}


def default_text(option: str) -> str:
    """Return what the help of an option says of its default."""
    return f"default: the model's own, else {getattr(FALLBACK, BY_OPTION[option])}"


def read(folder: str | os.PathLike[str]) -> RecommendedSettings:
    """Read the recommended settings of a model's folder; all None where it has no such file.

    Raises:
        CheckpointError: listing everything that is wrong with the file.
    """
    path = Path(folder) / FILE
    if not os.path.lexists(path):
        return NO_SETTINGS
    try:
        content = read_json_object(path, MAX_BYTES)
    except FileNotFoundError:
        raise CheckpointError(of_file(path, "is a link to nothing")) from None
    except ReadError as error:
        raise CheckpointError(of_file(path, error)) from None
    faults = []
    version = content.get("format_version")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        given = "is missing" if version is None else f"is {quote(version)}"
        faults.append(f"format_version {given}, this release knows 1 to {FORMAT_VERSION}")
    known, found = _checked(RecommendedSettings, content, ("format_version",))
    faults += found
    if isinstance(table := known.get("fast"), dict):
        if version == 1:
            faults.append(f"fast needs a format_version of {FORMAT_VERSION}")
        fast, found = _checked(FastSettings, table)
        if not any(table.get(name) is not None for name in ("lora", "prior_lora")):
            found.append("lora is missing, the adapter's file")
        faults += [f"fast: {fault}" for fault in found]
        known["fast"] = FastSettings(**fast)
    if faults:
        raise CheckpointError(of_file(path, f"is not valid: {'; '.join(faults)}"))
    return RecommendedSettings(**known)


def of_model(folders: Sequence[Path]) -> RecommendedSettings:
    """Read the settings of a combined call: the decoder's, and what the folder of its prior says of the prior.

    Args:
        folders: of the decoder and of its prior, or one that has both, see `hub.with_prior`.
    Raises:
        CheckpointError: as `read`.
    """
    decoder, *prior = map(read, folders)
    return decoder.with_prior(prior[0]) if prior else decoder


def lora_files(folder: str | os.PathLike[str]) -> list[str]:
    """Return the names of the LoRA files that a model's folder has by its settings; none where they are not valid."""
    try:
        fast = read(folder).fast
    except CheckpointError:  # which is the business of those who ask for the settings
        return []
    return [] if fast is None else [name for name in (fast.lora, fast.prior_lora) if name is not None]


def _checked(
    settings: type[RecommendedSettings] | type[FastSettings], content: Mapping[str, Any], others: Iterable[str] = ()
) -> tuple[dict[str, Any], list[str]]:
    """Return the settings in a table that are given, and everything that is wrong with them."""
    names = [field.name for field in dataclasses.fields(settings)]
    known = {name: content[name] for name in names if content.get(name) is not None}
    faults = []
    if unknown := [name for name in content if name not in (*names, *others)]:
        faults.append(f"{quote(unknown)} are not settings; there are {', '.join(names)}")
    return known, faults + [fault for name, value in known.items() if (fault := _fault(name, value))]


def _fault(name: str, value: object) -> str | None:
    """Return what is wrong with a setting, None for nothing."""
    if name == "fast":
        return None if isinstance(value, dict) else f"fast is {quote(value)}, needed is an object"
    if name in ("lora", "prior_lora"):
        valid = isinstance(value, str) and _LORA_FILE.fullmatch(value) is not None
        needed = "the name of a .safetensors or .bin file in the model's folder"
        return None if valid else f"{name} is {quote(value)}, needed is {needed}"
    if name == "scheduler":
        try:
            scheduler_named(str(value), {})
        except SchedulerError:
            return f"scheduler is {quote(value)}, needed is a short name such as {', '.join(list(NAMES)[:3])}"
        return None
    whole = name not in ("guidance_scale", "prior_guidance_scale")
    least = 2 if name == "prior_num_inference_steps" else 1
    low, high = SIDES if name in ("height", "width") else (least, MAX_STEPS) if whole else (0.0, MAX_SCALE)
    kind = "a whole number" if whole else "a number"
    valid = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not valid or not low <= value <= high:  # type: ignore[operator]
        return f"{name} is {quote(value)}, needed is {kind} from {low} to {high}"
    return None


def write(settings: RecommendedSettings, folder: Path) -> None:
    """Write the file into a model's folder, without the LoRA files that it names; nothing for no settings."""
    if found := _given(settings):
        version = 1 if settings.fast is None else FORMAT_VERSION
        if settings.fast is not None:
            found["fast"] = _given(settings.fast)
        content = {"format_version": version} | found
        (folder / FILE).write_text(json.dumps(content, indent=2) + "\n")
