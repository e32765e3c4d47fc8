"""SHA-256 of results, and a few numbers of them that show how large a difference is."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

SAMPLES = 8  # values that a fingerprint keeps
MAX_PARTS = 40  # of a case, that are recorded one by one
_TENSOR_TYPES = {"F64": "f8", "F32": "f4", "F16": "f2", "I64": "i8", "I32": "i4", "U8": "u1", "BOOL": "?"}


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, str, bytes, np.ndarray | None]]:
    """The leaves of a result as (path, kind, bytes, numbers where it has some).

    Raises:
        TypeError: where a leaf is neither an array, bytes, a number, a text nor None.
    """
    if isinstance(value, Mapping):
        for name in sorted(value):
            yield from leaves(value[name], f"{path}/{name}" if path else str(name))
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from leaves(item, f"{path}/{i}" if path else str(i))
    elif isinstance(value, bytes):
        tensors = path.endswith(".safetensors")
        yield path, "bytes", _in_order(value) if tensors else value, _tensors(value) if tensors else None
    elif value is None or isinstance(value, str | int | float):
        yield path, "json", json.dumps(value).encode(), None
    elif hasattr(value, "__array__"):
        array = np.ascontiguousarray(value)
        yield path, f"{array.dtype} {np.shape(value)}", array.tobytes(), array
    else:
        raise TypeError(f"{path or 'the result'} is a {type(value).__name__}, which has no digest")


def record_of(value: Any) -> dict[str, Any]:
    """What is recorded of a result: its digest, those of its parts, and a fingerprint of its numbers."""
    whole, parts, numbers = hashlib.sha256(), {}, []
    for path, kind, data, array in leaves(value):
        digest = hashlib.sha256(kind.encode() + b"\0" + data).hexdigest()
        whole.update(f"{path}\0{digest}\0".encode())
        parts[path] = digest[:10]
        if array is not None and array.size:
            numbers.append(array.astype(np.float64).ravel())
    found: dict[str, Any] = {"sha256": whole.hexdigest()}
    if 1 < len(parts) <= MAX_PARTS:
        found["parts"] = parts
    if numbers:
        found["numbers"] = fingerprint(np.concatenate(numbers))
    return found


def fingerprint(values: np.ndarray) -> list[float | None]:
    """Count, mean, standard deviation, least, greatest, and values at evenly spaced places; None is not finite."""
    places = np.linspace(0, len(values) - 1, SAMPLES).astype(int)
    with np.errstate(all="ignore"):
        found = [len(values), values.mean(), values.std(), values.min(), values.max(), *values[places]]
    return [float(f"{x:.7g}") if math.isfinite(x) else None for x in found]


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """The files below a folder, by their paths in it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def _in_order(data: bytes) -> bytes:
    """A safetensors file with its metadata in order: its writer has another order in every process."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    if len(header.get("__metadata__", {})) < 2:
        return data
    return json.dumps(header, sort_keys=True).encode() + data[8 + size :]


def _tensors(data: bytes) -> np.ndarray | None:
    """All numbers of a safetensors file in the order of its header."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    found = []
    for name in sorted(header):
        first, end = header[name]["data_offsets"]
        kind = header[name]["dtype"]
        dtype = ml_dtypes.bfloat16 if kind == "BF16" else _TENSOR_TYPES[kind]
        found.append(np.frombuffer(data[8 + size + first : 8 + size + end], dtype).astype(np.float64))
    return np.concatenate(found) if found else None
