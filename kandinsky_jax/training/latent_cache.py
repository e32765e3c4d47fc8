"""Cache of a whole data set as encoded by the towers and MoVQ.

    OUT/encoded/about.json    format version, digest of the inputs, which items could be read, checksums
    OUT/encoded/NAME.npy      one array of `TrainingTask.encode`, with an entry for each readable item

The arrays are memory-mapped, so they may be larger than memory.
"""

from __future__ import annotations

import hashlib
import json
import warnings
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from kandinsky_jax.checkpoint import flat_params
from kandinsky_jax.common import reading
from kandinsky_jax.common.errors import shorten
from kandinsky_jax.common.storage import check_free_space, complete_or_absent
from kandinsky_jax.training.data import Captioned, DataError, Reader, data_fingerprint
from kandinsky_jax.training.run_record import weights_digest
from kandinsky_jax.training.tasks import DiffusionTask

CACHED_AT_ONCE = 32  # pictures that are encoded at once
CACHE_VERSION = 2
READ_BYTES = 2**22
MAX_ABOUT_BYTES = 2**30


class StaleCacheError(ValueError):
    """The cache is damaged, or was made from other inputs."""


class LatentCache:
    """Encoded items; called like a `Reader`, with an index instead of a picture.

    Args:
        folder: of the arrays.
        about: content of about.json.
    Raises:
        StaleCacheError: if a file is missing or damaged.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]):
        self.which: list[int] = about["which"]
        self.unreadable: dict[str, str] = {}
        self._arrays = {}
        for name, expected in about["files"].items():
            path = folder / f"{name}.npy"
            if _checksum(path) != expected:
                raise StaleCacheError(f"{path.name} is damaged")
            self._arrays[name] = np.load(path, mmap_mode="r")

    def __call__(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Return the arrays of one item."""
        return {name: np.asarray(array[index]) for name, array in self._arrays.items()}


def open_latent_cache(
    folder: Path, task: DiffusionTask, items: Sequence[Captioned], quiet: bool = False
) -> tuple[LatentCache, dict[str, str]]:
    """Open the cache in `folder`, encoding the data first if it is missing, damaged, or made from other inputs.

    The inputs are data, weights and settings; a picture is identified by name, caption, size and modification time.

    Returns:
        the encoded items, and the reasons why others could not be read, by name.
    Raises:
        DataError: if nothing could be read.
        OSError: if the disk is too small, before anything is written.
    """
    reader, rng = task.reader(), np.random.default_rng(0)
    mark = _mark(task, reader, items)
    try:
        return LatentCache(folder, _about(folder / "about.json", mark)), {}
    except FileNotFoundError:
        pass
    except (StaleCacheError, OSError, ValueError, EOFError) as error:
        warnings.warn(f"{folder} is not used, all pictures are encoded again: {shorten(str(error), 150)}", stacklevel=2)
    which: list[int] = []
    arrays: dict[str, np.memmap] = {}
    with complete_or_absent(folder, overwrite=True) as scratch:
        for start in tqdm(range(0, len(items), CACHED_AT_ONCE), desc="encode", unit="batch", disable=quiet):
            read = {i: reader(items[i], rng) for i in range(start, min(start + CACHED_AT_ONCE, len(items)))}
            found = {i: row for i, row in read.items() if row is not None}
            if not found:
                continue
            rows = list(found.values())
            # The last chunk is padded, so that one program is enough.
            rows += [rows[-1]] * (min(CACHED_AT_ONCE, len(items)) - len(rows))
            batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
            values = {name: np.asarray(value) for name, value in task.encode(batch).items()}
            arrays = arrays or _create(scratch, len(items), values)
            for name, value in values.items():
                arrays[name][len(which) : len(which) + len(found)] = value[: len(found)]
            which += found
        if not which:
            raise DataError(task.config.data, list(reader.unreadable.values()))
        for array in arrays.values():
            array.flush()
        files = {name: _checksum(scratch / f"{name}.npy") for name in arrays}
        about = {"format_version": CACHE_VERSION, "mark": mark, "which": which, "files": files}
        about["checksum"] = _digest(about)
        (scratch / "about.json").write_text(json.dumps(about))
    return LatentCache(folder, about), reader.unreadable


def _about(path: Path, mark: str) -> dict[str, object]:
    """Read about.json; StaleCacheError if it is damaged or of other inputs."""
    if not path.parent.exists():
        raise FileNotFoundError(path)
    try:
        about = reading.read_json_object(path, MAX_ABOUT_BYTES)
    except (OSError, reading.ReadError):
        raise StaleCacheError(f"{path.name} is damaged or missing") from None
    if about.get("format_version") != CACHE_VERSION:
        raise StaleCacheError("it is of another format version")
    if about.pop("checksum", None) != _digest(about):
        raise StaleCacheError(f"{path.name} is damaged")
    if about["mark"] != mark:
        raise StaleCacheError("it was made of other pictures, captions, weights or settings")
    return about


def _digest(about: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _checksum(path: Path) -> list[int]:
    """Return a file's size and CRC-32."""
    found = 0
    if not path.is_file():
        raise StaleCacheError(f"{path.name} is missing")
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            found = zlib.crc32(block, found)
        return [file.tell(), found]


def _create(folder: Path, rows: int, like: dict[str, np.ndarray]) -> dict[str, np.memmap]:
    """Create memory-mapped files for `rows` items; space is checked first, since a full disk would kill the process."""
    check_free_space(folder, "encoded data", rows * sum(array[:1].nbytes for array in like.values()))
    return {
        name: np.lib.format.open_memmap(folder / f"{name}.npy", "w+", array.dtype, (rows, *array.shape[1:]))
        for name, array in like.items()
    }


def _mark(task: DiffusionTask, reader: Reader, items: Sequence[Captioned]) -> str:
    """Return a digest of the inputs: pictures (by name, caption, size and time), settings and weights."""
    settings = (task.component == "prior", reader.resolution, reader.length, reader.hints, reader.processor)
    found = hashlib.sha256(repr(settings).encode())
    found.update(data_fingerprint(items, modified=True).encode())
    for name, module in sorted(task.encoders.items()):
        found.update(f"{name} {weights_digest(flat_params(module))}".encode())
    return found.hexdigest()
