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

import jax
import numpy as np
from tqdm.auto import tqdm

from kandinsky_jax.checkpoint import flat_params
from kandinsky_jax.storage import complete_or_absent
from kandinsky_jax.training.data import Captioned, DataError
from kandinsky_jax.training.tasks import Task

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


def encoded(folder: Path, task: Task, items: Sequence[Captioned], quiet: bool = False) -> tuple[Encoded, list[str]]:
    """What `folder` holds, computed first where it holds nothing, or what was made of other data or other weights.

    Returns:
        the encoded items, and what could not be read, by name.
    Raises:
        DataError: where nothing could be read.
    """
    mark = _mark(task, items)
    about = folder / "about.json"
    if about.is_file() and json.loads(about.read_text())["mark"] == mark:
        return Encoded(folder), []
    reader, rng = task.reader(), np.random.default_rng(0)
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
            for name, value in task.encode(batch).items():
                if name not in arrays:
                    arrays[name] = _create(scratch / f"{name}.npy", len(items), value)
                arrays[name][len(which) : len(which) + len(found)] = np.asarray(value)[: len(found)]
            which += found
        if not which:
            raise DataError("the data", reader.unreadable)
        (scratch / "about.json").write_text(json.dumps({"mark": mark, "which": which}))
    return Encoded(folder), reader.unreadable


def _create(path: Path, rows: int, like: jax.Array) -> np.ndarray:
    return np.lib.format.open_memmap(path, "w+", np.dtype(like.dtype), (rows, *like.shape[1:]))


def _mark(task: Task, items: Sequence[Captioned]) -> str:
    """Of all that decides what is encoded: the items' names, captions and sizes, the settings, and the weights."""
    config = task.config
    found = hashlib.sha256(repr((str(task.kind), config.resolution, config.text_length)).encode())
    for item in items:
        found.update(repr((item.name, item.text)).encode())
    for name, module in sorted(task.encoders.items()):
        for path, leaf in sorted(flat_params(module).items()):
            found.update(f"{name}.{path}".encode() + np.asarray(leaf).tobytes())
    return found.hexdigest()
