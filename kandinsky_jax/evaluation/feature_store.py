"""Features of a set of pictures, kept in files: computed once for each part, extractor and version of either.

    OUT/features/EXTRACTOR-DIGEST/PART-DIGEST.safetensors

has `features`, float32 `[N, D]`, a row for each picture of the part in order, NaN where it could not be used; and
`about`, the bytes of a JSON array with a name, a prompt and a fault for each. Files are complete or absent, so a run
that is killed loses the part that it was at. The digests are those of the extractor's fingerprint and of the part.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError
from tqdm.auto import tqdm

from kandinsky_jax import images
from kandinsky_jax.common.errors import RunError, shorten
from kandinsky_jax.common.files import Files
from kandinsky_jax.evaluation.distances import Moments, Rows
from kandinsky_jax.evaluation.extractors import Extractor, Picture
from kandinsky_jax.evaluation.sources import Part, PictureSource, StoredImage

THREADS = 8  # that decode and prepare pictures; Pillow and NumPy release the GIL
_NAME = re.compile(r"[A-Za-z0-9-]{1,60}")


class PictureFault(NamedTuple):
    """A picture that could not be evaluated."""

    picture: str
    reason: str


@dataclasses.dataclass(frozen=True)
class FeatureSet:
    """A set of pictures, as metrics see it.

    Attributes:
        names, prompts: of each picture that could be used; empty for a reference that was saved.
        features: by extractor, arrays `[N, D]` that are read from disk by slices.
        moments: by extractor, of a reference of which nothing else is known.
    """

    names: Sequence[str]
    prompts: Sequence[str]
    features: Mapping[str, Rows]
    moments: Mapping[str, Moments] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        """Number of pictures."""
        rows = next(iter(self.features.values()), None)
        return len(self.names) if rows is None else len(rows)


class StoredArray:
    """Rows of float32 in a file, read when they are asked for and not kept.

    Args:
        path: of the file.
        width: numbers of a row.
    """

    def __init__(self, path: Path, width: int):
        self._path, self._width = path, width
        self.shape = (os.path.getsize(path) // (4 * width) if width else 0, width)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            count = max(0, stop - start) * self._width
            found = np.fromfile(self._path, np.float32, count, offset=4 * start * self._width)
            return found.reshape(-1, self._width)[::step]
        with self._path.open("rb") as file:
            found = np.empty((len(rows), self._width), np.float32)
            for i, row in enumerate(np.asarray(rows)):
                file.seek(4 * self._width * int(row))
                found[i] = np.frombuffer(file.read(4 * self._width), np.float32)
            return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:] if dtype is None else self[:].astype(dtype)


class FeatureStore:
    """Kept features of one set of pictures.

    Args:
        files: of the evaluation's folder.
        folder: in it.
        source: the pictures.
        extractors: of their features.
    """

    def __init__(self, files: Files, folder: str, source: PictureSource, extractors: Sequence[Extractor]):
        if odd := [one.name for one in extractors if not _NAME.fullmatch(one.name)]:
            raise ValueError(f"names of extractors are of letters, digits and hyphens, got {shorten(odd)}")
        self._files, self._source, self._extractors = files, source, list(extractors)
        prints = {one.name: hashlib.sha256(one.fingerprint().encode()).hexdigest() for one in extractors}
        self._folders = {name: f"{folder}/{name}-{digest[:16]}" for name, digest in prints.items()}

    def compute(self, batch: int, quiet: bool = False, what: str = "features") -> int:
        """Compute what is missing, and return of how many parts.

        Args:
            batch: pictures on each device.
            what: for the progress bar.
        Raises:
            OSError: where a part cannot be read or written; others stay.
        """
        listed = {name: self._files.sizes(folder) for name, folder in self._folders.items()}
        missing = {
            part: [one for one in self._extractors if _file_name(part) not in listed[one.name]]
            for part in self._source.parts
        }
        missing = {part: some for part, some in missing.items() if some}
        total = sum(part.expected for part in missing)
        with (
            ThreadPoolExecutor(THREADS) as threads,
            tqdm(total=total, desc=what, unit="image", disable=quiet or not missing, smoothing=0.1) as bar,
        ):
            for part, some in missing.items():
                for name, (entries, features) in _extract(self._source.read(part), some, batch, threads, bar).items():
                    self._write(part, name, entries, features, listed[name])
        return len(missing)

    def _write(
        self, part: Part, name: str, entries: Sequence[_Entry], features: np.ndarray, listed: Mapping[str, object]
    ) -> None:
        """Write the features of a part, and remove those of another version of it."""
        about = json.dumps([[entry.name, entry.prompt, entry.fault] for entry in entries]).encode()
        tensors = {"features": features, "about": np.frombuffer(about, np.uint8)}
        retry = any(entry.retry for entry in entries)
        folder, file_name = self._folders[name], _file_name(part, retry)
        data = safetensors.numpy.save(tensors)
        self._files.write(f"{folder}/{file_name}", lambda file: file.write(data), overwrite=True)
        for other in listed:
            if other.startswith(f"{part.name}-") and other != file_name:
                self._files.remove(f"{folder}/{other}")

    def collect(self, scratch: Path, prefix: str) -> tuple[FeatureSet, list[PictureFault]]:
        """Bring all features together, of the pictures that every extractor could use.

        Args:
            scratch: a local folder, for as long as the result is used.
            prefix: of the names of files in it.
        Returns:
            the set, and the pictures that are not in it.
        Raises:
            RunError: where features that were computed are gone or damaged.
        """
        names: list[str] = []
        prompts: list[str] = []
        faults: list[PictureFault] = []
        paths = {name: scratch / f"{prefix}{name}.float32" for name in self._folders}
        widths = dict.fromkeys(paths, 0)
        for path in paths.values():
            path.write_bytes(b"")
        for part in self._source.parts:
            loaded = {name: self._load(part, name) for name in self._folders}
            entries = [found for _, found in loaded.values()]
            if len({len(found) for found in entries}) > 1:
                raise RunError(f"part {part.name} changed while it was read; start the evaluation again")
            good = []
            for i, same in enumerate(zip(*entries, strict=True)):
                fault = next((entry.fault for entry in same if entry.fault), "")
                if fault:
                    faults.append(PictureFault(same[0].name, fault))
                else:
                    good.append(i)
                    names.append(same[0].name)
                    prompts.append(same[0].prompt)
            for name, (features, _) in loaded.items():
                if good:
                    widths[name] = features.shape[1]
                    with paths[name].open("ab") as file:
                        features[good].tofile(file)
        stored = {name: StoredArray(path, widths[name]) for name, path in paths.items()}
        return FeatureSet(names, prompts, stored), faults

    def _load(self, part: Part, name: str) -> tuple[np.ndarray, list[_Entry]]:
        folder = self._folders[name]
        for retry in (False, True):
            path = f"{folder}/{_file_name(part, retry)}"
            try:
                found = safetensors.numpy.load(self._files.read(path))
                rows = json.loads(found["about"].tobytes())
                return found["features"], [_Entry(*row) for row in rows]
            except FileNotFoundError:
                continue
            except (SafetensorError, ValueError, KeyError, TypeError) as error:
                raise RunError(
                    f"{path} is damaged: {shorten(error, 120)}; remove it and start the evaluation again, which "
                    "computes it anew"
                ) from None
        raise RunError(f"{folder}/{_file_name(part)} is gone; start the evaluation again, which computes it anew")


def _file_name(part: Part, retry: bool = False) -> str:
    """Return the name of a part's file; one with pictures that may be readable later is made again by a later run."""
    return f"{part.name}-{part.digest[:16]}{'-retry' if retry else ''}.safetensors"


