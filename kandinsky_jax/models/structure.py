"""The variables of a network, found in a fraction of the time that Flax takes.

Flax walks over graphs of any objects. A network is a tree of modules, whose attributes are modules, variables and
constants; every call of a pipeline looks for the parameters of up to five. What is no such tree is left to Flax.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx

N = TypeVar("N", bound=nnx.Module)


@dataclass
class Structure:
    """What a network consists of.

    Attributes:
        variables: by dotted names, in the order of the attributes.
        others: the values of all other attributes, modules included, and the variables' types.
        plain: whether this is all: no variable or module in two places, nothing else that holds arrays or an owner.
    """

    variables: dict[str, nnx.Variable] = field(default_factory=dict)
    others: list[object] = field(default_factory=list)
    plain: bool = True


def value_of(variable: nnx.Variable) -> object:
    """Return a variable's value, in a fraction of the time of `get_value` where it is an array and nothing else."""
    raw = variable.get_raw_value()
    kind = type(raw)
    if (plain := _arrays.get(kind)) is None:
        # A tracer may be one of a reference.
        plain = _arrays[kind] = issubclass(kind, jax.Array) and not isinstance(raw, jax.core.Tracer | jax.Ref)
    return raw if plain and not variable.has_metadata("on_get_value") else variable.get_value()


def structure(module: nnx.Module) -> Structure:
    """Walk over a network and the modules within it."""
    found = Structure()
    _walk(module, "", found, {id(module)})
    return found


class Identities:
    """Objects to recognise later; modules by weak references, so that a replaced one's arrays are freed."""

    def __init__(self, values: Iterable[object]):
        self._values = [weakref.ref(value) if _kind_of(value) == _MODULE else value for value in values]

    def are(self, values: list[object]) -> bool:
        """Return whether these are the same objects in the same order."""
        return len(values) == len(self._values) and all(
            kept is value or (type(kept) is weakref.ref and kept() is value)
            for kept, value in zip(self._values, values, strict=True)
        )


_MODULE, _VARIABLE, _OTHER, _CONSTANT = range(4)
# Other nodes and containers; and methods, which may be those of the network's owner and would keep it.
_LEFT_TO_FLAX = (nnx.Pytree, jax.Array, np.ndarray, list, dict, set, types.MethodType, functools.partial)
_arrays: dict[type, bool] = {}  # whether a type of values is of plain arrays
_kinds: dict[type, int] = {}  # isinstance is slow for Flax's classes, and a UNet has thousands of attributes


def _walk(module: nnx.Module, prefix: str, found: Structure, seen: set[int]) -> None:
    for name, value in list(vars(module).items()):  # a copy, in case another thread adds one
        kind = _kind_of(value)
        found.others.append(type(value) if kind == _VARIABLE else value)
        if kind in (_MODULE, _VARIABLE):
            if id(value) in seen:
                found.plain = False
                continue
            seen.add(id(value))
        if kind == _VARIABLE:
            found.variables[prefix + name] = value
        elif kind == _MODULE:
            _walk(value, f"{prefix}{name}.", found, seen)
        elif kind == _OTHER:
            found.plain = False


def _kind_of(value: object) -> int:
    kind = _kinds.get(type(value))
    if kind is None:
        kind = _kinds[type(value)] = _new_kind(value)
    return kind


def _new_kind(value: object) -> int:
    if isinstance(value, nnx.Module):
        return _MODULE
    if isinstance(value, nnx.Variable):
        return _VARIABLE
    return _OTHER if isinstance(value, _LEFT_TO_FLAX) else _CONSTANT


# Modules ----------------------------------------------------------------------------------------------------------


def named_modules(network: nnx.Module) -> Iterator[tuple[str, nnx.Module]]:
    """Yield all modules within a network but lists, by dotted names."""
    for path, module in nnx.iter_modules(network):
        if path and not isinstance(module, nnx.List):
            yield ".".join(map(str, path)), module


def replace_module(network: nnx.Module, name: str, module: nnx.Module) -> None:
    """Put a module in the place of the one with a dotted name."""
    parent: Any = network
    *path, last = name.split(".")
    for part in path:
        parent = parent[int(part)] if part.isdecimal() else getattr(parent, part)
    if last.isdecimal():
        parent[int(last)] = module
    else:
        setattr(parent, last, module)


def copy_structure(network: N) -> N:
    """Return a network with the same arrays, whose modules can be replaced."""
    return nnx.merge(*nnx.split(network))
