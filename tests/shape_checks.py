"""Checks of the shapes and dtypes in annotations of arrays, which tests/conftest.py installs."""

from __future__ import annotations

import typing
from collections.abc import Callable

import beartype
import jaxtyping

MODULES = (
    "kandinsky_jax.models",
    "kandinsky_jax.diffusion",
    "kandinsky_jax.composition",
    "kandinsky_jax.rewards",
    "kandinsky_jax.editing",
    "kandinsky_jax.training.losses",
    "kandinsky_jax.training.distillation",
    "kandinsky_jax.training.dpo",
)


def install() -> None:
    """Have every call checked of the functions in `MODULES`, where these are imported from here on."""
    jaxtyping.install_import_hook(MODULES, f"{__name__}.check_arrays")


def check_arrays(function: Callable) -> Callable:
    """Check the arguments of a function that are arrays; the others are mypy's.

    Args:
        function: jaxtyping's stand-in for a function of the package, with its annotations.
    """
    function.__annotations__ = {name: hint for name, hint in function.__annotations__.items() if _has_shape(hint)}
    return beartype.beartype(function) if function.__annotations__ else function


def _has_shape(hint: object) -> bool:
    if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(map(_has_shape, typing.get_args(hint)))
