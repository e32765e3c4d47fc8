"""Validation of configuration values by the types of dataclass fields."""

from __future__ import annotations

import dataclasses
import math
import numbers
import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from kandinsky_jax.common.errors import quote

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Bounds = Mapping[str, tuple[float, float]]  # least and largest value of a field, or of each item of one that is a tuple

_KINDS: dict[str, tuple[str, type[Any]]] = {
    "bool": ("true or false", bool),
    "int": ("a whole number", numbers.Integral),
    "float": ("a number", numbers.Real),
    "str": ("a text", str),
}
_TUPLE = re.compile(r"tuple\[(\w+), \.\.\.\]")


def field_faults(
    config: DataclassInstance, bounds: Bounds, skipped: Collection[str] = (), infinite: Collection[str] = ()
) -> list[str]:
    """List faults of the values of a dataclass's fields.

    Args:
        config: of a module with `from __future__ import annotations`; fields of other types than bool, int, float, str,
            tuples of one of these, and each of them or None, are not looked at.
        bounds: by the names of fields.
        skipped: fields that are not checked.
        infinite: fields that may be infinite.
    """
    faults = []
    for field in dataclasses.fields(config):
        if field.name in skipped:
            continue
        value, kind = getattr(config, field.name), str(field.type)
        if kind.endswith(" | None"):
            if value is None:
                continue
            kind = kind.removesuffix(" | None")
        items = [value]
        if found := _TUPLE.fullmatch(kind):
            kind = found[1]
            if not isinstance(value, tuple):
                faults.append(f"{field.name} must be a list, got {quote(value)}")
                continue
            items = list(value)
        if kind in _KINDS:
            allowed = bounds.get(field.name, (-math.inf, math.inf))
            wrong = (_fault(item, kind, allowed, field.name in infinite) for item in items)
            faults += [f"{field.name} {fault}" for fault in wrong if fault][:1]
    return faults


def _fault(value: Any, kind: str, allowed: tuple[float, float], infinite: bool) -> str | None:
    words, cls = _KINDS[kind]
    if not isinstance(value, cls) or (kind != "bool" and isinstance(value, bool)):
        return f"must be {words}, got {quote(value)}"
    if kind in ("int", "float"):
        if kind == "float" and not infinite and not abs(value) < math.inf:
            return f"must be finite, got {value}"
        if not allowed[0] <= value <= allowed[1]:
            return f"must be from {allowed[0]:g} to {allowed[1]:g}, got {quote(value, 40)}"
    return None
