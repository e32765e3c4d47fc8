"""Which devices draw, and where each array lies on them.

A mesh has three axes. `data` divides the images of a batch: every device runs the whole program on its own images, and
no device waits for another. For one picture fast, `guidance` gives the two halves of classifier-free guidance a device
each, which exchange their predictions once a step, and `rows` divides the rows of pictures, where XLA exchanges the
borders that convolutions need. The first two are divided by hand (`jax.shard_map`), the last one by XLA.

A network runs where its parameters lie, so a mesh is nothing that a pipeline has to remember.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from kandinsky_jax.errors import quote

DATA, GUIDANCE, ROWS = AXES = ("data", "guidance", "rows")
EVERYWHERE = PartitionSpec()
PICTURE = 4  # axes of an array of pictures, [B, H, W, C]

# Regular expressions over dotted parameter names, such as `down_blocks.0.resnets.1.conv1.kernel`, and how the
# parameters that they match are divided; the first that matches counts, and what none matches lies everywhere.
Rules = Sequence[tuple[str, PartitionSpec]]


def make_mesh(
    data: int | None = None, guidance: int = 1, rows: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh to draw on.

    Args:
        data: parts that a batch is divided into; None for as many as there are devices for.
        guidance: 2 gives each half of guidance a device of its own.
        rows: parts that pictures are divided into, from top to bottom. It has to divide the rows of latents, an eighth
            of a picture's height in pixels.
        devices: None for all of this process.
    Raises:
        ValueError: where these numbers and devices do not make a mesh.
    """
    found = list(jax.local_devices() if devices is None else devices)
    for name, value in ((DATA, data), (GUIDANCE, guidance), (ROWS, rows)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"a mesh's {name} must be an integer of at least 1, got {quote(value)}")
    if guidance > 2:
        raise ValueError(f"a mesh's {GUIDANCE} must be 1 or 2, guidance has two halves; got {guidance}")
    data = max(1, len(found) // (guidance * rows)) if data is None else data
    needed = data * guidance * rows
    if needed > len(found):
        raise ValueError(
            f"a mesh of {DATA}={data}, {GUIDANCE}={guidance}, {ROWS}={rows} needs {needed} devices, there are "
            f"{len(found)}"
        )
    # Auto: under Explicit axes, jax.make_mesh's default, embeddings and the reshape to heads raise.
    return Mesh(np.array(found[:needed]).reshape(data, guidance, rows), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def default_mesh() -> Mesh | None:
    """All devices of this process, each for its own images; None where there is one."""
    return make_mesh() if jax.local_device_count() > 1 else None


def mesh_of(leaf: Any) -> Mesh | None:
    """The mesh that an array, or the description of one, lies on; None for any other place."""
    sharding = getattr(leaf, "sharding", None)
    if isinstance(sharding, NamedSharding) and sharding.mesh.axis_names == AXES:
        return sharding.mesh if isinstance(sharding.mesh, Mesh) else None
    return None


# Parameters -------------------------------------------------------------------------------------------------------


def parameter_places(
    mesh: Mesh | None, shapes: Mapping[str, tuple[int, ...]], rules: Rules = (), axis: str = ROWS
) -> dict[str, NamedSharding | None]:
    """Where each parameter lies: everywhere, unless a rule divides it. Without a mesh, JAX decides.

    Args:
        rules: may name `axis`, and no other.
        axis: to draw, `rows`: axes divided by hand want every device to have all parameters.
    Raises:
        ValueError: for rules that cannot be followed, all at once.
    """
    if mesh is None:
        if rules:
            raise ValueError("parameters can only be divided over a mesh; give one, see make_mesh")
        return dict.fromkeys(shapes)
    faults: list[str] = []
    places: dict[str, NamedSharding | None] = {}
    sensible = []
    for pattern, spec in rules:
        if any(other != axis for part in spec for other in ([part] if isinstance(part, str) else part or ())):
            faults.append(f"{pattern!r} asks for {spec}; parameters are divided over {axis!r} only")
        else:
            sensible.append((pattern, spec))
    for name, shape in shapes.items():
        spec = next((spec for pattern, spec in sensible if re.search(pattern, name)), EVERYWHERE)
        sizes = [1 if part is None else mesh.shape[axis] for part in spec]
        if len(sizes) > len(shape) or any(side % size for side, size in zip(shape, sizes, strict=False)):
            faults.append(f"{name} {list(shape)} cannot be divided as {spec} over {mesh.shape[axis]} {axis}")
        places[name] = NamedSharding(mesh, spec)
    if faults:
        raise ValueError("parameters cannot be placed:\n  " + "\n  ".join(faults))
    return places


def largest_axis(mesh: Mesh, shapes: Mapping[str, tuple[int, ...]], least: int = 1 << 16, axis: str = ROWS) -> Rules:
    """Rules that divide every parameter of `least` numbers or more along its largest side that `axis` divides."""
    parts, rules = mesh.shape[axis], []
    for name, shape in shapes.items():
        able = [i for i, side in enumerate(shape) if side % parts == 0]
        if able and np.prod(shape) >= least:
            longest = max(able, key=lambda i: shape[i])
            rules.append((f"^{re.escape(name)}$", PartitionSpec(*[None] * longest, axis)))
    return rules


# cuDNN reads kernels as [out, H, W, in] beside NHWC pictures. XLA would put every one so before each run of the loop:
# 2 GB of copies of the official UNet's, for as long as it runs. The array stays [H, W, in, out] for whoever uses it.
KERNEL_AXES, KERNEL_ORDER = 4, Layout((3, 0, 1, 2))
KERNEL_PLATFORMS = frozenset({"gpu", "cuda"})  # of devices, and of described ones


def home() -> Sharding:
    """JAX's default device, for arrays that are bound to it: Orbax makes no others."""
    return SingleDeviceSharding(jax.local_devices()[0])


def in_memory(place: Sharding | None, shape: Sequence[int]) -> Sharding | Format | None:
    """Where a parameter lies, and on GPUs in which order of its axes, for `jax.device_put`.

    Args:
        place: None where JAX decides; on GPUs that is `home()`, because an order comes with a place, and a program's
            parameters are all bound to one or none.
        shape: of the parameter; kernels of convolutions, and nothing else, have four axes.
    """
    bound = home() if place is None else place
    device: Any = next(iter(bound.device_set))
    if device.platform not in KERNEL_PLATFORMS:
        return place
    return Format(KERNEL_ORDER, bound) if len(shape) == KERNEL_AXES else bound


# Rows of a batch --------------------------------------------------------------------------------------------------


def place(mesh: Mesh, tree: Any, axis: int | None = 0, halves: bool = False, pictures: bool = True) -> Any:
    """Arrays with one row per image where a program over the mesh wants them; the last row fills an uneven batch up.

    Args:
        axis: that of the images; None for arrays that have none, which stay as they are.
        halves: whether the first axis is that of guidance's halves, of size 1 or 2.
        pictures: whether arrays `[..., B, H, W, C]` are pictures, whose rows are divided where that is even.
    """

    def put(leaf: Any) -> Any:
        if axis is None:
            return leaf
        images, parts = leaf.shape[axis], mesh.shape[DATA]
        if short := -images % parts:
            leaf = _take(leaf, np.minimum(np.arange(images + short), images - 1), axis)
        spec = [*_by_hand(mesh, leaf, axis, halves)]
        parts = mesh.shape[ROWS]
        if pictures and parts > 1 and leaf.ndim - axis == PICTURE and leaf.shape[axis + 1] % parts == 0:
            spec.append(ROWS)
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree.map(put, tree)


def _take(leaf: Any, rows: np.ndarray, axis: int) -> Any:
    index = (slice(None),) * axis + (rows,)
    return leaf[index] if isinstance(leaf, np.ndarray) else _taken(leaf, rows, axis)


@functools.partial(jax.jit, static_argnums=2)
def _taken(leaf: jax.Array, rows: jax.Array, axis: int) -> jax.Array:
    return leaf[(slice(None),) * axis + (rows,)]


def _by_hand(mesh: Mesh, leaf: Any, axis: int, halves: bool) -> PartitionSpec:
    split = halves and mesh.shape[GUIDANCE] == 2 and leaf.shape[0] == 2
    return PartitionSpec(*[GUIDANCE if split and i == 0 else None for i in range(axis)], DATA)


def specs(mesh: Mesh | None, tree: Any, axis: int | None = 0, halves: bool = False) -> Any:
    """How `over` divides arrays that `place` has put."""
    if mesh is None or axis is None:
        return EVERYWHERE
    return jax.tree.map(lambda leaf: _by_hand(mesh, leaf, axis, halves), tree)


def over(mesh: Mesh | None, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """A function of whole arrays from one of each device's own part; without a mesh, the function as it is."""
    if mesh is None:
        return function
    # XLA divides what is left over, and refuses Pallas kernels even where nothing is.
    by_hand = {DATA, GUIDANCE} if mesh.shape[ROWS] > 1 else set(AXES)
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=by_hand, check_vma=False
    )
