"""What the towers and MoVQ make of a whole data set, computed once and kept in files.

    OUT/encoded/about.json    what it was made of, and which items could be read
    OUT/encoded/NAME.npy      one array of `Task.encode` each, a row per item that could be read

The arrays are mapped into memory, not read, so that they may be larger than it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from kandinsky_jax.checkpoint import flat_params
from kandinsky_jax.storage import check_room, complete_or_absent
from kandinsky_jax.training.data import Captioned, DataError, Reader
from kandinsky_jax.training.tasks import DiffusionTask

CHUNK = 32  # pictures that are encoded at once


class Encoded:
    """Encoded items; called like a `Reader`, with a position in the place of a picture.

    Args:
        folder: where they lie.
    """

    def __init__(self, folder: Path):
        self.which: list[int] = json.loads((folder / "about.json").read_text())["which"]
        self._arrays = {path.stem: np.load(path, mmap_mode="r") for path in sorted(folder.glob("*.npy"))}
        self.unreadable: list[str] = []

    def __call__(self, position: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """The arrays of one item."""
        return {name: np.asarray(array[position]) for name, array in self._arrays.items()}


def encoded(
    folder: Path, task: DiffusionTask, items: Sequence[Captioned], quiet: bool = False
) -> tuple[Encoded, list[str]]:
    """What `folder` holds, computed first where it holds nothing, or what was made of other data or other weights.

    A picture is known by its name and caption: whoever puts another one into the same file has to remove the folder.

    Returns:
        the encoded items, and what could not be read, by name.
    Raises:
        DataError: where nothing could be read.
        OSError: where the disk has no room for it, before anything is written.
    """
    reader, rng = task.reader(), np.random.default_rng(0)
    mark = _mark(task, reader, items)
    about = folder / "about.json"
    if about.is_file() and json.loads(about.read_text())["mark"] == mark:
        return Encoded(folder), []
    which: list[int] = []
    arrays: dict[str, np.ndarray] = {}
    with complete_or_absent(folder, overwrite=True) as scratch:
        for start in tqdm(range(0, len(items), CHUNK), desc="encode", unit="batch", disable=quiet):
            read = {i: reader(items[i], rng) for i in range(start, min(start + CHUNK, len(items)))}
            found = {i: row for i, row in read.items() if row is not None}
            if not found:
                continue
            rows = list(found.values())
            # One shape, one program: the last chunk is filled up.
            rows += [rows[-1]] * (min(CHUNK, len(items)) - len(rows))
            batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
            values = {name: np.asarray(value) for name, value in task.encode(batch).items()}
            arrays = arrays or _create(scratch, len(items), values)
            for name, value in values.items():
                arrays[name][len(which) : len(which) + len(found)] = value[: len(found)]
            which += found
        if not which:
            raise DataError("the data", reader.unreadable)
        (scratch / "about.json").write_text(json.dumps({"mark": mark, "which": which}))
    return Encoded(folder), reader.unreadable


def _create(folder: Path, rows: int, like: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Files for so many rows. They are mapped: a disk that fills up later would end the process without a word."""
    check_room(folder, "encoded data", rows * sum(array[:1].nbytes for array in like.values()))
    return {
        name: np.lib.format.open_memmap(folder / f"{name}.npy", "w+", array.dtype, (rows, *array.shape[1:]))
        for name, array in like.items()
    }


def _mark(task: DiffusionTask, reader: Reader, items: Sequence[Captioned]) -> str:
    """Of all that decides what is encoded but the pictures themselves: names, captions, settings and weights."""
    settings = (task.of_prior, reader.resolution, reader.length, reader.hints, reader.processor)
    found = hashlib.sha256(repr(settings).encode())
    for item in items:
        found.update(repr((item.name, item.text)).encode())
    for name, module in sorted(task.encoders.items()):
        for path, leaf in sorted(flat_params(module).items()):
            found.update(f"{name}.{path}".encode() + np.asarray(leaf).tobytes())
    return found.hexdigest()
