"""Meshes for training, and the sharding of a step's arrays.

A mesh has two axes. A batch is sharded over both. Trained parameters, their average and the optimizer's state are
sharded over `fsdp` only: a step gathers the parameters, each device computes with its own examples, and gets its shard
of the summed gradients (Rajbhandari et al. 2020, arXiv 1910.02054; Zhao et al. 2023, arXiv 2304.11277). Weights of
layers whose activations are smaller stay sharded, see `parallel.stationary`. With `fsdp=1` all are replicated.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import DictKey, KeyPath, tree_flatten_with_path

from kandinsky_jax.common.errors import shorten
from kandinsky_jax.common.types import PyTree
from kandinsky_jax.parallel.mesh import DATA_AXIS
from kandinsky_jax.parallel.sharding import (
    REPLICATED,
    TILE_LANES,
    TILE_ROWS,
    Rules,
    in_tiles,
    parameter_shardings,
    rules_by_size,
)
from kandinsky_jax.parallel.stationary import FSDP_AXIS

FSDP_MIN_SIZE = 1 << 16
ANY_MESH = f"a checkpoint fits any {DATA_AXIS} and {FSDP_AXIS}"
EXAMPLE_AXES = (DATA_AXIS, FSDP_AXIS)
EXAMPLES = PartitionSpec(EXAMPLE_AXES)  # of arrays whose first axis is examples


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh's axes.

    Args:
        data: number of replicas of the weights, each sharded over `fsdp`; absent is as many as there are devices for.
        fsdp: number of shards of the weights.
        fsdp_min_size: elements of the smallest array that is sharded; smaller ones are replicated.
    """

    data: int | None = None
    fsdp: int = 1
    fsdp_min_size: int = FSDP_MIN_SIZE

    def __post_init__(self) -> None:
        if faults := [
            f"{name} must be at least 1, got {shorten(value)}"
            for name, value in (("data", self.data), ("fsdp", self.fsdp), ("fsdp_min_size", self.fsdp_min_size))
            if value is not None and not 1 <= value <= 2**31
        ]:
            raise ValueError("\n".join(faults))


