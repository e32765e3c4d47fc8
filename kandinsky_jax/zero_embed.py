"""The vision tower's embedding of zeros: what a decoder is guided away from where there is no negative prompt.

Only the tower's weights decide it, and text-to-image needs nothing else of its 1.8 billion parameters. So it is looked
for beside the tower's tensors (`store` puts it there), then in a cache of the user's, and else computed, with one layer
of the tower in memory at a time. What is kept is computed in float32 from the tensors as stored, whatever a pipeline
computes in, and sealed with a fingerprint of all of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from kandinsky_jax.atomic import replace_file
from kandinsky_jax.checkpoint import CheckpointError, Deferred, read_params
from kandinsky_jax.checkpoint.fingerprint import weights_fingerprint
from kandinsky_jax.compilation import for_real
from kandinsky_jax.errors import shorten
from kandinsky_jax.models import CLIPVisionModelWithProjection
from kandinsky_jax.models.clip import CLIPEncoderLayer, CLIPVisionConfig
from kandinsky_jax.models.layers import Shapes, abstract
from kandinsky_jax.reading import check_regular
from kandinsky_jax.sampling import Network, call
from kandinsky_jax.storage import user_cache
from kandinsky_jax.tensors.files import PREFERRED, ZERO_EMBED, WeightSelection

_TENSOR = "zero_embed"
_VERSION = 2  # of the seal; the first had no number, and its fingerprint was of a few tensors


def of(tower: CLIPVisionModelWithProjection | Deferred) -> np.ndarray:
    """The embedding of zeros (after normalisation), float32 `[1, projection_dim]`.

    Of a tower that is in a checkpoint, it is found or computed without loading the tower; of one in memory, computed
    in its dtype.
    """
    if not isinstance(tower, Deferred):
        return np.asarray(call(*Network.split(tower), _zeros(tower.config)), np.float32)
    with tower.lock:
        if tower.zero_embed is None:
            tower.zero_embed = _of_folder(tower.folder, tower.config, tower.selection)
        return tower.zero_embed


def _of_folder(folder: Path, config: CLIPVisionConfig, selection: WeightSelection) -> np.ndarray:
    """Found beside the tensors or in the user's cache, else computed and kept there."""
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
    """Compute it for the tower in `folder` and put it beside the tensors."""
    _write(folder / ZERO_EMBED, _compute(folder, config), fingerprint(folder, config))


def carry(
    source: Path,
    target: Path,
    config: CLIPVisionConfig,
    selection: WeightSelection = PREFERRED,
    saved: WeightSelection = PREFERRED,
) -> bool:
    """Put what is known of the tower in `source` beside the tensors in `target`, where the weights are the same."""
    mark = fingerprint(source, config, selection)
    if (embed := _find(source, mark)) is None or fingerprint(target, config, saved) != mark:
        return False
    _write(target / ZERO_EMBED, embed, mark)
    return True


def fingerprint(folder: Path, config: CLIPVisionConfig, selection: WeightSelection = PREFERRED) -> str:
    """Ties an embedding to all numbers of all tensors in `folder`, and to the settings that no tensor's shape shows.

    The same in every layout and dtype that holds the same numbers, see `weights_fingerprint`.
    """
    settings = (config.num_hidden_layers, config.num_attention_heads, config.hidden_act, config.layer_norm_eps)
    weights = weights_fingerprint(CLIPVisionModelWithProjection, config, folder, selection)
    return hashlib.sha256(f"{settings!r} {weights}".encode()).hexdigest()


def _zeros(config: CLIPVisionConfig) -> jax.Array:
    return jnp.zeros((1, config.image_size, config.image_size, config.num_channels), jnp.float32)


def _compute(folder: Path, config: CLIPVisionConfig, selection: WeightSelection = PREFERRED) -> np.ndarray:
    """In float32, one layer after the other."""

    def run(module: nnx.Module, prefix: str, *args: Any, method: str = "__call__") -> np.ndarray:
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


def _named(tree: Any, prefix: str) -> tuple[list[str], Any]:
    """The leaves' dotted names, and the tree's structure."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    return [prefix + ".".join(str(key.key) for key in path) for path, _ in leaves], structure


# Files ------------------------------------------------------------------------------------------------------------


def _cached(mark: str) -> Path | None:
    cache = user_cache()
    return cache and cache / "zero_embed" / f"{mark}.safetensors"


def _places(folder: Path, mark: str) -> Iterator[Path]:
    yield folder / ZERO_EMBED
    if (path := _cached(mark)) is not None:
        yield path


def _find(folder: Path, mark: str) -> np.ndarray | None:
    """What was kept of the weights with this fingerprint; what does not fit is told and left."""
    for path in _places(folder, mark):
        try:
            check_regular(path)  # at a pipe, safetensors waits for ever
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
            told = "was written by an earlier release, which did not compare all weights, and is not used"
        else:
            told = "is not of these weights, or damaged, and not used"
        warnings.warn(f"{path} {told}", stacklevel=2)
    return None


def _seal(embed: np.ndarray, mark: str) -> str:
    """Of the embedding and of the weights that it belongs to."""
    return f"{_VERSION}:{hashlib.sha256(mark.encode() + embed.tobytes()).hexdigest()}"


def _write(path: Path, embed: np.ndarray, mark: str) -> None:
    replace_file(path, save({_TENSOR: embed}, metadata={"seal": _seal(embed, mark)}))
