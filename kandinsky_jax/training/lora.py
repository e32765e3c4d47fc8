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

from kandinsky_jax.sampling import Params
from kandinsky_jax.storage import replace_file
from kandinsky_jax.tensors.files import CheckpointError

# The layers that the reference's LoRA scripts change: of every attention, queries, keys, values and output, and in the
# UNet the keys and values that come from the image.
ATTENTION = r"\.(to_q|to_k|to_v|to_out\.0|add_k_proj|add_v_proj)$"
FILE = "pytorch_lora_weights.safetensors"
_METADATA = "lora_adapter_metadata"
_NAME = re.compile(r"^(?:(unet|prior|transformer)\.)?(.+)\.lora_([AB])\.weight$")

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


def merged(params: Params, lora: Lora, scale: float | jax.Array = 1.0) -> Params:
    """Parameters with the changes added, computed in float32, in the parameters' dtype."""
    weights = flat(params)
    for name, pair in lora.items():
        weight = weights[f"{name}.weight"]
        change = jnp.matmul(pair["B"], pair["A"], precision="highest") * scale
        weights[f"{name}.weight"] = (weight.astype(jnp.float32) + change).astype(weight.dtype)
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


def read(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Lora, LoraConfig]:
    """Read a file of diffusers' or peft's.

    Args:
        path: the file, or the folder that holds it.
        shapes: of the network's parameters by dotted names.
    Raises:
        CheckpointError: listing everything that is not right with it.
    """
    path = path / FILE if path.is_dir() else path
    try:
        with safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            metadata = file.metadata() or {}
    except Exception as error:  # whatever safetensors raises for a file that is none
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    lora: dict[str, dict[str, Any]] = {}
    faults = []
    for name, array in tensors.items():
        if (found := _NAME.match(name)) is None:
            faults.append(f"{name} is no LoRA tensor, which ends in lora_A.weight or lora_B.weight")
        elif f"{found[2]}.weight" not in shapes:
            faults.append(f"{name} belongs to no layer of this network")
        else:
            lora.setdefault(found[2], {})[found[3]] = array
    ranks = set()
    for name, pair in lora.items():
        shape = shapes[f"{name}.weight"]
        if pair.keys() != {"A", "B"}:
            faults.append(f"{name} has lora_{next(iter(pair))} alone")
        elif (pair["B"].shape[0], pair["A"].shape[1]) != tuple(shape) or pair["A"].shape[0] != pair["B"].shape[1]:
            faults.append(f"{name} is {list(pair['B'].shape)} x {list(pair['A'].shape)}, the layer {list(shape)}")
        elif not all(np.isfinite(np.asarray(half, np.float32)).all() for half in pair.values()):
            faults.append(f"{name} is not finite")
        else:
            ranks.add(pair["A"].shape[0])
    if faults or not lora:
        raise CheckpointError(f"{path}: " + ("\n  ".join(faults) or "it holds no tensors"))
    rank = max(ranks)
    return (
        {name: {half: jnp.asarray(array, jnp.float32) for half, array in pair.items()} for name, pair in lora.items()},
        LoraConfig(rank, _alpha(metadata), f"^({'|'.join(map(re.escape, sorted(lora)))})$"),
    )


def _alpha(metadata: Mapping[str, str]) -> float | None:
    """What the file says of it, under any prefix; None where it says nothing, which is the rank."""
    about = json.loads(metadata.get(_METADATA, "{}"))
    values = [value for name, value in about.items() if name.rsplit(".", 1)[-1] == "lora_alpha"]
    return float(values[0]) if values else None