def make_training_mesh(
    data: int | None = None, fsdp: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh | None:
    """Make a mesh to train on; None for a single device.

    Args:
        data, fsdp: see `MeshConfig`.
        devices: None for all devices of all processes.
    Raises:
        ValueError: for more shards than devices.
    """
    found = list(jax.devices() if devices is None else devices)
    asked = f"{FSDP_AXIS}={fsdp}" if data is None else f"{DATA_AXIS}={data}, {FSDP_AXIS}={fsdp}"
    data = max(1, len(found) // fsdp) if data is None else data
    if data * fsdp > len(found):
        raise ValueError(f"a mesh of {asked} needs {data * fsdp} devices, there are {len(found)}; {ANY_MESH}")
    if data * fsdp == 1:
        return None
    # Auto: outside of a `shard_map` XLA shards results. Explicit axes, jax.make_mesh's default, fail in reshapes.
    devices_ = np.array(found[: data * fsdp]).reshape(data, fsdp)
    return Mesh(devices_, (DATA_AXIS, FSDP_AXIS), axis_types=(AxisType.Auto, AxisType.Auto))


def parts(mesh: Mesh | None) -> int:
    """Return the number of shards of a batch."""
    return 1 if mesh is None else mesh.shape[DATA_AXIS] * mesh.shape[FSDP_AXIS]


def state_shardings(mesh: Mesh, tree: PyTree, rules: Rules | None = None, min_size: int = FSDP_MIN_SIZE) -> PyTree:
    """Return the sharding of each leaf of a state.

    A parameter and its optimizer state are sharded alike: a leaf is named by the dictionary keys of its path alone.
    Leaves without a name, such as the step, are replicated.

    Args:
        tree: arrays, or shapes.
        rules: (pattern, PartitionSpec) pairs over dotted names, see `parallel.sharding.Rules`, that may name the
            axis `fsdp`; None is `parallel.sharding.rules_by_size`.
        min_size: elements of the smallest leaf that is sharded without rules.
    Raises:
        ValueError: listing all rules that cannot be followed.
    """
    leaves, structure = tree_flatten_with_path(tree)
    shapes = {_name(path): tuple(leaf.shape) for path, leaf in leaves}
    shapes.pop("", None)
    rules = rules_by_size(mesh, shapes, min_size, FSDP_AXIS) if rules is None else rules
    found = parameter_shardings(mesh, shapes, rules, axis=FSDP_AXIS)
    found[""] = NamedSharding(mesh, REPLICATED)
    return jax.tree.unflatten(structure, [found[_name(path)] for path, _ in leaves])


def _name(path: KeyPath) -> str:
    return ".".join(str(key.key) for key in path if isinstance(key, DictKey))


# Within a `shard_map` over the mesh -------------------------------------------------------------------------------


def gather(tree: PyTree, specs: PyTree) -> PyTree:
    """Gather whole arrays from the shards of all devices, in the arrays' dtype.

    Args:
        specs: PartitionSpecs of the arrays, which name `fsdp` at most.
    """

    def of(leaf: jax.Array, spec: PartitionSpec) -> jax.Array:
        for axis in _sharded_axes(spec):
            leaf = jax.lax.all_gather(leaf, FSDP_AXIS, axis=axis, tiled=True)
        return leaf

    return jax.tree.map(of, tree, specs)


def scatter_sums(tree: PyTree, specs: PyTree) -> PyTree:
    """Sum whole arrays of the devices of `fsdp`; each device gets the shard of the sums that `specs` say.

    Arrays without a sharded axis are left alone, see `sum_replicas`.
    """

    def of(leaf: jax.Array, spec: PartitionSpec) -> jax.Array:
        for axis in _sharded_axes(spec):
            leaf = _scatter_sum(leaf, axis)
        return leaf

    return jax.tree.map(of, tree, specs)


def _scatter_sum(x: jax.Array, axis: int) -> jax.Array:
    """Return this device's shard of the sum, along an axis.

    Where shards are not whole tiles of memory, XLA would sum whole arrays on every TPU. Such shards are first laid out
    as rows of tiles, with some padding.
    """
    scatter = functools.partial(jax.lax.psum_scatter, axis_name=FSDP_AXIS, tiled=True)
    count = jax.lax.axis_size(FSDP_AXIS)
    if in_tiles(x.shape, axis, count):
        return scatter(x, scatter_dimension=axis)
    leading = jnp.moveaxis(x, axis, 0)
    shards = leading.reshape(count, -1)
    size = shards.shape[1]
    shards = jnp.pad(shards, ((0, 0), (0, -size % (TILE_ROWS * TILE_LANES))))
    mine = scatter(shards.reshape(count * TILE_ROWS, -1), scatter_dimension=0).reshape(-1)[:size]
    return jnp.moveaxis(mine.reshape(-1, *leading.shape[1:]), 0, axis)


def sum_replicas(tree: PyTree, specs: PyTree) -> PyTree:
    """Complete the sums of `scatter_sums` over all devices: of shards over `data`, of whole arrays over both axes."""

    def of(leaf: jax.Array, spec: PartitionSpec) -> jax.Array:
        return jax.lax.psum(leaf, DATA_AXIS if _sharded_axes(spec) else EXAMPLE_AXES)

    return jax.tree.map(of, tree, specs)


def _sharded_axes(spec: PartitionSpec) -> list[int]:
    divided = jax.lax.axis_size(FSDP_AXIS) > 1
    return [axis for axis, part in enumerate(spec) if divided and part is not None]


def all_examples(x: jax.Array) -> jax.Array:
    """Gather arrays `[B, ...]` of the examples of all devices, `[N, ...]`; outside of a `shard_map` B is N."""
    return jax.lax.all_gather(x, EXAMPLE_AXES, tiled=True) if _on_a_device() else x


def first_example(count: int) -> int | jax.Array:
    """Return the index of this device's first example among all, where each device has `count`."""
    return jax.lax.axis_index(EXAMPLE_AXES) * count if _on_a_device() else 0


def _on_a_device() -> bool:
    """Whether what is being traced is the program of one device of a training mesh."""
    return set(EXAMPLE_AXES) <= set(jax.sharding.get_abstract_mesh().manual_axes)


# Arrays of several processes --------------------------------------------------------------------------------------


def put(tree: PyTree, shardings: PyTree) -> PyTree:
    """Put arrays that every process has as a whole where `shardings` says."""

    def of(leaf: jax.Array | np.ndarray, where: NamedSharding) -> jax.Array:
        if where.is_fully_addressable:
            return jax.device_put(leaf, where)
        array = np.asarray(leaf)
        return jax.make_array_from_callback(array.shape, where, lambda index: array[index])

    return jax.tree.map(of, tree, shardings)


def check_shared(mesh: Mesh | None) -> None:
    """Raise ValueError, in every process, unless the mesh has all devices of all processes."""
    size = 1 if mesh is None else mesh.size
    if jax.process_count() > 1 and size != jax.device_count():
        raise ValueError(
            f"a mesh of {size} devices leaves some of {jax.process_count()} processes without: they have "
            f"{jax.device_count()} in all, and {DATA_AXIS} * {FSDP_AXIS} must be that number; {ANY_MESH}"
        )


def connect(mesh: Mesh | None) -> None:
    """Connect the devices of several processes along every axis of the mesh, on CPUs. Collective.

    XLA's CPU backend connects devices when a program first needs it, and gives up if a process comes 30 s later than
    another, because it compiles longer. These programs compile in no time.
    """
    if mesh is None or jax.process_count() == 1 or jax.default_backend() != "cpu":
        return
    values = put(np.ones(mesh.size, np.float32), NamedSharding(mesh, EXAMPLES))
    for axes in ((DATA_AXIS,), (FSDP_AXIS,), EXAMPLE_AXES):
        add = functools.partial(jax.lax.psum, axis_name=axes)
        jax.block_until_ready(jax.jit(jax.shard_map(add, mesh=mesh, in_specs=EXAMPLES, out_specs=EXAMPLES))(values))


def local_examples(mesh: Mesh | None, batch: int) -> np.ndarray:
    """Return which examples of a batch lie on devices of this process, int64, ascending."""
    if mesh is None:
        return np.arange(batch)
    indices = NamedSharding(mesh, EXAMPLES).addressable_devices_indices_map((batch,))
    return np.sort(np.concatenate([np.arange(batch)[index] for index in indices.values()]))


def shard_examples(mesh: Mesh | None, batch: PyTree) -> PyTree:
    """Shard arrays whose first axis is examples over the devices; no-op without a mesh.

    Args:
        batch: the examples of this process, see `local_examples`.
    """
    if mesh is None:
        return batch
    where = NamedSharding(mesh, EXAMPLES)
    if where.is_fully_addressable:
        return jax.device_put(batch, where)

    def of(leaf: jax.Array | np.ndarray) -> jax.Array:
        mine = np.asarray(leaf)
        examples = len(mine) * mesh.size // len(where.addressable_devices)
        which = local_examples(mesh, examples)

        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            start, stop, _ = index[0].indices(examples)
            first = int(np.searchsorted(which, start))
            return mine[first : first + stop - start]

        return jax.make_array_from_callback((examples, *mine.shape[1:]), where, shard)

    return jax.tree.map(of, batch)


def whole(leaf: jax.Array) -> np.ndarray:
    """Return an array, of which other processes may have shards, on the host. Collective."""
    if leaf.is_fully_addressable or leaf.is_fully_replicated:
        return np.asarray(leaf)
    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))


def gathered(mesh: Mesh | None, tree: PyTree, keep: bool = True) -> PyTree:
    """Gather sharded arrays, one by one, on JAX's default device; no-op without a mesh. Collective.

    Args:
        keep: whether this process wants them; the others, which take part, get None for each.
    """
    if mesh is None:
        return tree

    def of(leaf: jax.Array) -> jax.Array | None:
        array = whole(leaf)
        return jax.device_put(array) if keep else None

    return jax.tree.map(of, tree)
