"""One image's schedule as rows of numbers, so that the images of a batch may be anywhere in schedules of their own."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from kandinsky_jax.schedulers.table import STATE_SLOTS, Schedule, SolverCoefficients


class SlotCoefficients(NamedTuple):
    """The coefficients of one evaluation for each image, `[B, ...]`: a solver's, and what is an argument elsewhere.

    The fields up to `levels` are those of `SolverCoefficients`.

    Args:
        guidance_scale: `[B]`; guidance is on above 1.
        kept_levels: `[B, 2]`, how much picture and how much noise a kept part has after the step, see `Blend`.
    """

    timestep: jax.Array
    input_scale: jax.Array
    x0_from: jax.Array
    eps_from: jax.Array
    log_variance: jax.Array
    variance_is_output: jax.Array
    clip: jax.Array
    threshold: jax.Array
    matrix: jax.Array
    levels: jax.Array
    guidance_scale: jax.Array
    kept_levels: jax.Array


# The shape of each field for one image, in the order in which a row of numbers has them.
SHAPES: dict[str, tuple[int, ...]] = {
    "timestep": (),
    "input_scale": (),
    "x0_from": (2,),
    "eps_from": (3,),
    "log_variance": (2,),
    "variance_is_output": (),
    "clip": (),
    "threshold": (3,),
    "matrix": (STATE_SLOTS, STATE_SLOTS + 3),
    "levels": (2,),
    "guidance_scale": (),
    "kept_levels": (2,),
}
assert tuple(SHAPES) == SlotCoefficients._fields
assert SlotCoefficients._fields[: len(SolverCoefficients._fields)] == SolverCoefficients._fields
_SIZES = [int(np.prod(shape)) for shape in SHAPES.values()]
WIDTH = sum(_SIZES)  # numbers of a row
CLEAN = np.array([1, 0], np.float32)  # levels of a picture without noise


def schedule_rows(schedule: Schedule, guidance_scale: float, kept_levels: np.ndarray | None = None) -> np.ndarray:
    """Return a schedule as rows of numbers, float32 `[evaluations, WIDTH]`.

    Args:
        schedule: of the image.
        guidance_scale: of all its steps.
        kept_levels: `[>= evaluations, 2]` of an inpainted image.
    """
    count = len(schedule)
    kept = np.tile(CLEAN, (count, 1)) if kept_levels is None else kept_levels[:count]
    columns = [*(column[:count] for column in schedule.table), np.full(count, guidance_scale), kept]
    return np.concatenate([np.reshape(column, (count, -1)) for column in columns], axis=1).astype(np.float32)


def idle_row() -> np.ndarray:
    """Return the row of a slot without an image, which leaves its state as it is; float32 `[WIDTH]`."""
    own: dict[str, Any] = {"input_scale": 1.0, "clip": np.inf, "guidance_scale": 1.0}
    own["matrix"] = np.eye(STATE_SLOTS, STATE_SLOTS + 3)
    fields = [np.broadcast_to(own.get(name, 0.0), shape) for name, shape in SHAPES.items()]
    return np.concatenate([np.ravel(field) for field in fields]).astype(np.float32)


def unpack(rows: jax.Array) -> Any:
    """Return rows `[steps, B, WIDTH]` as `SlotCoefficients` with the fields `[steps, B, ...]`."""
    parts, first = [], 0
    for shape, size in zip(SHAPES.values(), _SIZES, strict=True):
        parts.append(rows[..., first : first + size].reshape(*rows.shape[:-1], *shape))
        first += size
    return SlotCoefficients(*parts)
