"""Settings in pictures: what the server writes into them, and what a picture given to the server tells of its own.

The formats are those of `kandinsky_jax.picture_records`. Files come from anywhere, so what is read is checked value by
value; nothing in them is opened, and a value that no request could have is left out.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Any, TypeGuard

from PIL import Image

from kandinsky_jax import images
from kandinsky_jax.common.errors import quote, shorten
from kandinsky_jax.picture_records import (
    Parameters,
    SettingsError,
    flat_record,
    parameters_text,
    parse_parameters,
    read_texts,
    solver_and_schedule,
)
from kandinsky_jax.pipelines.modes import MODES
from kandinsky_jax.schedulers import SchedulerError, scheduler_named
from kandinsky_jax.serve.requests import MIX, VARY

__all__ = ["SettingsError", "encode_image", "parameters_text", "read_settings", "unused_parameters"]

MAX_ITEMS = 16  # of a mix
MAX_LORAS = 32
MAX_COUNT = 10_000  # of steps, and of pictures
PICTURE_FORMATS = ("PNG", "JPEG", "WEBP")
_DIGITS = re.compile(r"[0-9]{1,19}")
_DECIMAL = re.compile(r"[0-9]{1,12}(\.[0-9]{1,20})?")
_SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})")


def encode_image(picture: Image.Image, record: Mapping[str, object], ending: str, quality: int | None = None) -> bytes:
    """Encode a picture as the bytes of a file that carries its settings.

    Args:
        record: of `ImageRequest.record`.
        ending: "png", "jpeg", "jpg" or "webp".
        quality: of JPEG and WebP, 1..100; None is 95.
    Raises:
        ValueError: for another ending or quality.
    """
    if ending not in images.ENCODINGS:
        raise ValueError(f"{quote(ending, 40)} is no format of pictures; there are {', '.join(images.ENCODINGS)}")
    if quality is not None and not 1 <= quality <= 100:
        raise ValueError(f"quality is {quality}, needed are 1 to 100")
    return images.encode(picture, ending, record, quality)


def read_settings(picture: Image.Image | bytes) -> dict[str, Any]:
    """Return the fields of `ImageRequest` that a picture tells; empty for one without settings.

    Our record is read where it is there, else the `parameters` of this or another tool. Values have the types and
    ranges of `ImageRequest`; whether a server takes them (LoRA files, sizes, limits) is for `ServedModel.complete`.
    Pictures are not in it: the mode says which have to be given again, and in the `items` of a mix they are None.

    Args:
        picture: as Pillow opened it, or a PNG, JPEG or WebP file's bytes.
    Raises:
        SettingsError: for what is no such picture, or whose settings are too long; no other error.
    """
    try:
        if isinstance(picture, Image.Image):
            record, parameters = read_texts(picture)
        else:
            with Image.open(io.BytesIO(picture), formats=PICTURE_FORMATS) as opened:
                record, parameters = read_texts(opened)
    except SettingsError:
        raise
    except Exception as error:  # Pillow's readers raise many kinds for damaged data
        fault = shorten(str(error), 150) or type(error).__name__
        raise SettingsError(f"this cannot be read as a picture of PNG, JPEG or WebP: {fault}") from None
    if record is not None:
        return _of_record(record)
    return {} if parameters is None else _of_parameters(parse_parameters(parameters))


# Our records ------------------------------------------------------------------------------------------------------


def _of_record(record: Mapping[str, object]) -> dict[str, Any]:
    facts = flat_record(record)
    found = {name: value for name, check in CHECKS.items() if (value := check(facts.get(name))) is not None}
    found |= _items(facts.get("items"), facts.get("weights"))
    if loras := _loras(facts.get("loras")):
        found["loras"] = loras
    found.setdefault("mode", _mode_of_command(record))
    if found["mode"] == MIX:
        found.pop("prompt", None)
    # The command line tells which picture it is, not how many there were: picture i is the last of i + 1.
    index = facts.get("image")
    if "num_images" not in found and not found.get("torch_noise") and _is_whole(index) and 0 < index < MAX_COUNT:
        found["num_images"] = index + 1
    return found


def _mode_of_command(record: Mapping[str, object]) -> str:
    """Return the mode of a picture of the command line, by what its record has."""
    if "items" in record:
        return MIX
    files = record.get("files")
    given = set(files) if isinstance(files, Mapping) else set()
    if given == {"image"} and "prior" in record:
        return VARY
    return next((mode.name for mode in MODES.values() if set(mode.pictures) == given), "generate")


def _text(value: object) -> str | None:
    """Return text that UTF-8 can hold."""
    if not isinstance(value, str):
        return None
    try:
        value.encode()
    except UnicodeEncodeError:
        return None
    return value


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _whole(least: int, most: int) -> Callable[[object], int | None]:
    return lambda value: value if _is_whole(value) and least <= value <= most else None


def _real(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= 1e6:
        return None
    return float(value)


def _strength(value: object) -> float | None:
    number = _real(value)
    return number if number is not None and 0 < number <= 1 else None


def _flag(value: object) -> bool | None:
    return value if isinstance(value, bool) else None


def _mode(value: object) -> str | None:
    return value if isinstance(value, str) and value in (*MODES, MIX, VARY) else None


def _scheduler(value: object) -> str | None:
    if not isinstance(value, str):
        return None
    try:
        scheduler_named(value, {})
    except SchedulerError:
        return None
    return value


CHECKS: dict[str, Callable[[object], Any]] = {
    "mode": _mode,
    "prompt": _text,
    "negative_prompt": _text,
    "strength": _strength,
    "height": _whole(64, images.MAX_FITTING),
    "width": _whole(64, images.MAX_FITTING),
    "num_images": _whole(1, MAX_COUNT),
    "seed": _whole(0, 2**63 - 1),
    "num_inference_steps": _whole(1, MAX_COUNT),
    "guidance_scale": _real,
    "prior_num_inference_steps": _whole(1, MAX_COUNT),
    "prior_guidance_scale": _real,
    "scheduler": _scheduler,
    "fast": _flag,
    "torch_noise": _flag,
    "paste_back": _flag,
}


def _items(items: object, weights: object) -> dict[str, Any]:
    """Return the items of a mix, None for a picture, and their weights."""
    if not isinstance(items, list) or not isinstance(weights, list) or not 0 < len(items) == len(weights) <= MAX_ITEMS:
        return {}
    texts, numbers = [_text(item) for item in items], [_real(weight) for weight in weights]
    if None in texts or None in numbers:
        return {}
    return {"items": tuple(None if _is_picture(text) else text for text in texts), "weights": tuple(numbers)}


def _is_picture(item: str | None) -> bool:
    """Whether an item of a record stands for a picture; of the command line, it is a file's name."""
    return item is None or item == "(picture)" or PurePath(item).suffix.lower() in images.WRITABLE


