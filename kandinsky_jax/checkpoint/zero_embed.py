"""The vision tower's embedding of zeros, from which a decoder is guided away without a negative prompt.

It depends only on the tower's weights, and text-to-image needs nothing else of its 1.8 billion parameters. So it is
read from the tower's folder (where `store` writes it) or from the user's cache, or else computed with one layer of the
tower in memory at a time. Stored embeddings are computed in float32 from the tensors of the checkpoint, whatever the
dtype of a pipeline, and sealed with a fingerprint of all tensors.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from kandinsky_jax.checkpoint import CheckpointError, LazyNetwork, read_params
from kandinsky_jax.checkpoint.fingerprint import weights_fingerprint
from kandinsky_jax.checkpoint.tensor_files import PREFERRED, ZERO_EMBED, WeightSelection
from kandinsky_jax.common.atomic import replace_file
from kandinsky_jax.common.errors import shorten
from kandinsky_jax.common.reading import check_regular
from kandinsky_jax.common.storage import user_cache
from kandinsky_jax.common.types import PyTree
from kandinsky_jax.compilation import for_real
from kandinsky_jax.diffusion import Network
from kandinsky_jax.diffusion.calls import call
from kandinsky_jax.models import CLIPVisionModelWithProjection
from kandinsky_jax.models.clip import CLIPEncoderLayer, CLIPVisionConfig
from kandinsky_jax.models.layers import Shapes, abstract

_TENSOR = "zero_embed"
_VERSION = 2  # of the seal; version 1 was not numbered, and its fingerprint covered few tensors


def of(tower: CLIPVisionModelWithProjection | LazyNetwork) -> np.ndarray:
    """Return the embedding of zeros (after normalisation), float32 `[1, projection_dim]`.

    For a lazy tower it is read or computed without loading the tower; for one in memory it is computed in the tower's
    dtype.
    """
    if not isinstance(tower, LazyNetwork):
        return np.asarray(call(*Network.split(tower), _zeros(tower.config)), np.float32)
    with tower.lock:
        if tower.zero_embed is None:
            tower.zero_embed = _of_folder(tower.folder, tower.config, tower.selection)
        return tower.zero_embed


def _of_folder(folder: Path, config: CLIPVisionConfig, selection: WeightSelection) -> np.ndarray:
    """Read the embedding from the folder or the user's cache, or else compute and cache it."""
    mark = fingerprint(folder, config, selection)
    if (embed := _find(folder, mark)) is None:
        embed = _compute(folder, config, selection)
        if (path := _cached(mark)) is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                _write(path, embed, mark)
            except OSError:
                pass  # the next process computes it again
    return embed


def store(folder: Path, config: CLIPVisionConfig) -> None:
    """Compute the embedding of the tower in `folder`, and write it there."""
    _write(folder / ZERO_EMBED, _compute(folder, config), fingerprint(folder, config))


def copy_stored(
    source: Path,
    target: Path,
    config: CLIPVisionConfig,
    selection: WeightSelection = PREFERRED,
    saved: WeightSelection = PREFERRED,
) -> bool:
    """Copy a stored embedding from `source` to `target` if both hold the same weights; return whether it did."""
    mark = fingerprint(source, config, selection)
    if (embed := _find(source, mark)) is None or fingerprint(target, config, saved) != mark:
        return False
    _write(target / ZERO_EMBED, embed, mark)
    return True


def fingerprint(folder: Path, config: CLIPVisionConfig, selection: WeightSelection = PREFERRED) -> str:
    """Return a fingerprint of all values of all tensors in `folder`, and of settings that no tensor's shape shows.

    It is the same for every layout and dtype with the same values, see `weights_fingerprint`.
    """
    settings = (config.num_hidden_layers, config.num_attention_heads, config.hidden_act, config.layer_norm_eps)
    weights = weights_fingerprint(CLIPVisionModelWithProjection, config, folder, selection)
    return hashlib.sha256(f"{settings!r} {weights}".encode()).hexdigest()


def _zeros(config: CLIPVisionConfig) -> jax.Array:
    return jnp.zeros((1, config.image_size, config.image_size, config.num_channels), jnp.float32)


def _compute(folder: Path, config: CLIPVisionConfig, selection: WeightSelection = PREFERRED) -> np.ndarray:
    """Compute the embedding in float32, one layer at a time."""

    def run(
        module: nnx.Module, prefix: str, *args: jax.Array | np.ndarray | None, method: str = "__call__"
    ) -> np.ndarray:
        network, shapes = Network.split(module)
        wanted, structure = _named(shapes, prefix)
        arrays = read_params(folder, wanted, selection)
        params = jax.tree.unflatten(structure, [jnp.asarray(arrays[name], jnp.float32) for name in wanted])
        return np.asarray(call(network, params, *args, method=method))

    frame = abstract(CLIPVisionModelWithProjection, dataclasses.replace(config, num_hidden_layers=0))
    layer = CLIPEncoderLayer(config, rngs=Shapes())
    with for_real():
        hidden = run(frame, "", _zeros(config), method="stem")
        for i in range(config.num_hidden_layers):
            hidden = run(layer, f"vision_model.encoder.layers.{i}.", hidden, None)
        embed = run(frame, "", hidden, method="head")
    if not np.isfinite(embed).all():
        raise CheckpointError(f"{folder}: the embedding of zeros is not finite, so the tensors cannot be right")
    return embed


def _named(tree: PyTree, prefix: str) -> tuple[list[str], jax.tree_util.PyTreeDef]:
    """Return the leaves' dotted names, and the tree's structure."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    return [prefix + ".".join(str(key.key) for key in path) for path, _ in leaves], structure


# Files ------------------------------------------------------------------------------------------------------------


def _cached(mark: str) -> Path | None:
    cache = user_cache()
    return cache and cache / "zero_embed" / f"{mark}.safetensors"


def _candidates(folder: Path, mark: str) -> Iterator[Path]:
    yield folder / ZERO_EMBED
    if (path := _cached(mark)) is not None:
        yield path


def _find(folder: Path, mark: str) -> np.ndarray | None:
    """Read a stored embedding with this fingerprint; files that do not fit are skipped with a warning."""
    for path in _candidates(folder, mark):
        try:
            check_regular(path)  # safetensors would block on a pipe
            with safe_open(path, framework="numpy") as file:
                embed, seal = file.get_tensor(_TENSOR), (file.metadata() or {}).get("seal")
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (SafetensorError, OSError, ValueError) as error:
            warnings.warn(f"{path} is damaged and not used: {shorten(error)}", stacklevel=2)
            continue
        if seal == _seal(embed, mark):
            return embed
        if re.fullmatch(r"[0-9a-f]{64}", str(seal)):
            fault = "was written by an earlier release, which did not compare all weights, and is not used"
        else:
            fault = "is not of these weights, or damaged, and not used"
        warnings.warn(f"{path} {fault}", stacklevel=2)
    return None


def _seal(embed: np.ndarray, mark: str) -> str:
    """Return a checksum of the embedding and of the weights that it belongs to."""
    return f"{_VERSION}:{hashlib.sha256(mark.encode() + embed.tobytes()).hexdigest()}"


def _write(path: Path, embed: np.ndarray, mark: str) -> None:
    replace_file(path, save({_TENSOR: embed}, metadata={"seal": _seal(embed, mark)}))
