"""Settings that a model's makers recommend: a file beside `model_index.json`, which diffusers ignores.

The command line and batch jobs use them where the user says nothing; pipelines keep diffusers' defaults.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from kandinsky_jax.common.errors import CheckpointError, quote
from kandinsky_jax.common.reading import ReadError, of_file, read_json_object
from kandinsky_jax.schedulers import NAMES, SchedulerError, scheduler_named

FILE = "recommended_settings.json"
FORMAT_VERSION = 1
MAX_STEPS, MAX_SCALE, SIDES = 1000, 100.0, (64, 8192)
MAX_BYTES = 1 << 16  # of the file


@dataclasses.dataclass(frozen=True)
class RecommendedSettings:
    """Settings of a combined call; None where the model recommends none.

    Args:
        num_inference_steps, prior_num_inference_steps: of the decoder, 1..1000, and the prior, 2..1000.
        guidance_scale, prior_guidance_scale: of the decoder and the prior, 0..100.
        height, width: of the pictures in pixels, 64..8192.
        scheduler: a short name of the decoder's, see `kandinsky_jax.scheduler_named`.
    """

    num_inference_steps: int | None = None
    prior_num_inference_steps: int | None = None
    guidance_scale: float | None = None
    prior_guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    scheduler: str | None = None

    def arguments(self) -> dict[str, Any]:
        """Return the recommended arguments of a combined pipeline's call, without the scheduler."""
        found = dataclasses.asdict(self)
        del found["scheduler"]
        return {name: value for name, value in found.items() if value is not None}


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
    if type(version := content.get("format_version")) is not int or version != FORMAT_VERSION:
        given = "is missing" if version is None else f"is {quote(version)}"
        faults.append(f"format_version {given}, this release knows {FORMAT_VERSION}")
    names = [field.name for field in dataclasses.fields(RecommendedSettings)]
    known: dict[str, Any] = {name: content[name] for name in names if content.get(name) is not None}
    if unknown := [name for name in content if name not in (*names, "format_version")]:
        faults.append(f"{quote(unknown)} are not settings; there are {', '.join(names)}")
    faults += [fault for name, value in known.items() if (fault := _fault(name, value))]
    if faults:
        raise CheckpointError(of_file(path, f"is not valid: {'; '.join(faults)}"))
    return RecommendedSettings(**known)


def _fault(name: str, value: object) -> str | None:
    """Return what is wrong with a setting, None for nothing."""
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
    """Write the file into a model's folder; nothing where no setting is recommended."""
    found = {name: value for name, value in dataclasses.asdict(settings).items() if value is not None}
    if found:
        content = {"format_version": FORMAT_VERSION} | found
        (folder / FILE).write_text(json.dumps(content, indent=2) + "\n")
