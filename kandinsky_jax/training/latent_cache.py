"""Cache of a whole data set as encoded by the towers and MoVQ.

    OUT/encoded/00000/            a part: the items 0 .. PART_ITEMS - 1
    OUT/encoded/00000/NAME.npy    one array of `TrainingTask.encode`, with an entry for each readable item
    OUT/encoded/00000/about.json  format version, digest of the inputs, which items could be read, checksums, and the
                                  process that has encoded it

Parts are complete or absent, so encoding goes on where it was stopped, and several processes encode a part each. The
arrays are memory-mapped, so they may be larger than memory.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import threading
import warnings
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from kandinsky_jax.checkpoint import flat_params
from kandinsky_jax.common import reading
from kandinsky_jax.common.errors import shorten, summarize
from kandinsky_jax.common.storage import check_free_space, complete_or_absent
from kandinsky_jax.parallel.hosts import Hosts
from kandinsky_jax.training.data import Captioned, DataError, Reader, data_fingerprint
from kandinsky_jax.training.run_folder import ENCODED, RunFolder
from kandinsky_jax.training.run_record import weights_digest
from kandinsky_jax.training.tasks import DiffusionTask

ABOUT = "about.json"
CACHED_AT_ONCE = 32  # pictures that are encoded at once
PART_ITEMS = 512
OPEN_PARTS = 64  # a memory-mapped file keeps a file descriptor
CACHE_VERSION = 3
READ_BYTES = 2**22
MAX_ABOUT_BYTES = 2**30


class StaleCacheError(ValueError):
    """A part of the cache is damaged, or was made from other inputs."""


class LatentCache:
    """Encoded items; called like a `Reader`, with an index instead of a picture.

    Args:
        parts: (folder, content of about.json) of each part, in order.
    """

    def __init__(self, parts: Sequence[tuple[Path, Mapping[str, Any]]]):
        self.which: list[int] = [index for _, about in parts for index in about["which"]]
        self.unreadable: dict[str, str] = {}
        self._ends = np.cumsum([len(about["which"]) for _, about in parts])
        self._files = [{name: folder / f"{name}.npy" for name in about["files"]} for folder, about in parts]
        self._opened = functools.lru_cache(OPEN_PARTS)(self._open)
        self._opening = threading.Lock()

    def _open(self, part: int) -> dict[str, np.ndarray]:
        # NumPy parses a file's header as Python. Two threads at once sometimes fail in CPython 3.11 ("AST constructor
        # recursion depth mismatch", python/cpython#106905).
        with self._opening:
            return {name: np.load(path, mmap_mode="r") for name, path in self._files[part].items()}

    def __call__(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Return the arrays of one item, number `index` of those in `which`."""
        part = int(np.searchsorted(self._ends, index, side="right"))
        row = index - (int(self._ends[part - 1]) if part else 0)
        return {name: np.asarray(array[row]) for name, array in self._opened(part).items()}