# One part ---------------------------------------------------------------------------------------------------------


class _Entry(NamedTuple):
    """A picture of a part; one without a name stands for the rest of a damaged part."""

    name: str
    prompt: str
    fault: str  # "" for a picture with features
    retry: bool = False


def _extract(
    pictures: Iterator[StoredImage], extractors: Sequence[Extractor], batch: int, threads: Executor, bar: tqdm
) -> dict[str, tuple[list[_Entry], np.ndarray]]:
    """Compute the features of a part: by extractor its entries, and a row for each, of NaN where there are none."""
    entries: list[_Entry] = []  # with the faults of the pictures themselves
    faults: dict[str, dict[int, str]] = {one.name: {} for one in extractors}  # those of an extractor, by entry
    found: dict[str, list[tuple[int, np.ndarray]]] = {one.name: [] for one in extractors}
    waiting: list[tuple[str, list[int], Any]] = []

    def collect() -> None:
        for name, rows, array in waiting:
            for row, values in zip(rows, np.asarray(array, np.float32), strict=False):  # the rest is padding
                if not np.isfinite(values).all():
                    faults[name][row] = f"its {name} features are not finite"
                found[name].append((row, values))
        waiting.clear()

    size = batch * max(one.devices for one in extractors)
    for chunk in _in_chunks(pictures, size, entries):
        first = len(entries)
        prepared = list(threads.map(lambda stored: _prepare(stored, extractors), chunk))
        for stored, arrays in zip(chunk, prepared, strict=True):
            fault = arrays if isinstance(arrays, str) else ""
            entries.append(_Entry(stored.name, stored.prompt, fault, stored.retry))
        computing: list[tuple[str, list[int], Any]] = []
        for i, one in enumerate(extractors):
            own = {first + k: arrays[i] for k, arrays in enumerate(prepared) if not isinstance(arrays, str)}
            faults[one.name] |= {row: array for row, array in own.items() if isinstance(array, str)}
            good = {row: array for row, array in own.items() if not isinstance(array, str)}
            if good:
                some = np.stack(list(good.values()))
                padded = np.concatenate([some, np.repeat(some[-1:], size - len(some), axis=0)])
                computing.append((one.name, list(good), one.encode(padded)))
        collect()  # the previous batch, while the devices compute this one
        waiting += computing
        bar.update(len(chunk))
    collect()
    return {
        name: (
            [entry._replace(fault=entry.fault or faults[name].get(i, "")) for i, entry in enumerate(entries)],
            _with_gaps(rows, len(entries)),
        )
        for name, rows in found.items()
    }


