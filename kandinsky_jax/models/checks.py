"""What the networks say of arguments that do not fit: what was given, and what is needed."""

from __future__ import annotations

from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from kandinsky_jax.common.types import Array, Num

Timestep: TypeAlias = "Num[Array | np.ndarray, 'B'] | Num[Array | np.ndarray, ''] | int | float"


def check_shape(name: str, shape: tuple[int, ...], *needed: int | str) -> None:
    """Raise ValueError unless a shape is as needed: a number for an axis of that length, a name for one of any."""
    if len(shape) == len(needed) and all(
        isinstance(n, str) or n == size for n, size in zip(needed, shape, strict=True)
    ):
        return
    raise ValueError(f"{name} has the shape {list(shape)}; needed is [{', '.join(map(str, needed))}]")


def check_condition(condition: object, kind: type, field: str, images: int, made_by: str) -> None:
    """Raise unless a condition is of a network's own kind, and of the sample's batch or for any.

    Args:
        condition: what was given.
        kind: the class that it must have.
        field: of the class, an array `[B, D]`; of other shapes, which blocks of one's own may take, nothing is said.
        images: the sample's, B.
        made_by: the call that makes one.
    Raises:
        TypeError: for anything of another class.
        ValueError: for a condition of another batch.
    """
    if not isinstance(condition, kind):
        raise TypeError(f"condition must be what {made_by} returns, got {type(condition).__name__}")
    shape = np.shape(getattr(condition, field))
    if len(shape) == 2 and shape[0] not in (1, images):
        raise ValueError(f"condition is of a batch of {shape[0]}, the sample of a batch of {images}; make both of one")


def timesteps(timestep: Timestep, images: int) -> jax.Array:
    """Return one timestep, or one per image, as `[B]`; ValueError for any other shape."""
    shape = np.shape(timestep)
    if shape not in ((), (1,), (images,)):
        raise ValueError(f"timestep has the shape {list(shape)}; needed is one number, or [{images}], one per image")
    return jnp.broadcast_to(jnp.asarray(timestep), (images,))
