"""What is wrong with the tensors of a network: beside its configuration, and by their values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from kandinsky_jax.checkpoint import tensor_files, tensor_names
from kandinsky_jax.checkpoint.tensor_files import QUANTIZED_DTYPES, WEIGHT_DTYPES
from kandinsky_jax.common.errors import MAX_MESSAGE, CheckpointError, summarize
from kandinsky_jax.models.quantization_config import SCALES, SMALLEST_SCALE

Leaf = jax.Array | jax.ShapeDtypeStruct


def by_torch_names(expected: Mapping[str, Leaf]) -> dict[str, jax.ShapeDtypeStruct]:
    """Return parameters by the names, and in the shapes, of their tensors in PyTorch files."""
    return {
        tensor_names.torch_name(name): jax.ShapeDtypeStruct(
            tensor_names.torch_shape(name, tuple(leaf.shape)), leaf.dtype
        )
        for name, leaf in expected.items()
    }


def torch_faults(wanted: Mapping[str, Leaf], tensors: Mapping[str, tensor_files.Tensor]) -> list[str]:
    """List faults of the tensors in PyTorch files that show before they are read."""
    faults = _differences(wanted, {name: tensor.shape for name, tensor in tensors.items()})
    names = WEIGHT_DTYPES | QUANTIZED_DTYPES
    return faults + _dtype_faults(wanted, {name: names.get(t.dtype, t.dtype) for name, t in tensors.items()})


def orbax_faults(folder: Path, expected: Mapping[str, Leaf], stored: Mapping[str, jax.ShapeDtypeStruct]) -> list[str]:
    """List faults of the arrays in an Orbax checkpoint that show before they are read."""
    faults = _differences(expected, {name: tuple(leaf.shape) for name, leaf in stored.items()})
    return faults + _dtype_faults(expected, {name: str(leaf.dtype) for name, leaf in stored.items()})


def _dtype_faults(expected: Mapping[str, Leaf], dtypes: Mapping[str, str]) -> list[str]:
    """List tensors that are not floats, or where the configuration says so not of a quantized weight's dtype."""
    faults = []
    for name in sorted(expected.keys() & dtypes.keys()):
        dtype = jnp.dtype(expected[name].dtype)
        own = dtype.itemsize == 1 or jnp.issubdtype(dtype, jnp.integer)
        allowed = [dtype.name] if own else list(WEIGHT_DTYPES.values())
        if dtypes[name] not in allowed:
            faults.append(f"dtype: {name} is {dtypes[name]}, weights are {', '.join(allowed)}")
    return faults


def _differences(expected: Mapping[str, Leaf], found: Mapping[str, tuple[int, ...]]) -> list[str]:
    shapes = {name: tuple(leaf.shape) for name, leaf in expected.items()}
    faults = [f"missing: {n} {list(shapes[n])}" for n in sorted(shapes.keys() - found.keys())]
    faults += [f"unexpected: {n} {list(found[n])}" for n in sorted(found.keys() - shapes.keys())]
    faults += [
        f"shape: {n} is {list(found[n])}, config.json asks for {list(shapes[n])}"
        for n in sorted(shapes.keys() & found.keys())
        if found[n] != shapes[n]
    ]
    return faults


def report_faults(folder: Path, faults: Sequence[str]) -> None:
    """Raise CheckpointError for faults, each "KIND: WHAT"; of every kind, as many as fit are listed."""
    if not faults:
        return
    kinds: dict[str, list[str]] = {}
    for fault in faults:
        kind, what = fault.split(": ", 1)
        kinds.setdefault(kind, []).append(what)
    head = f"{folder} is not what its config.json describes, {len(faults)} tensors differ: "
    room = max(MAX_MESSAGE + 30 - len(head), 160) // len(kinds) - len(", and 1,000 more; ")
    raise CheckpointError(
        head + "; ".join(f"{kind}: {summarize(which, room - len(kind), ', ')}" for kind, which in kinds.items())
    )


def bad_values(name: str, array: np.ndarray) -> list[str]:
    """Report values that are not finite in the requested dtype, which may overflow values of the file; and scales of
    quantized weights that are not positive."""
    if bad := array.size - int(np.isfinite(array).sum()):
        return [f"not finite as {array.dtype}: {name} in {bad} of {array.size}"]
    if name.rpartition(".")[2] in SCALES and (bad := int((array < SMALLEST_SCALE).sum())):
        return [f"not a positive scale: {name} in {bad} of {array.size}"]
    return []


def inexact_values(name: str, array: np.ndarray) -> list[str]:
    """Report float64 values that float32 does not hold; others are accepted, since JAX runs without float64."""
    if array.dtype != np.float64:
        return []
    lost = int((array.astype(np.float32) != array).sum())
    return [f"inexact: {name} has {lost} numbers of float64 that float32 does not hold; convert it"] if lost else []