def _loras(value: object) -> dict[str, float]:
    if not isinstance(value, dict) or len(value) > MAX_LORAS:
        return {}
    weights = {name: _real(weight) for name, weight in value.items() if _text(name)}
    return {name: weight for name, weight in weights.items() if weight is not None}


# Parameters of any tool -------------------------------------------------------------------------------------------


USED = (  # names of their fields
    *("Mode", "Steps", "CFG scale", "Prior steps", "Prior CFG scale", "Seed", "Size", "Denoising strength"),
    *("Sampler", "Schedule type"),
)


def _of_parameters(parameters: Parameters) -> dict[str, Any]:
    fields = parameters.fields
    size = _SIZE.fullmatch(fields.get("Size", ""))
    upscaled = any(name.startswith("Hires") for name in fields)  # whose strength is another
    told: dict[str, object] = {
        "mode": fields.get("Mode"),
        "prompt": parameters.prompt,
        "negative_prompt": parameters.negative_prompt or None,
        "num_inference_steps": _integer(fields.get("Steps", "")),
        "guidance_scale": _decimal(fields.get("CFG scale", "")),
        "prior_num_inference_steps": _integer(fields.get("Prior steps", "")),
        "prior_guidance_scale": _decimal(fields.get("Prior CFG scale", "")),
        "seed": _integer(fields.get("Seed", "")),
        "width": int(size[1]) if size else None,
        "height": int(size[2]) if size else None,
        "strength": None if upscaled else _decimal(fields.get("Denoising strength", "")),
        "scheduler": _sampler(fields.get("Sampler", ""), fields.get("Schedule type", "")),
    }
    return {name: value for name, given in told.items() if (value := CHECKS[name](given)) is not None}


def unused_parameters(text: str) -> list[str]:
    """Return the names of the settings in a `parameters` text that `read_settings` takes nothing from."""
    fields = parse_parameters(text).fields
    upscaled = any(name.startswith("Hires") for name in fields)
    return [name for name in fields if name not in USED or (upscaled and name == "Denoising strength")]


def _integer(text: str) -> int | None:
    return int(text) if _DIGITS.fullmatch(text) else None


def _decimal(text: str) -> float | None:
    return float(text) if _DECIMAL.fullmatch(text) and math.isfinite(float(text)) else None


def _sampler(sampler: str, schedule_type: str) -> str | None:
    """Return our name of a sampler, without its schedule where ours has no such; our own names read as themselves."""
    if (found := solver_and_schedule(sampler, schedule_type)) is None:
        return sampler
    solver, schedule = found
    return name if schedule and _scheduler(name := f"{solver}-{schedule}") else solver
