"""A fingerprint of all of a network's stored numbers, which ties to them what was computed of them."""

from __future__ import annotations

import hashlib
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from kandinsky_jax.atomic import replace_file
from kandinsky_jax.checkpoint.networks import flat_params, read_params
from kandinsky_jax.models.layers import abstract
from kandinsky_jax.reading import ReadError, read_text
from kandinsky_jax.storage import files_below, user_cache
from kandinsky_jax.tensors import names
from kandinsky_jax.tensors.files import PREFERRED, ZERO_EMBED, WeightSelection

_GROUP = 1 << 25  # numbers that are read at once
_THREADS = 4
_SETTLED_S = 2.0  # a file that changed within this time may change again without another time stamp
_NOTE = re.compile(r"([0-9a-f]{64}) ([0-9a-f]{64})\n")


def weights_fingerprint(
    cls: type[nnx.Module], config: Any, folder: Path, selection: WeightSelection = PREFERRED
) -> str:
    """SHA-256 of every number of every tensor of a checked network, as 64 hexadecimal digits.

    It is of the numbers in float32, by PyTorch's names and in PyTorch's order of axes, so that it is the same for every
    layout and dtype that holds the same numbers.

    All bytes are read for it, once: the result is kept in the user's cache under the files' identities (device, inode,
    size, times of modification and of change), and is looked up there while none of these changes.

    Raises:
        CheckpointError: where a tensor cannot be read.
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
    """SHA-256 of each tensor, by PyTorch's names."""

    def digest(item: tuple[str, np.ndarray]) -> tuple[str, str]:
        name, array = item
        ordered = np.asarray(names.to_torch(name, array), np.float32, order="C")
        shape = "x".join(map(str, ordered.shape))
        return names.torch_name(name), f"{shape} {hashlib.sha256(ordered.reshape(-1).view(np.uint8).data).hexdigest()}"

    found: dict[str, str] = {}
    with ThreadPoolExecutor(_THREADS) as pool:  # hashlib and NumPy leave the interpreter free meanwhile
        for group in _groups(shapes):
            found.update(pool.map(digest, read_params(folder, group, selection).items()))
    return found


def _groups(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[list[str]]:
    """Names of tensors that are read together: at least one, and at most `_GROUP` numbers."""
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
    """A component's files, without the embedding that is itself tied to a fingerprint.

    All of them, because an index of shards may give these any names.
    """
    return sorted(path for path in files_below(folder) if path.is_file() and path.name != ZERO_EMBED)


def _identity(folder: Path, selection: WeightSelection, wanted: list[str]) -> str:
    """What changes whenever a file is written or replaced."""
    parts: list[Any] = [selection, wanted]
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
    """When a file last changed, in seconds since 1970."""
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
