"""Conversion of users' arrays, of NumPy, JAX or PyTorch and of any real dtype, to NumPy."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from kandinsky_jax.common.errors import shorten


def to_numpy(value: object, name: str) -> np.ndarray:
    """Convert to an array of real numbers; bfloat16 and similar dtypes, which NumPy lacks, become float32.

    Args:
        value: an array of NumPy, JAX or PyTorch (on any device), numbers in nested lists, or a list of equal arrays.
        name: of the argument, for the error.
    Raises:
        TypeError: where it is not an array of real numbers.
    """
    if isinstance(value, jax.core.Tracer):
        raise TypeError(
            f"{name} is traced by jit, vmap or grad, which a pipeline's call is not made for; "
            "kandinsky_jax.diffusion.sample is"
        )
    try:
        if isinstance(value, list | tuple) and any(hasattr(item, "__array__") for item in value):
            value = [to_numpy(item, name) for item in value]
        array = _of_torch(value) if hasattr(value, "detach") else np.asarray(value)
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise TypeError(f"{name} cannot be read as an array of numbers: {shorten(str(error), 200)}") from None
    if array.dtype.kind == "V" and array.dtype.fields is None and array.dtype.name != f"void{8 * array.itemsize}":
        array = array.astype(np.float32)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name} must be an array of numbers, has dtype {shorten(str(array.dtype))}")
    return array


def _of_torch(tensor: Any) -> np.ndarray:
    """Convert a PyTorch tensor without importing PyTorch."""
    try:
        return tensor.numpy(force=True)
    except TypeError:  # a dtype that NumPy has not
        return tensor.detach().float().numpy(force=True)
