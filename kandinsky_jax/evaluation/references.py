"""Features of a reference set in one file, so that the set itself is not needed again.

A .safetensors file from `save_features` has the features of every picture, in chunks named EXTRACTOR/NUMBER, and the
extractors' fingerprints in its header. A .npz file with `mu` and `sigma`, as pytorch-fid and others write, has the mean
and covariance of Inception features alone, which is enough for FID; which network made them, it does not say.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from kandinsky_jax.checkpoint.tensor_files import Tensor, open_tensors, write
from kandinsky_jax.common.errors import shorten
from kandinsky_jax.evaluation.distances import Moments, Rows
from kandinsky_jax.evaluation.extractors import INCEPTION, Extractor
from kandinsky_jax.evaluation.feature_store import FeatureSet, StoredArray

CHUNK = 1024  # rows
SUFFIXES = (".safetensors", ".npz")
_FORMAT = "kandinsky_jax_features"


def is_saved(path: str | os.PathLike[str]) -> bool:
    """Whether a path is that of saved features, by its suffix."""
    return os.fspath(path).lower().endswith(SUFFIXES)


def save_features(path: str | os.PathLike[str], features: FeatureSet, extractors: Sequence[Extractor]) -> None:
    """Write features into a .safetensors file atomically, a chunk in memory at a time.

    Args:
        extractors: of features of this set.
    Raises:
        OSError: where it cannot be written.
    """
    tensors = {}
    for one in extractors:
        rows = features.features[one.name]
        for number, start in enumerate(range(0, len(rows), CHUNK)):
            shape = (min(CHUNK, len(rows) - start), np.shape(rows[:1])[1])
            tensors[f"{one.name}/{number:06d}"] = Tensor(shape, partial(_read, rows, start), np.dtype(np.float32))
    prints = {one.name: _digest(one) for one in extractors}
    write(Path(path), tensors, {_FORMAT: "1", **prints})


def _read(rows: Rows, start: int) -> np.ndarray:
    return np.asarray(rows[start : start + CHUNK], np.float32)


def _digest(extractor: Extractor) -> str:
    return hashlib.sha256(extractor.fingerprint().encode()).hexdigest()


class SavedFeatures:
    """A file of saved features; its numbers are read later.

    Args:
        path: of the file.
    Raises:
        ValueError: where it is not one.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        shown = shorten(str(self.path), 240)
        if not self.path.is_file():
            raise ValueError(f"reference: there is no file {shown}")
        self._prints: dict[str, str] = {}
        self._tensors: dict[str, Tensor] = {}
        self._moments: dict[str, Moments] = {}
        if self.path.suffix.lower() == ".npz":
            self._moments[INCEPTION] = _moments_in(self.path)
        else:
            self._tensors = open_tensors(self.path)
            try:
                with safe_open(self.path, framework="numpy") as file:
                    self._prints = dict(file.metadata() or {})
            except (SafetensorError, OSError) as error:
                raise ValueError(f"reference: {shown} cannot be read: {shorten(error, 120)}") from None
            self._prints.pop("format", None)  # safetensors' own
            if self._prints.pop(_FORMAT, None) != "1":
                raise ValueError(
                    f"reference: {shown} holds no features of this version; --save-features writes such files"
                )
        self.about: dict[str, object] = {"kind": "saved features", "path": shorten(str(self.path), 2000)}

    def faults(self, extractors: Sequence[Extractor]) -> list[str]:
        """List features that are not there, or that another network has computed."""
        found = []
        shown = shorten(str(self.path), 240)
        for one in extractors:
            if one.name in self._moments:
                continue
            if one.name not in self._prints:
                there = ", ".join([*self._prints, *(f"means and covariances of {name}" for name in self._moments)])
                found.append(f"reference: {shown} has no {one.name} features; it has {there}")
            elif self._prints[one.name] != _digest(one):
                found.append(
                    f"reference: the {one.name} features in {shown} were computed with other weights or settings than "
                    "those to compare; compute both with the same"
                )
        return found

    def collect(self, scratch: Path, prefix: str, names: Sequence[str]) -> FeatureSet:
        """Return the features of some extractors; files of them are in `scratch`, a local folder."""
        features: dict[str, Rows] = {}
        for name in names:
            chunks = [tensor for key, tensor in sorted(self._tensors.items()) if key.rpartition("/")[0] == name]
            if not chunks:
                continue
            path = scratch / f"{prefix}{name}.float32"
            with path.open("wb") as file:
                for chunk in chunks:
                    np.ascontiguousarray(chunk.read(), np.float32).tofile(file)
            features[name] = StoredArray(path, chunks[0].shape[1])
        return FeatureSet([], [], features, {name: self._moments[name] for name in names if name in self._moments})


def _moments_in(path: Path) -> Moments:
    """Read `mu` and `sigma` of a .npz file; nothing in it is unpickled."""
    shown = shorten(str(path), 240)
    try:
        with np.load(path, allow_pickle=False) as file:
            mean, covariance = (np.asarray(file[name], np.float64) for name in ("mu", "sigma"))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(
            f"reference: {shown} cannot be read: {shorten(error, 120)}; needed are the arrays mu [D] and sigma [D, D]"
        ) from None
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(f"reference: {shown} has mu {mean.shape} and sigma {covariance.shape}, needed [D] and [D, D]")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError(f"reference: {shown} has numbers that are not finite")
    return Moments(2, mean, covariance)  # of two rows, the covariance is the scatter
