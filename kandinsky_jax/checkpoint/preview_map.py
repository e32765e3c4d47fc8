"""A linear map from latents to a small picture, for previews while a picture forms.

Each latent and its eight neighbours give `SIDE` x `SIDE` pixels: 3 x 3 x 4 latents to 12 numbers, and a bias. It is
fitted by least squares to what MoVQ decodes from the latents of drawn pictures, since there is no data. On 50 emoji of
`tiny`, R^2 is 0.87 and the mean error 15 of 255; with the drawn pictures themselves as the target 0.85 and 18, without
the neighbours 0.78 and 20. One pixel for each latent has 0.93 and 10, of what are too few pixels to see anything
(tpu_scripts/serve/previews.py, tpu_scripts/results/previews-2026-12-01.md).

The fit depends on the weights alone, so it is kept: in the model's folder beside MoVQ's weights (`store`), else in the
user's cache, both under a fingerprint of the weights.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import warnings
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from kandinsky_jax.checkpoint.drawn_pictures import drawn_pictures
from kandinsky_jax.checkpoint.networks import flat_params, folder_of
from kandinsky_jax.checkpoint.tensor_files import PREVIEW_MAP
from kandinsky_jax.common.atomic import replace_file
from kandinsky_jax.common.errors import CheckpointError, shorten
from kandinsky_jax.common.reading import ReadError, read_json_object
from kandinsky_jax.common.storage import user_cache
from kandinsky_jax.compilation import for_real
from kandinsky_jax.diffusion import Network
from kandinsky_jax.diffusion.calls import call
from kandinsky_jax.models import VQModel

SIDE = 2  # pixels of a latent, along a side
NEIGHBOURS = 3  # rows and columns of latents that a pixel is computed from
RIDGE = 1e-4  # of the least squares, in mean squares of a latent
DIGITS = 5  # of the stored numbers
MAX_BYTES = 1 << 17  # of a stored map

_LARGE = 20_000_000  # parameters, from which on few and larger pictures are encoded
_PICTURES = ((128, 64), (6, 256))  # number and side, for small and for large networks
_PIXELS = 1 << 16  # at once
_VERSION = 1  # of the fit and the fingerprint


@dataclasses.dataclass(frozen=True)
class PreviewMap:
    """A linear map from latents to pixels.

    Args:
        weights: float32 `[n, n, C, s, s, 3]`: from n x n neighbours of C channels to s x s pixels.
        bias: float32 `[s, s, 3]`.
    """

    weights: np.ndarray
    bias: np.ndarray

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        return self.weights.shape[2]

    def __call__(self, latents: np.ndarray) -> np.ndarray:
        """Map latents `[B, h, w, C]` to pixels, float32 `[B, s h, s w, 3]`, about -1..1."""
        given = _neighbourhoods(latents, len(self.weights))
        values = given @ self.weights.reshape(given.shape[-1], -1) + self.bias.reshape(-1)
        return _as_picture(values, len(self.bias))


def of(movq: VQModel) -> PreviewMap:
    """Return the map of a MoVQ: read from its folder or the user's cache, else fitted, and cached.

    Raises:
        CheckpointError: where MoVQ gives numbers that are not finite.
    """
    mark = fingerprint(movq)
    cached = _cached(mark)
    for path in (_stored(movq), cached):
        if path is not None and (found := _read(path, mark, movq.config.latent_channels)) is not None:
            return found
    found = fit(movq)
    if cached is not None:
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            _write(cached, found, mark)
        except OSError:
            pass  # the next process fits it again
    return found


def fingerprint(movq: VQModel) -> str:
    """Return a fingerprint of the weights, the same for every layout, dtype and quantization of them.

    Of the layers that quantization leaves as they are, all others have been trained with them; in bfloat16, to which
    wider values are rounded.
    """
    found = hashlib.sha256(f"{_VERSION} {movq.config.norm_num_groups}".encode())
    for name, array in sorted(flat_params(movq).items()):
        if not re.fullmatch(VQModel.QUANTIZED, name.rpartition(".")[0]):
            values = np.ascontiguousarray(np.asarray(array).astype(ml_dtypes.bfloat16))
            found.update(f"{name} {values.shape} ".encode())
            found.update(values.reshape(-1).view(np.uint8).data)
    return found.hexdigest()


def store(movq: VQModel, folder: Path) -> None:
    """Fit the map of a MoVQ, and write it into its folder."""
    _write(folder / PREVIEW_MAP, fit(movq), fingerprint(movq))


def copy_stored(movq: VQModel, target: Path, source: Path | None = None) -> None:
    """Copy the map to another folder, if it is there and of a MoVQ's weights.

    Args:
        target: the folder to write it into.
        source: the folder that holds it, None for the one that the MoVQ was read from.
    """
    path = _stored(movq) if source is None else source / PREVIEW_MAP
    if path is not None and path.is_file():
        mark = fingerprint(movq)
        if (found := _read(path, mark, movq.config.latent_channels)) is not None:
            _write(target / PREVIEW_MAP, found, mark)


# The fit ----------------------------------------------------------------------------------------------------------


def fit(movq: VQModel) -> PreviewMap:
    """Fit the map to what MoVQ decodes from the latents of drawn pictures.

    On two busy CPU cores it takes 10 seconds for the embedded model, and 6 minutes and 0.6 GB besides the weights for
    one of the official shape, most of it for compiling. On a mesh, it runs on one device.
    """
    size = sum(array.size for array in flat_params(movq).values())
    count, side = _PICTURES[size > _LARGE]
    latents, pixels = encoded_and_decoded(movq, drawn_pictures(count, side))
    return fit_to(latents, pixels)


def fit_to(latents: np.ndarray, pixels: np.ndarray, neighbours: int = NEIGHBOURS, side: int = SIDE) -> PreviewMap:
    """Solve the least squares.

    Args:
        latents: `[B, h, w, C]`.
        pixels: what they show, `[B, H, W, 3]` in -1..1.
        neighbours: rows and columns of latents that a pixel is computed from, an odd number.
        side: pixels for a latent, along a side.
    Raises:
        CheckpointError: for numbers that are not finite.
    """
    if not (np.isfinite(latents).all() and np.isfinite(pixels).all()):
        raise CheckpointError("MoVQ encodes or decodes pictures to numbers that are not finite, its weights are wrong")
    given = _neighbourhoods(latents, neighbours)
    given = given.reshape(-1, given.shape[-1]).astype(np.float64)
    wanted = _by_latents(small_pictures(pixels, latents.shape[1] * side), side)
    wanted = wanted.reshape(-1, wanted.shape[-1]).astype(np.float64)
    mean, level = given.mean(0), wanted.mean(0)
    centred = given - mean
    penalty = RIDGE * len(given) * np.mean(given**2) * np.eye(given.shape[1])
    weights = np.linalg.solve(centred.T @ centred + penalty, centred.T @ (wanted - level))
    bias = level - mean @ weights
    shape = (neighbours, neighbours, latents.shape[-1], side, side, 3)
    return PreviewMap(weights.astype(np.float32).reshape(shape), bias.astype(np.float32).reshape(shape[3:]))


def encoded_and_decoded(movq: VQModel, pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the latents of pictures, float32 `[B, h, w, C]`, and what is decoded from them, clipped to -1..1.

    A few pictures at a time, so that memory is bounded.
    """
    network, params = Network.split(movq)
    if network.mesh is not None:
        network = Network(network.graphdef)
        params = jax.tree.map(lambda array: jax.device_put(np.asarray(array)), params)
    most = max(1, _PIXELS // (pictures.shape[1] * pictures.shape[2]))
    latents, decoded = [], []
    with for_real():
        for start in range(0, len(pictures), most):
            found = call(network, params, pictures[start : start + most], method="encode")
            latents.append(np.asarray(found, np.float32))
            decoded.append(np.asarray(call(network, params, found, method="decode"), np.float32).clip(-1, 1))
    return np.concatenate(latents), np.concatenate(decoded)


def small_pictures(pixels: np.ndarray, height: int) -> np.ndarray:
    """Average pictures `[B, H, W, 3]` over squares, to `[B, height, ..., 3]`."""
    batch, rows, columns, colours = pixels.shape
    factor = rows // height
    squares = pixels.reshape(batch, height, factor, columns // factor, factor, colours)
    return squares.mean((2, 4), dtype=np.float32)


def _neighbourhoods(latents: np.ndarray, neighbours: int) -> np.ndarray:
    """Return each latent of `[B, h, w, C]` with its neighbours, float32 `[B, h, w, n n C]`; the edge is repeated."""
    (_, height, width, _), reach = latents.shape, neighbours // 2
    padded = np.pad(np.asarray(latents, np.float32), ((0, 0), (reach, reach), (reach, reach), (0, 0)), mode="edge")
    parts = [padded[:, y : y + height, x : x + width] for y in range(neighbours) for x in range(neighbours)]
    return np.concatenate(parts, axis=-1)


def _as_picture(values: np.ndarray, side: int) -> np.ndarray:
    """Arrange the pixels of each latent, `[B, h, w, 3 s^2]`, as pictures `[B, s h, s w, 3]`."""
    batch, height, width, _ = values.shape
    grid = values.reshape(batch, height, width, side, side, 3).transpose(0, 1, 3, 2, 4, 5)
    return grid.reshape(batch, side * height, side * width, 3)


def _by_latents(pictures: np.ndarray, side: int) -> np.ndarray:
    """Do the reverse of `_as_picture`."""
    batch, rows, columns, _ = pictures.shape
    grid = pictures.reshape(batch, rows // side, side, columns // side, side, 3).transpose(0, 1, 3, 2, 4, 5)
    return grid.reshape(batch, rows // side, columns // side, 3 * side**2)


# Files ------------------------------------------------------------------------------------------------------------


def _stored(movq: VQModel) -> Path | None:
    folder = folder_of(movq)
    return folder and folder / PREVIEW_MAP


def _cached(mark: str) -> Path | None:
    cache = user_cache()
    return cache and cache / "preview_maps" / f"{mark}.json"


def _read(path: Path, mark: str, channels: int) -> PreviewMap | None:
    """Read a map of these weights; one of others is skipped, and a damaged one with a warning."""
    try:
        content = read_json_object(path, MAX_BYTES)
    except FileNotFoundError:
        return None
    except ReadError as error:
        warnings.warn(f"{path} {shorten(error)}, and is not used", stacklevel=3)
        return None
    if content.get("fingerprint") != mark:
        return None
    weights, bias = _numbers(content.get("weights")), _numbers(content.get("bias"))
    if weights.shape != (NEIGHBOURS, NEIGHBOURS, channels, SIDE, SIDE, 3) or bias.shape != (SIDE, SIDE, 3):
        warnings.warn(f"{path} is damaged and not used: its numbers are not those of a map", stacklevel=3)
        return None
    return PreviewMap(weights, bias)


def _numbers(value: Any) -> np.ndarray:
    """Return finite numbers as an array, an empty one where they are none."""
    try:
        found = np.array(value, np.float32)
    except (TypeError, ValueError, OverflowError):
        return np.zeros(0, np.float32)
    return found if np.isfinite(found).all() else np.zeros(0, np.float32)


def _write(path: Path, found: PreviewMap, mark: str) -> None:
    numbers = {name: np.round(getattr(found, name).astype(float), DIGITS).tolist() for name in ("bias", "weights")}
    replace_file(path, (json.dumps({"fingerprint": mark} | numbers) + "\n").encode())
