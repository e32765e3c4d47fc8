"""Sharding of parameters and batches over a mesh. A network runs where its parameters are."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from kandinsky_jax.common.types import PyTree
from kandinsky_jax.parallel.mesh import AXES, DATA_AXIS, GUIDANCE_AXIS, ROWS_AXIS

REPLICATED = PartitionSpec()
TILE_ROWS, TILE_LANES = 16, 128  # of a TPU's memory, for bfloat16; float32 has half the rows
PICTURE_NDIM = 4  # of an array of pictures, [B, H, W, C]

# Regular expressions over dotted parameter names, such as `down_blocks.0.resnets.1.conv1.kernel`, and the sharding of
# the parameters that they match. The first match applies; parameters without a match are replicated.
Rules = Sequence[tuple[str, PartitionSpec]]


# Parameters -------------------------------------------------------------------------------------------------------


def parameter_shardings(
    mesh: Mesh | None, shapes: Mapping[str, tuple[int, ...]], rules: Rules = (), axis: str = ROWS_AXIS
) -> dict[str, NamedSharding | None]:
    """Return the sharding of each parameter: replicated unless a rule shards it, None where there is no mesh.

    Args:
        rules: may name `axis` only.
        axis: `rows` for generation, where the manual axes need all parameters on every device.
    Raises:
        ValueError: listing all rules that cannot be followed.
    """
    if mesh is None:
        if rules:
            raise ValueError("parameters can only be sharded over a mesh; give one, see make_mesh")
        return dict.fromkeys(shapes)
    faults: list[str] = []
    places: dict[str, NamedSharding | None] = {}
    sensible = []
    for pattern, spec in rules:
        if any(other != axis for part in spec for other in ([part] if isinstance(part, str) else part or ())):
            faults.append(f"{pattern!r} asks for {spec}; parameters are sharded over {axis!r} only")
        else:
            sensible.append((pattern, spec))
    for name, shape in shapes.items():
        spec = next((spec for pattern, spec in sensible if re.search(pattern, name)), REPLICATED)
        sizes = [1 if part is None else mesh.shape[axis] for part in spec]
        if len(sizes) > len(shape) or any(side % size for side, size in zip(shape, sizes, strict=False)):
            faults.append(f"{name} {list(shape)} cannot be sharded as {spec} over {mesh.shape[axis]} {axis}")
        places[name] = NamedSharding(mesh, spec)
    if faults:
        raise ValueError("parameters cannot be sharded:\n  " + "\n  ".join(faults))
    return places


def rules_by_size(
    mesh: Mesh, shapes: Mapping[str, tuple[int, ...]], least: int = 1 << 16, axis: str = ROWS_AXIS
) -> Rules:
    """Return rules that shard every parameter of at least `least` elements along its largest divisible axis.

    Axes whose shards are whole tiles of a TPU's memory come first, see `in_tiles`.
    """
    parts, rules = mesh.shape[axis], []
    for name, shape in shapes.items():
        able = [i for i, side in enumerate(shape) if side % parts == 0]
        if able and np.prod(shape) >= least:
            best = max(able, key=lambda i: (in_tiles(shape, i, parts), shape[i]))
            rules.append((f"^{re.escape(name)}$", PartitionSpec(*[None] * best, axis)))
    return rules


def in_tiles(shape: Sequence[int], axis: int, parts: int) -> bool:
    """Whether the shards of an array along an axis are rows of whole tiles of a TPU's memory, in any dtype."""
    return axis < len(shape) - 1 and shape[axis] % (parts * TILE_ROWS) == 0


# With NHWC pictures, cuDNN reads kernels as [out, H, W, in]. XLA would transpose all of them before each run of the
# loop: 2 GB of copies for the official UNet. The logical shape of the array stays [H, W, in, out].
KERNEL_AXES, KERNEL_ORDER = 4, Layout((3, 0, 1, 2))
KERNEL_PLATFORMS = frozenset({"gpu", "cuda"})  # of devices, and of described ones


def home() -> Sharding:
    """JAX's default device, for arrays that are bound to it: Orbax makes no others."""
    return SingleDeviceSharding(jax.local_devices()[0])


def in_memory(place: Sharding | None, shape: Sequence[int]) -> Sharding | Format | None:
    """Return the sharding of a parameter, and on GPUs its memory layout, for `jax.device_put`.

    Args:
        place: None where JAX decides; on GPUs that is `home()`, because an order comes with a place, and a program's
            parameters are all bound to one or none.
        shape: of the parameter; kernels of convolutions, and the scales of quantized ones, alone have four axes.
    """
    bound = home() if place is None else place
    device: jax.Device = next(iter(bound.device_set))
    if device.platform not in KERNEL_PLATFORMS:
        return place
    return Format(KERNEL_ORDER, bound) if len(shape) == KERNEL_AXES else bound


# Batches ----------------------------------------------------------------------------------------------------------


def shard_batch(mesh: Mesh, tree: PyTree, axis: int | None = 0, pictures: bool = True) -> PyTree:
    """Shard arrays over a mesh; a batch that cannot be divided evenly is padded with its last example.

    Args:
        axis: of the batch; None for arrays without one, which are returned unchanged.
        pictures: whether arrays `[..., B, H, W, C]` are pictures, whose rows are sharded where divisible.
    """

    def put(leaf: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
        if axis is None:
            return leaf
        images, parts = leaf.shape[axis], mesh.shape[DATA_AXIS]
        if short := -images % parts:
            leaf = _take(leaf, np.minimum(np.arange(images + short), images - 1), axis)
        spec = [*_batch_spec(axis)]
        parts = mesh.shape[ROWS_AXIS]
        if pictures and parts > 1 and leaf.ndim - axis == PICTURE_NDIM and leaf.shape[axis + 1] % parts == 0:
            spec.append(ROWS_AXIS)
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree.map(put, tree)


def _take(leaf: jax.Array | np.ndarray, indices: np.ndarray, axis: int) -> jax.Array | np.ndarray:
    if isinstance(leaf, np.ndarray):
        return leaf[(slice(None),) * axis + (indices,)]
    return _take_on_device(leaf, indices, axis)


@functools.partial(jax.jit, static_argnums=2)
def _take_on_device(leaf: jax.Array, indices: jax.Array, axis: int) -> jax.Array:
    return leaf[(slice(None),) * axis + (indices,)]


def _batch_spec(axis: int) -> PartitionSpec:
    return PartitionSpec(*[None] * axis, DATA_AXIS)


def batch_specs(mesh: Mesh | None, tree: PyTree, axis: int | None = 0) -> PyTree:
    """Return the partition specs over the manual axes of arrays from `shard_batch`, for `sharded`."""
    if mesh is None or axis is None:
        return REPLICATED
    return jax.tree.map(lambda leaf: _batch_spec(axis), tree)


def sharded(mesh: Mesh | None, function: Callable[..., Any], in_specs: PyTree, out_specs: PyTree) -> Callable[..., Any]:
    """Wrap a function of each device's shard as a function of whole arrays (`shard_map`); no-op without a mesh."""
    if mesh is None:
        return function
    # The remaining axes are left to XLA, which refuses Pallas kernels even where they have size 1.
    manual = {DATA_AXIS, GUIDANCE_AXIS} if mesh.shape[ROWS_AXIS] > 1 else set(AXES)
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=manual, check_vma=False
    )
