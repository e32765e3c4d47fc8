"""Guiders by short names, as pipelines, commands and batch jobs take them."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from typing import Any

from kandinsky_jax.common.errors import quote
from kandinsky_jax.diffusion.guidance import ClassifierFreeGuidance, Guider
from kandinsky_jax.diffusion.guiders import (
    AdaptiveProjectedGuidance,
    Autoguidance,
    CFGPlusPlus,
    PerturbedAttentionGuidance,
    RescaledGuidance,
)

GUIDERS: dict[str, type[Any]] = {
    "cfg": ClassifierFreeGuidance,
    "rescaled-cfg": RescaledGuidance,
    "apg": AdaptiveProjectedGuidance,
    "cfg++": CFGPlusPlus,
    "autoguidance": Autoguidance,
    "pag": PerturbedAttentionGuidance,
}
TEXTS = ("layers", "model")  # settings that are no numbers
# Least and largest values of settings; all others are any number up to `LARGEST`.
RANGES: dict[str, tuple[float, float]] = {
    "rescale": (0, 1),
    "momentum": (-1, 1),
    "norm_threshold": (0, math.inf),
    "perturbed_scale": (0, math.inf),
}
LAMBDA = (0, 1)  # of cfg++
LARGEST = 1e30  # of other settings; float32 ends at 3e38


def guider_named(text: str, scale: float | None = None) -> Guider:
    """Build a guider from its name and settings, such as "apg" or "apg:scale=8,momentum=-0.75".

    Args:
        text: a key of `GUIDERS`, and settings behind a colon: fields of its class, with commas between.
        scale: for a guider whose text has none; None is the class's own.
    Raises:
        ValueError: for another name, or settings that it does not have or that are out of range.
    """
    name, colon, rest = text.partition(":")
    if name not in GUIDERS:
        raise ValueError(f"there is no guider {quote(name)}; {_nearest(name)}")
    cls = GUIDERS[name]
    known = [field.name for field in dataclasses.fields(cls) if field.name != "condition"]
    given: set[str] = set()
    settings: dict[str, Any] = {} if scale is None else {"scale": scale}
    for part in re.split(r",(?=\w+=)", rest) if colon else []:
        key, equals, value = part.partition("=")
        if not equals or key not in known:
            raise ValueError(
                f"guider {quote(text)}: {quote(part)} is no setting of {name}; needed is NAME=VALUE, of "
                f"{', '.join(known)}"
            )
        if key in given:
            raise ValueError(f"guider {quote(text)}: {key} is given twice")
        given.add(key)
        settings[key] = _text(key, value) if key in TEXTS else _number(text, key, value)
    for key, value in settings.items():
        low, high = LAMBDA if cls is CFGPlusPlus and key == "scale" else RANGES.get(key, (-LARGEST, LARGEST))
        if key not in TEXTS and not low <= value <= high:
            raise ValueError(
                f"guider {quote(text)}: {key} is {value:g}, needed is {_range(low, high)}{_hint(cls, key)}"
            )
    if cls is Autoguidance and not settings.get("model"):
        raise ValueError(
            "the guider autoguidance needs a weaker model, an earlier checkpoint or a smaller one: "
            "autoguidance:model=FOLDER"
        )
    return cls(**settings)


def _nearest(name: str) -> str:
    if name == "interval":
        return "guidance in some of the steps is guidance_interval=(0.4, 1), with any guider"
    close = difflib.get_close_matches(name.replace("pp", "++"), GUIDERS, 1)
    return f"{f'did you mean {close[0]!r}? ' if close else ''}there are {', '.join(GUIDERS)}"


def _text(key: str, value: str) -> str:
    if key == "layers":
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"layers must be a regular expression, got {quote(value)}: {error}") from None
    return value


def _number(text: str, key: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if math.isnan(number) or (math.isinf(number) and key != "norm_threshold"):
        raise ValueError(f"guider {quote(text)}: {key} must be a finite number, got {quote(value)}")
    return number


def _range(low: float, high: float) -> str:
    return f"{low:g} or more" if math.isinf(high) else f"{low:g} to {high:g}"


def _hint(cls: type[Any], key: str) -> str:
    if cls is CFGPlusPlus and key == "scale":
        return "; about a twelfth of cfg's: give a guidance scale such as 0.6, or cfg++:scale=0.6"
    return ""
