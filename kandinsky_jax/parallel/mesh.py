"""Meshes of devices for generation.

A mesh has three axes. `data` shards the batch: every device runs the whole program on its own images and waits for no
other. The other two make a single picture faster: `guidance` gives uncond and cond of classifier-free guidance a device
each, which exchange their predictions once per step, and `rows` shards the rows of pictures, where XLA exchanges the
borders that convolutions need. The first two axes are manual (`jax.shard_map`), the last one is left to XLA.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from kandinsky_jax.common.errors import quote

DATA_AXIS, GUIDANCE_AXIS, ROWS_AXIS = AXES = ("data", "guidance", "rows")


def make_mesh(
    data: int | None = None, guidance: int = 1, rows: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Make a mesh to generate on.

    Args:
        data: number of shards of a batch; None for as many as there are devices for.
        guidance: 2 puts uncond and cond on separate devices.
        rows: number of shards of a picture, from top to bottom; must divide the rows of its latents, an eighth of its
            height in pixels.
        devices: None for all of this process.
    Raises:
        ValueError: for sizes that are not positive integers, or more than the devices allow.
    """
    found = list(jax.local_devices() if devices is None else devices)
    for name, value in ((DATA_AXIS, data), (GUIDANCE_AXIS, guidance), (ROWS_AXIS, rows)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"a mesh's {name} must be an integer of at least 1, got {quote(value)}")
    if guidance > 2:
        raise ValueError(f"a mesh's {GUIDANCE_AXIS} must be 1 or 2, for uncond and cond; got {guidance}")
    data = max(1, len(found) // (guidance * rows)) if data is None else data
    needed = data * guidance * rows
    if needed > len(found):
        raise ValueError(
            f"a mesh of {DATA_AXIS}={data}, {GUIDANCE_AXIS}={guidance}, {ROWS_AXIS}={rows} needs {needed} devices, "
            f"there are {len(found)}"
        )
    # Auto: under Explicit axes, jax.make_mesh's default, embeddings and the reshape to heads raise.
    return Mesh(np.array(found[:needed]).reshape(data, guidance, rows), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def default_mesh() -> Mesh | None:
    """Return a mesh of all devices of this process, with its own images on each; None for a single device."""
    return make_mesh() if jax.local_device_count() > 1 else None


def mesh_of(leaf: object) -> Mesh | None:
    """Return the mesh of an array, or of a `ShapeDtypeStruct`; None for any other sharding."""
    sharding = getattr(leaf, "sharding", None)
    if isinstance(sharding, NamedSharding) and sharding.mesh.axis_names == AXES:
        return sharding.mesh if isinstance(sharding.mesh, Mesh) else None
    return None