def _in_chunks(pictures: Iterator[StoredImage], size: int, entries: list[_Entry]) -> Iterator[list[StoredImage]]:
    """Yield lists of pictures; where the part is damaged, add an entry that says so after the last one."""
    chunk: list[StoredImage] = []
    damage = ""
    while not damage:
        try:
            chunk.append(next(pictures))
        except StopIteration:
            break
        except ValueError as error:
            damage = shorten(error, 300)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
    if damage:
        entries.append(_Entry("", "", damage))


def _prepare(stored: StoredImage, extractors: Sequence[Extractor]) -> list[np.ndarray | str] | str:
    """Decode a picture and prepare it for every extractor, or say why that cannot be done: at all, or for one."""
    if isinstance(stored.data, str):
        return stored.data
    try:
        image = images.rgb(images.read(io.BytesIO(stored.data), "picture"), "picture")
    except (ValueError, OSError, MemoryError) as error:
        return shorten(str(error).removeprefix("picture: it ") or type(error).__name__, 300)
    picture = Picture(stored.name, stored.prompt, image, stored.about)
    return [_prepared_for(one, picture) for one in extractors]


def _prepared_for(extractor: Extractor, picture: Picture) -> np.ndarray | str:
    if extractor.needs_prompt and not picture.prompt.strip():
        return "it has no prompt"
    try:
        return np.asarray(extractor.prepare(picture))
    except (ValueError, OSError, MemoryError) as error:
        return shorten(f"{extractor.name}: {error or type(error).__name__}", 300)


def _with_gaps(rows: Sequence[tuple[int, np.ndarray]], count: int) -> np.ndarray:
    """Return features `[count, D]` with NaN in the rows that are not given; `[count, 0]` where none are."""
    features = np.full((count, len(rows[0][1]) if rows else 0), np.nan, np.float32)
    for row, values in rows:
        features[row] = values
    return features
