"""LoRA: low-rank changes of a network's linear layers, beside its parameters (Hu et al. 2021, arXiv 2106.09685).

The networks know nothing of it. `merged` adds the changes to the weights, inside the function that is differentiated or
sampled, so any network can be trained or drawn with, and with several at once.

Files are peft's: `lora_A.weight [rank, in]` and `lora_B.weight [out, rank]` under the layer's PyTorch name, as
diffusers' `load_lora_adapter` and `save_lora_adapter` read and write them.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from safetensors import safe_open
from safetensors.numpy import save

from kandinsky_jax.atomic import replace_file
from kandinsky_jax.sampling import Params
from kandinsky_jax.tensors.files import CheckpointError

# The layers that the reference's LoRA scripts change: of every attention, queries, keys, values and output, and in the
# UNet the keys and values that come from the image.
ATTENTION = r"\.(to_q|to_k|to_v|to_out\.0|add_k_proj|add_v_proj)$"
FILE = "pytorch_lora_weights.safetensors"
_METADATA = "lora_adapter_metadata"
_PREFIX = re.compile(r"^(unet|prior)\.")
_NAME = re.compile(r"^(.+)\.lora_([AB])\.weight$")
# As the reference's LoRA scripts for Kandinsky write them, of the time before peft.
_OLD_NAME = re.compile(r"^(.+)\.processor\.(to_q|to_k|to_v|to_out|add_k_proj|add_v_proj)_lora\.(down|up)\.weight$")

Lora = dict[str, dict[str, jax.Array]]  # by the layer's dotted name: A [rank, in], B [out, rank]


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which layers change, and how.

    Args:
        rank: of the changes.
        alpha: the changes count alpha / rank; None is the rank itself.
        pattern: a regular expression over the dotted names of linear layers.
    """

    rank: int = 4
    alpha: float | None = None
    pattern: str = ATTENTION

    @property
    def scale(self) -> float:
        """What a change is multiplied by."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


def init(params: Params, config: LoraConfig, key: jax.Array) -> Lora:
    """Changes that change nothing yet: A normal with deviation 1 / rank, B zero (peft's "gaussian").

    Raises:
        ValueError: where the pattern matches no linear layer.
    """
    weights = {name.removesuffix(".weight"): leaf for name, leaf in flat(params).items() if name.endswith(".weight")}
    layers = {name: leaf for name, leaf in weights.items() if leaf.ndim == 2 and re.search(config.pattern, name)}
    if not layers:
        some = ", ".join(sorted(weights)[:5])
        raise ValueError(f"the pattern {config.pattern!r} matches none of the linear layers, such as {some}")
    keys = jax.random.split(key, len(layers))
    return {
        name: {
            "A": jax.random.normal(each, (config.rank, leaf.shape[1]), jnp.float32) / config.rank,
            "B": jnp.zeros((leaf.shape[0], config.rank), jnp.float32),
        }
        for each, (name, leaf) in zip(keys, sorted(layers.items()), strict=True)
    }


def change(pair: Mapping[str, jax.Array], scale: float | jax.Array) -> jax.Array:
    """What is added to a layer's weight, float32 `[out, in]`."""
    return jnp.matmul(pair["B"], pair["A"], precision="highest") * scale


def merged(params: Params, lora: Lora, scale: float | jax.Array = 1.0) -> Params:
    """Parameters with the changes added, computed in float32, in the parameters' dtype."""
    weights = flat(params)
    for name, pair in lora.items():
        weight = weights[f"{name}.weight"]
        weights[f"{name}.weight"] = (weight.astype(jnp.float32) + change(pair, scale)).astype(weight.dtype)
    return traverse_util.unflatten_dict({tuple(_keys(name)): leaf for name, leaf in weights.items()})


def flat(params: Params) -> dict[str, Any]:
    """A tree of parameters by dotted names."""
    return {".".join(map(str, path)): leaf for path, leaf in traverse_util.flatten_dict(params).items()}


def _keys(name: str) -> list[Any]:
    """A dotted name as the keys of a tree: lists have numbers."""
    return [int(part) if part.isdecimal() else part for part in name.split(".")]


# Files ------------------------------------------------------------------------------------------------------------


def write(folder: Path, lora: Lora, config: LoraConfig, prefix: str) -> Path:
    """Write the file that diffusers loads; it is complete or absent.

    Args:
        prefix: of the names, "unet" or "prior".
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{prefix}.{name}.lora_{half}.weight": np.asarray(array, np.float32)
        for name, pair in sorted(lora.items())
        for half, array in pair.items()
    }
    about = {"r": config.rank, "lora_alpha": config.alpha or config.rank, "target_modules": sorted(lora)}
    metadata = {"format": "pt", _METADATA: json.dumps({f"{prefix}.{k}": v for k, v in about.items()}, sort_keys=True)}
    replace_file(folder / FILE, save(tensors, metadata))
    return folder / FILE


def layer_of(name: str) -> tuple[str, str] | None:
    """Of a tensor in a file: its layer's dotted name, and which half it is, "A" or "B"; None where it is neither."""
    bare = _PREFIX.sub("", name)
    if found := _NAME.match(bare):
        return found[1], found[2]
    if found := _OLD_NAME.match(bare):
        layer = {"to_out": "to_out.0"}.get(found[2], found[2])
        return f"{found[1]}.{layer}", {"down": "A", "up": "B"}[found[3]]
    return None


def read(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Lora, LoraConfig]:
    """Read a file of diffusers' or peft's.

    Args:
        path: the file, or the folder that holds it.
        shapes: of the network's parameters by dotted names.
    Returns:
        the changes, and the configuration that they were trained with, as far as the file tells.
    Raises:
        CheckpointError: listing everything that is not right with it.
    """
    tensors, metadata = _open(path)
    lora: dict[str, dict[str, Any]] = {}
    faults = []
    for name, array in tensors.items():
        if (found := layer_of(name)) is None:
            faults.append(f"{name} is no LoRA tensor, which ends in lora_A.weight or lora_B.weight")
        elif f"{found[0]}.weight" not in shapes:
            faults.append(f"{name} belongs to no layer of this network")
        else:
            lora.setdefault(found[0], {})[found[1]] = array
    for name, pair in lora.items():
        faults += _pair_faults(name, pair, tuple(shapes[f"{name}.weight"]))
    if faults or not lora:
        raise CheckpointError(f"{path}: " + ("\n  ".join(faults) or "it holds no tensors"))
    rank = max(pair["A"].shape[0] for pair in lora.values())
    return (
        {name: {half: jnp.asarray(array, jnp.float32) for half, array in pair.items()} for name, pair in lora.items()},
        LoraConfig(rank, _alpha(metadata), f"^({'|'.join(map(re.escape, sorted(lora)))})$"),
    )


def layers(path: Path) -> set[str]:
    """The layers that a file changes."""
    return {found[0] for name in _open(path)[0] if (found := layer_of(name)) is not None}


def _open(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    path = path / FILE if path.is_dir() else path
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except Exception as error:  # whatever safetensors raises for a file that is none
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def _pair_faults(name: str, pair: Mapping[str, Any], shape: tuple[int, ...]) -> list[str]:
    if pair.keys() != {"A", "B"}:
        return [f"{name} has lora_{next(iter(pair))} alone"]
    if any(half.ndim != 2 for half in pair.values()) or len(shape) != 2:
        return [f"{name} is no change of a linear layer"]
    if (pair["B"].shape[0], pair["A"].shape[1]) != shape or pair["A"].shape[0] != pair["B"].shape[1]:
        return [f"{name} is {list(pair['B'].shape)} x {list(pair['A'].shape)}, the layer {list(shape)}"]
    if not all(np.isfinite(np.asarray(half, np.float32)).all() for half in pair.values()):
        return [f"{name} is not finite"]
    return []


def _alpha(metadata: Mapping[str, str]) -> float | None:
    """What the file says of it, under any prefix; None where it says nothing, which is the rank."""
    about = json.loads(metadata.get(_METADATA, "{}"))
    values = [value for name, value in about.items() if name.rsplit(".", 1)[-1] == "lora_alpha"]
    return float(values[0]) if values else None
