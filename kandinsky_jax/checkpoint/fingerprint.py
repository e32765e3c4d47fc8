"""Fingerprints of a network's stored values, for caching results that depend on them."""

from __future__ import annotations

import hashlib
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from flax import nnx

from kandinsky_jax.checkpoint import tensor_names
from kandinsky_jax.checkpoint.networks import flat_params, read_params
from kandinsky_jax.checkpoint.tensor_files import PREFERRED, PREVIEW_MAP, ZERO_EMBED, WeightSelection
from kandinsky_jax.common.atomic import replace_file
from kandinsky_jax.common.reading import ReadError, read_text
from kandinsky_jax.common.storage import files_below, user_cache
from kandinsky_jax.models.config import NetworkConfig
from kandinsky_jax.models.layers import abstract

_GROUP = 1 << 25  # values that are read at once
_THREADS = 4
_SETTLED_S = 2.0  # a file modified within this time may change again with the same time stamp
_NOTE = re.compile(r"([0-9a-f]{64}) ([0-9a-f]{64})\n")


def weights_fingerprint(
    cls: type[nnx.Module], config: NetworkConfig, folder: Path, selection: WeightSelection = PREFERRED
) -> str:
    """Compute SHA-256 of all values of all tensors of a checked network, as 64 hexadecimal digits.

    Values are hashed in float32, with PyTorch's names and order of axes, so that every layout and dtype with the same
    values gives the same result.

    All bytes are read once; the result is kept in the user's cache under the files' identities (device, inode, size,
    times of modification and change), and found there as long as none of these changes.

    Raises:
        CheckpointError: for a tensor that cannot be read.
    """
    shapes = {name: leaf.shape for name, leaf in flat_params(abstract(cls, config)).items()}
    began, key = time.time(), _identity(folder, selection, sorted(shapes))
    note = _note(key)
    if note is not None and (kept := _kept(note, key)) is not None:
        return kept
    found = hashlib.sha256()
    for name, digest in sorted(_digests(folder, selection, shapes).items()):
        found.update(f"{name} {digest}\n".encode())
    settled = _newest(folder) < began - _SETTLED_S and key == _identity(folder, selection, sorted(shapes))
    if note is not None and settled:
        try:
            note.parent.mkdir(parents=True, exist_ok=True)
            replace_file(note, f"{found.hexdigest()} {_seal(found.hexdigest(), key)}\n".encode())
        except OSError:
            pass  # the next process computes it again
    return found.hexdigest()


def _digests(folder: Path, selection: WeightSelection, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Compute SHA-256 of each tensor, by PyTorch's names."""

    def digest(item: tuple[str, np.ndarray]) -> tuple[str, str]:
        name, array = item
        ordered = np.asarray(tensor_names.to_torch(name, array), np.float32, order="C")
        shape = "x".join(map(str, ordered.shape))
        return tensor_names.torch_name(
            name
        ), f"{shape} {hashlib.sha256(ordered.reshape(-1).view(np.uint8).data).hexdigest()}"

    found: dict[str, str] = {}
    with ThreadPoolExecutor(_THREADS) as pool:  # hashlib and NumPy release the GIL
        for group in _groups(shapes):
            found.update(pool.map(digest, read_params(folder, group, selection).items()))
    return found


def _groups(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[list[str]]:
    """Yield names of tensors to read together: at least one, and at most `_GROUP` values."""
    group: list[str] = []
    size = 0
    for name, shape in shapes.items():
        if group and size + math.prod(shape) > _GROUP:
            yield group
            group, size = [], 0
        group.append(name)
        size += math.prod(shape)
    if group:
        yield group


# The user's cache -------------------------------------------------------------------------------------------------


def _stored_files(folder: Path) -> list[Path]:
    """Return all files of a component except those that are themselves sealed with a fingerprint.

    An index of shards may give these any names.
    """
    return sorted(path for path in files_below(folder) if path.is_file() and path.name not in (ZERO_EMBED, PREVIEW_MAP))


def _identity(folder: Path, selection: WeightSelection, wanted: list[str]) -> str:
    """Return a key that changes whenever a file is written or replaced."""
    parts: list[object] = [selection, wanted]
    for path in _stored_files(folder):
        stat = path.stat()
        parts.append(
            (
                path.relative_to(folder).as_posix(),
                stat.st_dev,
                stat.st_ino,
                stat.st_size,
                stat.st_mtime_ns,
                stat.st_ctime_ns,
            )
        )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _newest(folder: Path) -> float:
    """Return the latest change of any file, in seconds since 1970."""
    stats = [os.stat(path) for path in _stored_files(folder)]
    return max((max(stat.st_mtime, stat.st_ctime) for stat in stats), default=0.0)


def _note(key: str) -> Path | None:
    cache = user_cache()
    return cache and cache / "fingerprints" / key


def _kept(note: Path, key: str) -> str | None:
    try:
        match = _NOTE.fullmatch(read_text(note))
    except (OSError, ReadError):
        return None
    return match[1] if match and match[2] == _seal(match[1], key) else None


def _seal(fingerprint: str, key: str) -> str:
    return hashlib.sha256(f"{key} {fingerprint}".encode()).hexdigest()