def open_latent_cache(
    run_folder: RunFolder,
    task: DiffusionTask,
    items: Sequence[Captioned],
    quiet: bool = False,
    hosts: Hosts | None = None,
) -> tuple[LatentCache, dict[str, str]]:
    """Open the cache in a run's folder, encoding first what is missing, damaged, or made from other inputs. Collective.

    The inputs are data, weights and settings; a picture is identified by name, caption, size and modification time.

    Args:
        run_folder: which all processes share; at a URL, parts are published, and copied by each process.
        hosts: the processes of the run; each verifies and encodes its part of the parts.
    Returns:
        the encoded items, and the reasons why others could not be read, by name.
    Raises:
        DataError: if nothing could be read.
        OSError: if the disk is too small, before anything is written.
    """
    hosts = Hosts() if hosts is None else hosts
    reader = task.reader()
    mark = hosts.exchange(_mark(task, reader, items))[0]  # times of the same files may differ between hosts
    folder = run_folder.path / ENCODED
    numbers = range(-(-len(items) // PART_ITEMS))
    if hosts.first or run_folder.remote:
        _clear(folder, len(numbers))
    hosts.wait()
    mine = numbers[hosts.index :: hosts.count]
    for number in mine:
        run_folder.bring_folder(f"{ENCODED}/{_name(number)}", ABOUT)
    missing = _missing_parts(folder, mark, mine)
    encoder = _Encoder(task, reader, items, mark, hosts.index)
    with tqdm(total=sum(len(encoder.items_of(n)) for n in missing), desc="encode", unit="item", disable=quiet) as bar:
        for done, number in enumerate(missing):
            needed = sum(len(encoder.items_of(other)) for other in missing[done:])
            encoder.write(folder / _name(number), number, needed, bar)
            run_folder.publish_folder(f"{ENCODED}/{_name(number)}", ABOUT)
    hosts.wait()  # all parts are there
    parts = []
    for number in numbers:
        run_folder.bring_folder(f"{ENCODED}/{_name(number)}", ABOUT)
        parts.append((folder / _name(number), _about(folder / _name(number), mark)))
    unreadable = {name: fault for _, about in parts for name, fault in about["unreadable"].items()}
    if not any(about["which"] for _, about in parts):
        raise DataError(task.config.data, list(unreadable.values()))
    return LatentCache(parts), unreadable


def _clear(folder: Path, parts: int) -> None:
    """Make the folder, and remove what an older version wrote there, or for more items."""
    if folder.exists() and not folder.is_dir():
        folder.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    for path in [*folder.glob("*.npy"), folder / ABOUT]:
        path.unlink(missing_ok=True)
    for path in folder.glob("[0-9]" * 5):
        if int(path.name) >= parts:
            shutil.rmtree(path, ignore_errors=True)


def _name(number: int) -> str:
    return f"{number:05d}"


def _missing_parts(folder: Path, mark: str, numbers: Sequence[int]) -> list[int]:
    """Return the parts that have to be encoded, with one warning for those that are there and cannot be used."""
    missing, faults = [], []
    for number in numbers:
        path = folder / _name(number)
        try:
            for name, expected in _about(path, mark)["files"].items():
                if _checksum(path / f"{name}.npy") != expected:
                    raise StaleCacheError(f"{name}.npy is damaged")
        except FileNotFoundError:
            missing.append(number)
        except (StaleCacheError, OSError, ValueError) as error:
            missing.append(number)
            faults.append(f"{path.name}: {shorten(str(error), 150)}")
    if faults:
        warnings.warn(
            f"{folder}: {len(faults)} of {len(numbers)} parts are not used, their pictures are encoded again: "
            f"{summarize(faults, 200)}",
            stacklevel=3,
        )
    return missing


class _Encoder:
    """Encodes and writes parts.

    Args:
        task, reader, items: see `open_latent_cache`.
        mark: digest of the inputs.
        process: number of this process.
    """

    def __init__(self, task: DiffusionTask, reader: Reader, items: Sequence[Captioned], mark: str, process: int):
        self._task, self._reader, self._items = task, reader, items
        self._mark, self._process = mark, process

    def items_of(self, number: int) -> range:
        """Return the items of a part."""
        return range(number * PART_ITEMS, min((number + 1) * PART_ITEMS, len(self._items)))

    def write(self, folder: Path, number: int, needed: int, bar: tqdm[Any]) -> None:
        """Encode and write one part, complete or absent.

        Args:
            folder: of the part.
            needed: items of this and all later parts, for which there must be space.
            bar: progress in items.
        """
        which: list[int] = []
        arrays: dict[str, np.memmap] = {}
        unreadable: dict[str, str] = {}
        items = self.items_of(number)
        with complete_or_absent(folder, overwrite=True) as scratch:
            for start in items[::CACHED_AT_ONCE]:
                chunk = items[start - items.start :][:CACHED_AT_ONCE]
                found, values = self._encoded(chunk)
                if found and not arrays:
                    arrays = _create(scratch, len(items), needed, values)
                for name, value in values.items():
                    arrays[name][len(which) : len(which) + len(found)] = value[: len(found)]
                which += found
                names = [self._items[i].name for i in chunk]
                unreadable |= {name: self._reader.unreadable[name] for name in names if name in self._reader.unreadable}
                bar.update(len(chunk))
            for array in arrays.values():
                array.flush()
            files = {name: _checksum(scratch / f"{name}.npy") for name in arrays}
            about = {"format_version": CACHE_VERSION, "mark": self._mark, "which": which}
            about |= {"files": files, "unreadable": unreadable, "process": self._process}
            about["checksum"] = _digest(about)
            (scratch / ABOUT).write_text(json.dumps(about))

    def _encoded(self, chunk: range) -> tuple[list[int], dict[str, np.ndarray]]:
        """Read and encode some items; returns those that could be read, and arrays whose first entries are theirs."""
        rng = np.random.default_rng(0)
        read = {i: self._reader(self._items[i], rng) for i in chunk}
        found = {i: row for i, row in read.items() if row is not None}
        if not found:
            return [], {}
        rows = list(found.values())
        # The last chunk is padded, so that one program is enough.
        rows += [rows[-1]] * (min(CACHED_AT_ONCE, len(self._items)) - len(rows))
        batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        return list(found), {name: np.asarray(value) for name, value in self._task.encode(batch).items()}


def _about(folder: Path, mark: str) -> dict[str, Any]:
    """Read the about.json of a part; StaleCacheError if it is damaged or of other inputs."""
    if not folder.exists():
        raise FileNotFoundError(folder)
    try:
        about = reading.read_json_object(folder / ABOUT, MAX_ABOUT_BYTES)
    except (OSError, reading.ReadError):
        raise StaleCacheError(f"{ABOUT} is damaged or missing") from None
    if about.get("format_version") != CACHE_VERSION:
        raise StaleCacheError("it is of another format version")
    if about.pop("checksum", None) != _digest(about):
        raise StaleCacheError(f"{ABOUT} is damaged")
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


def _create(folder: Path, rows: int, needed: int, like: Mapping[str, np.ndarray]) -> dict[str, np.memmap]:
    """Create memory-mapped files for `rows` items.

    Space for `needed` items is checked first, since a full disk would kill the process.
    """
    check_free_space(folder, "encoded data", needed * sum(array[:1].nbytes for array in like.values()))
    return {
        name: np.lib.format.open_memmap(folder / f"{name}.npy", "w+", array.dtype, (rows, *array.shape[1:]))
        for name, array in like.items()
    }


def _mark(task: DiffusionTask, reader: Reader, items: Sequence[Captioned]) -> str:
    """Return a digest of the inputs: pictures (by name, caption, size and time), settings and weights."""
    settings = (task.component == "prior", reader.resolution, reader.length, reader.hints, reader.processor)
    found = hashlib.sha256(repr(settings).encode())
    if further := task.encoding_settings:
        found.update(repr(sorted(further.items())).encode())
    found.update(data_fingerprint(items, modified=True).encode())
    for name, module in sorted(task.encoders.items()):
        found.update(f"{name} {weights_digest(flat_params(module))}".encode())
    return found.hexdigest()
