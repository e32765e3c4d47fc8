"""Which devices train, and where each array of a step lies.

A mesh has two axes. A batch is divided over both. What is trained, its average and the optimizer's state are divided
over `fsdp` alone, so that a network that is too large for one device is not for several: XLA gathers each parameter
where a layer needs it, and each device keeps its own share of the summed gradients (Rajbhandari et al. 2020, arXiv
1910.02054, stage 3; Zhao et al. 2023, arXiv 2304.11277). With `fsdp=1` every device has everything.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import DictKey, KeyPath, tree_flatten_with_path

from kandinsky_jax.errors import shorten
from kandinsky_jax.sharding import DATA_AXIS, REPLICATED, Rules, largest_axis, parameter_shardings

FSDP_AXIS = "fsdp"
ROW = PartitionSpec((DATA_AXIS, FSDP_AXIS))  # of arrays with one row per example


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many parts there are.

    Args:
        data: parts of a batch whose devices have all weights between them; absent is as many as there are devices for.
        fsdp: parts of the weights.
    """

    data: int | None = None
    fsdp: int = 1

    def __post_init__(self) -> None:
        if faults := [
            f"{name} must be at least 1, got {shorten(value)}"
            for name, value in (("data", self.data), ("fsdp", self.fsdp))
            if value is not None and not 1 <= value <= 2**20
        ]:
            raise ValueError("\n".join(faults))


def make_training_mesh(
    data: int | None = None, fsdp: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh | None:
    """The mesh to train on; None where it is one device, which needs none.

    Args:
        data, fsdp: see `MeshConfig`.
        devices: None for all, of every process.
    Raises:
        ValueError: where there are not so many devices.
    """
    found = list(jax.devices() if devices is None else devices)
    data = max(1, len(found) // fsdp) if data is None else data
    if data * fsdp > len(found):
        raise ValueError(
            f"a mesh of {DATA_AXIS}={data}, {FSDP_AXIS}={fsdp} needs {data * fsdp} devices, there are {len(found)}"
        )
    if data * fsdp == 1:
        return None
    # Auto: XLA divides what lies between; under Explicit axes, jax.make_mesh's default, embeddings and reshapes raise.
    devices_ = np.array(found[: data * fsdp]).reshape(data, fsdp)
    return Mesh(devices_, (DATA_AXIS, FSDP_AXIS), axis_types=(AxisType.Auto, AxisType.Auto))


def parts(mesh: Mesh | None) -> int:
    """How many parts a batch is divided into."""
    return 1 if mesh is None else mesh.shape[DATA_AXIS] * mesh.shape[FSDP_AXIS]


def places(mesh: Mesh, tree: Any, rules: Rules | None = None) -> Any:
    """Where each leaf of a state lies.

    A parameter and what an optimizer keeps of it have the same place: a leaf's name is made of its path's dictionary
    keys alone. What has no name, such as a count of steps, lies everywhere.

    Args:
        tree: arrays, or shapes.
        rules: (pattern, PartitionSpec) pairs over dotted names, see `kandinsky_jax.sharding.Rules`, that may name the
            axis `fsdp`; None divides every large leaf along its largest axis that can be divided.
    Raises:
        ValueError: for rules that cannot be followed, all at once.
    """
    leaves, structure = tree_flatten_with_path(tree)
    shapes = {_name(path): tuple(leaf.shape) for path, leaf in leaves}
    shapes.pop("", None)
    rules = largest_axis(mesh, shapes, axis=FSDP_AXIS) if rules is None else rules
    found = parameter_shardings(mesh, shapes, rules, axis=FSDP_AXIS)
    found[""] = NamedSharding(mesh, REPLICATED)
    return jax.tree.unflatten(structure, [found[_name(path)] for path, _ in leaves])


def _name(path: KeyPath) -> str:
    return ".".join(str(key.key) for key in path if isinstance(key, DictKey))


def whole(mesh: Mesh | None, tree: Any) -> Any:
    """Within a program: parameters as every device computes with them, undivided; without a mesh, as they are.

    Left alone, XLA divides products by how the parameters lie, and exchanges activations for it.
    """
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, REPLICATED))


def place_batch(mesh: Mesh | None, batch: Any) -> Any:
    """Arrays with one row per example, each device with its own rows; without a mesh, as they are."""
    if mesh is None:
        return batch
    return jax.device_put(batch, NamedSharding(mesh, ROW))


def gathered(mesh: Mesh | None, tree: Any) -> Any:
    """Arrays that are divided over devices, undivided, on JAX's default device; without a mesh, as they are."""
    return tree if mesh is None else jax.device_put(jax.device_get(tree))
