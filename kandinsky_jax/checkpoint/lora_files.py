"""LoRA files: finding, reading for the networks of a pipeline, and writing in diffusers' format.

Files of diffusers (current and older), peft and kohya's scripts can be read, as safetensors or tensors-only pickles;
see `lora_names` for the names of their tensors and `lora_scaling` for peft's configuration.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath

import jax
import numpy as np
from safetensors import safe_open

from kandinsky_jax.checkpoint import lora_names, tensor_files, tensor_names
from kandinsky_jax.checkpoint.lora_scaling import Scaling, ScalingError, check_alpha
from kandinsky_jax.common import reading
from kandinsky_jax.common.errors import CheckpointError, quote, shorten
from kandinsky_jax.common.storage import read_json
from kandinsky_jax.lora import FILE, LayerChange

METADATA = "lora_adapter_metadata"  # of a safetensors header; diffusers' name
PEFT_CONFIG = "adapter_config.json"
# Names of LoRA files in a folder; the last two are those of an accelerate checkpoint of the trained layers.
_STEMS = ("pytorch_lora_weights", "adapter_model", "model", "pytorch_model")
_SUFFIXES = (".safetensors", ".bin")
_OTHERS = ("optimizer", "scheduler", "random_states", "training_args", "scaler")  # of a training checkpoint

Layers = Mapping[str, tuple[int, ...]]  # a network's layers by dotted names: their weights' shapes in PyTorch
Adapter = dict[str, LayerChange]  # the changes of one network by the layers' names


@dataclass(frozen=True)
class LoraTensors:
    """Content of a LoRA file or dictionary, before it is matched with networks.

    Attributes:
        source: for messages.
        tensors: by name; none is read yet.
        config: peft's configuration, None if absent; its names may begin with a network's, as in diffusers.
    """

    source: str
    tensors: Mapping[str, tensor_files.Tensor]
    config: Mapping[str, object] | None = None

    def error(self, reason: object) -> CheckpointError:
        """Return an error that names the source, of bounded length."""
        return CheckpointError(f"{shorten(self.source, 200)} {shorten(reason, 280)}")


@dataclass
class _Layer:
    """Tensors of one layer's change by part, and their names."""

    parts: dict[str, tensor_files.Tensor] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)


def layers_of(params: Mapping[str, jax.Array]) -> dict[str, tuple[int, ...]]:
    """Return the layers of a network that LoRA can change, linear and convolutional, from `flat_params`."""
    return {
        name.rpartition(".")[0]: tensor_names.torch_shape(name, tuple(leaf.shape))
        for name, leaf in params.items()
        if (name.endswith(".weight") and leaf.ndim == 2) or name.endswith(".kernel")
    }


# Finding ----------------------------------------------------------------------------------------------------------


def choose(listed: Iterable[str], where: str) -> str:
    """Choose the LoRA file among the files of a folder or repository.

    Raises:
        CheckpointError: where there is none, or the choice is ambiguous.
    """
    found = sorted(listed)
    for stem in _STEMS:
        for suffix in _SUFFIXES:
            if stem + suffix in found:
                return stem + suffix
    for suffix in _SUFFIXES:
        others = [n for n in found if n.endswith(suffix) and "/" not in n and not n.startswith((*_OTHERS, "."))]
        if len(others) == 1:
            return others[0]
        if others:
            raise CheckpointError(
                f"{shorten(where, 200)} holds {len(others)} files that could be meant, such as "
                f"{shorten(others[0], 80)} and {shorten(others[1], 80)}: give weight_name="
            )
    raise CheckpointError(
        f"{shorten(where, 200)} holds no LoRA file: looked for {FILE}, adapter_model.safetensors, their .bin, and a "
        "single *.safetensors"
    )


def check_weight_name(name: str) -> str:
    """Return the name of a file within a folder; ValueError for any other value."""
    parts = PurePath(name).parts if isinstance(name, str) and "\0" not in name else ()
    if not parts or ".." in parts or PurePath(name).is_absolute():
        raise ValueError(f"weight_name must be a file's name within the folder, got {quote(name)}")
    return name


def find(path: Path, weight_name: str | None = None) -> Path:
    """Find the LoRA file that `path` is or contains.

    Args:
        path: a file, or a folder: output of diffusers or peft, a training checkpoint, or a training run of ours.
        weight_name: the file's name in the folder.
    Raises:
        CheckpointError: if there is none, saying what was looked for.
    """
    try:
        if weight_name is not None and path.is_dir():
            path = path / check_weight_name(weight_name)
        if path.is_file():
            return path
        if not path.is_dir():
            what = "is not a regular file" if path.exists() else "is not there"
            raise CheckpointError(f"{shorten(str(path), 240)} {what}; needed is a LoRA file, or the folder of one")
        listed = [entry.name for entry in path.iterdir() if entry.is_file()]
        if not any(name.endswith(_SUFFIXES) for name in listed):
            if (path / "model" / FILE).is_file():  # a training run of ours
                return path / "model" / FILE
            if (newest := _newest_checkpoint(path)) is not None:
                raise CheckpointError(
                    f"{shorten(str(path), 200)} holds training checkpoints but no LoRA file; give one of them, such as "
                    f"{shorten(newest.name, 60)}"
                )
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{shorten(str(path), 240)} cannot be read: {shorten(error, 120)}") from None
    return path / choose(listed, os.fspath(path))


def _newest_checkpoint(folder: Path) -> Path | None:
    """Return the latest of accelerate's `checkpoint-STEP` folders."""
    steps = {p: p.name.removeprefix("checkpoint-") for p in folder.glob("checkpoint-*") if p.is_dir()}
    numbered = [p for p, step in steps.items() if step.isascii() and step.isdecimal()]
    return max(numbered, key=lambda p: (len(steps[p].lstrip("0")), steps[p].lstrip("0")), default=None)


# Opening ----------------------------------------------------------------------------------------------------------


def open_file(path: Path) -> LoraTensors:
    """Open the tensors of a file, and its configuration from the header or from peft's file next to it.

    Raises:
        CheckpointError: for a damaged file, or a pickle that would run code.
    """
    try:
        tensors = tensor_files.open_tensors(path)
        header = _header(path) if path.suffix == ".safetensors" else {}
    except CheckpointError:
        raise
    except Exception as error:  # safetensors raises many kinds for invalid files
        raise CheckpointError(f"{shorten(str(path), 240)} cannot be read: {shorten(error, 200)}") from None
    config: dict[str, object] | None = None
    if METADATA in header:
        try:
            parsed = reading.parse_json(header[METADATA])
        except reading.ReadError as error:
            raise CheckpointError(
                f"{shorten(str(path), 240)}: {METADATA} in its header {shorten(error, 160)}"
            ) from None
        if not isinstance(parsed, dict):
            raise CheckpointError(f"{shorten(str(path), 240)}: {METADATA} in its header is not a JSON object")
        config = parsed
    elif path.stem == "adapter_model" and (path.parent / PEFT_CONFIG).exists():
        config = read_json(path.parent / PEFT_CONFIG)
    return LoraTensors(os.fspath(path), tensors, config)


def _header(path: Path) -> dict[str, str]:
    with safe_open(path, framework="numpy") as file:
        return file.metadata() or {}


def from_dict(tensors: Mapping[str, object], config: Mapping[str, object] | None = None) -> LoraTensors:
    """Open arrays in memory, of NumPy, JAX or PyTorch, by the names that they would have in a file."""
    return LoraTensors("the dictionary of LoRA", {str(n): _in_memory(n, array) for n, array in tensors.items()}, config)


def _in_memory(name: object, array: object) -> tensor_files.Tensor:
    if not hasattr(array, "shape") or not hasattr(array, "dtype"):
        raise CheckpointError(f"the dictionary of LoRA holds {shorten(type(array), 80)} at {shorten(name, 80)}")

    def read() -> np.ndarray:
        if not hasattr(array, "detach"):
            return np.asarray(array)
        tensor = array.detach().cpu()  # PyTorch's
        return (tensor.float() if "bfloat16" in str(tensor.dtype) else tensor).numpy()

    return tensor_files.Tensor(tuple(array.shape), read)


# Reading ----------------------------------------------------------------------------------------------------------


def read(opened: LoraTensors, networks: Mapping[str, Layers]) -> tuple[dict[str, Adapter], dict[str, int]]:
    """Read the changes of each network.

    Args:
        opened: see `open_file`.
        networks: layers of the pipeline's networks, by the names "unet" and "prior".
    Returns:
        the changes by network, and the number of skipped layers by network that the pipeline lacks.
    Raises:
        CheckpointError: for content that is not supported, is damaged, or fits no network.
    """
    parsed = {name: lora_names.parse(name) for name in opened.tensors}
    if unknown := [name for name, found in parsed.items() if found is None]:
        raise opened.error(_unsupported(unknown, len(parsed)))
    if not parsed:
        raise opened.error("holds no tensors")
    groups: dict[tuple[str | None, bool], dict[str, _Layer]] = {}
    adapters = set()
    for name, found in parsed.items():
        assert found is not None
        layer = groups.setdefault((found.component, found.underscored), {}).setdefault(found.layer, _Layer())
        if found.part in layer.parts:
            raise opened.error(f"holds two tensors for one thing: {_some([layer.names[found.part], name])}")
        layer.parts[found.part], layer.names[found.part] = opened.tensors[name], name
        adapters |= {found.adapter} if found.part != "alpha" else set()
    if len(adapters) > 1:
        raise opened.error(f"holds {len(adapters)} adapters, needed is one: {_some(sorted(adapters))}")
    changes: dict[str, Adapter] = {}
    left_out: Counter[str] = Counter()
    for (component, underscored), group in groups.items():
        target = _network_of(opened, component, underscored, group, networks)
        if target not in networks:
            left_out[target] += len(group)
            continue
        dotted = _dotted(opened, group, networks[target], target) if underscored else group
        found_changes = _changes(opened, component, dotted, networks[target], target)
        if overlap := changes.get(target, {}).keys() & found_changes.keys():
            raise opened.error(f"holds {len(overlap)} layers twice, under two kinds of names: {_some(sorted(overlap))}")
        changes.setdefault(target, {}).update(found_changes)
    if not changes:
        raise opened.error(f"is for a {' and a '.join(left_out)}, and this pipeline has none")
    return changes, dict(left_out)


def _unsupported(unknown: Sequence[str], total: int) -> str:
    """Describe tensors that `lora_names` cannot parse, by the most frequent kind."""
    kinds = Counter(lora_names.method(name) for name in unknown)
    kind = next((found for found, _ in kinds.most_common() if found), "")
    mine = [name for name in unknown if lora_names.method(name) == kind]
    if kind == "a text encoder":
        return f"changes a text encoder, which is not supported, in {len(mine)} of its {total} tensors: {_some(mine)}"
    if kind:
        return f"uses {kind}, which is not supported, in {len(mine)} of its {total} tensors: {_some(mine)}"
    return f"holds {len(mine)} tensors of {total} that are not LoRA tensors: {_some(mine)}"


def _network_of(
    opened: LoraTensors,
    component: str | None,
    underscored: bool,
    group: Mapping[str, _Layer],
    networks: Mapping[str, Layers],
) -> str:
    """Return the network that a group of layers is for: the one in their names, or the one with most of them."""
    if component in ("unet", "prior"):
        return component

    def fitting(layers: Layers) -> int:
        known = lora_names.underscored(layers) if underscored else dict.fromkeys(layers)
        present = [name for name in group if name in known]
        real = {name: (known[name] or "") if underscored else name for name in present}
        return sum(2 if _fits(group[name], layers.get(real[name], ())) else 1 for name in present)

    scores = {name: fitting(layers) for name, layers in networks.items()}
    best = max(scores, key=lambda name: scores[name])
    if list(scores.values()).count(scores[best]) > 1 and scores[best]:
        raise opened.error(f"fits {' and '.join(scores)} alike; give its tensors names that begin with {best}.")
    if not scores[best]:
        raise opened.error(
            f"is for another network: none of its {len(group)} layers, such as {_some(list(group))}, is one of the "
            f"{' or '.join(scores)}"
        )
    return best


def _fits(layer: _Layer, shape: tuple[int, ...]) -> bool:
    down, up = layer.parts.get("down"), layer.parts.get("up")
    if down is None or up is None or len(shape) < 2 or not up.shape or len(down.shape) < 2:
        return False
    return (up.shape[0], down.shape[1]) == shape[:2]


def _dotted(opened: LoraTensors, group: Mapping[str, _Layer], layers: Layers, target: str) -> dict[str, _Layer]:
    """Rename kohya's layers to the network's names."""
    known = lora_names.underscored(layers)
    if twice := [name for name in group if name in known and known[name] is None]:
        raise opened.error(f"has names that fit two layers of the {target} each: {_some(twice)}")
    return {known.get(name) or name: layer for name, layer in group.items()}


def _changes(
    opened: LoraTensors, component: str | None, group: Mapping[str, _Layer], layers: Layers, target: str
) -> Adapter:
    """Check and read the changes of one network."""
    if strange := [name for name in group if name not in layers]:
        raise opened.error(
            f"has {len(strange)} of {len(group)} layers that the {target} does not have: {_some(strange)}"
        )
    config = _own_config(opened.config, component)
    alphas = [layer.names["alpha"] for layer in group.values() if "alpha" in layer.parts]
    if config is not None and alphas:
        raise opened.error(f"says twice how strong it is, by {METADATA} and by {_some(alphas)}; one of them is needed")
    try:
        scaling = None if config is None else Scaling(config)
        return {name: _change(layer, layers[name], name, scaling) for name, layer in group.items()}
    except (ScalingError, _LayerError) as error:
        raise opened.error(error) from None


def _own_config(config: Mapping[str, object] | None, component: str | None) -> Mapping[str, object] | None:
    """Return the configuration of one network; its fields may begin with the network's name, as tensors do."""
    if config is None or component is None:
        return config
    prefix = f"{component}."
    own = {name.removeprefix(prefix): value for name, value in config.items() if name.startswith(prefix)}
    if own:
        return own
    return None if any(name.startswith(("unet.", "prior.", "transformer.")) for name in config) else config


class _LayerError(ValueError):
    """The tensors of a layer are invalid."""


def _change(layer: _Layer, shape: tuple[int, ...], name: str, scaling: Scaling | None) -> LayerChange:
    if missing := {"down", "up"} - layer.parts.keys():
        raise _LayerError(f"lacks the {' and '.join(sorted(missing))} tensor of {shorten(name, 100)}")
    down, up = (_read(layer, part) for part in ("down", "up"))
    if "mid" in layer.parts:
        down = _with_mid(down, _read(layer, "mid"), name)
    rank = down.shape[0] if down.ndim else 0
    kernel = (1,) * (len(shape) - 2)
    if not rank or down.shape != (rank, *shape[1:]) or up.shape != (shape[0], rank, *kernel):
        raise _LayerError(
            f"does not fit {shorten(name, 80)}, whose weight is {list(shape)}: its down is {_shape(down)}, its up "
            f"{_shape(up)}"
        )
    if scaling is not None:
        scale = scaling.of(name, rank)
    else:
        scale = _alpha(layer, name) / rank if "alpha" in layer.parts else 1.0
    return LayerChange(down, up.reshape(up.shape[:2]), scale)


def _with_mid(down: np.ndarray, mid: np.ndarray, name: str) -> np.ndarray:
    """Merge LyCORIS' three tensors of a convolution into two: `down [r, in, 1, 1]`, `mid [r, r, height, width]`."""
    if down.ndim != 4 or down.shape[2:] != (1, 1) or mid.ndim != 4 or mid.shape[1] != down.shape[0]:
        raise _LayerError(f"has a mid tensor {_shape(mid)} and a down tensor {_shape(down)} at {shorten(name, 80)}")
    return np.einsum("rmhw,mi->rihw", mid, down[:, :, 0, 0])


def _read(layer: _Layer, part: str) -> np.ndarray:
    """Read a tensor as a float32 copy."""
    name = layer.names[part]
    try:
        array = layer.parts[part].read()
    except CheckpointError as error:
        raise _LayerError(f"has a tensor that cannot be read, {shorten(name, 100)}: {error}") from None
    except Exception as error:  # of safetensors, NumPy and torch, by the kind of damage and dtype
        raise _LayerError(f"has a tensor that cannot be read, {shorten(name, 100)}: {type(error).__name__}") from None
    if not (np.issubdtype(array.dtype, np.floating) or array.dtype.name == "bfloat16"):
        raise _LayerError(f"has {shorten(name, 100)} in {array.dtype.name}, needed is a floating-point dtype")
    with np.errstate(over="ignore", invalid="ignore"):
        array = np.array(array, np.float32)
    if not np.isfinite(array).all():
        raise _LayerError(f"is not finite in {shorten(name, 120)}")
    return array


def _alpha(layer: _Layer, name: str) -> float:
    """Read a layer's alpha; kohya's scripts write integers too."""
    tensor = layer.parts["alpha"]
    if math.prod(tensor.shape) != 1:
        raise _LayerError(f"has an alpha of shape {list(tensor.shape)} at {shorten(name, 100)}, needed is one number")
    try:
        array = tensor.read().reshape(())
        value = array.item() if np.issubdtype(array.dtype, np.integer) else float(array)
    except Exception as error:  # as in `_read`
        raise _LayerError(f"has an alpha that cannot be read at {shorten(name, 100)}: {shorten(error, 80)}") from None
    return check_alpha(f"an alpha at {shorten(name, 100)}", value)


def _shape(array: np.ndarray) -> str:
    return shorten(list(array.shape), 40)


def _some(listed: Sequence[str]) -> str:
    """Return the first two names, for a message."""
    return " and ".join(shorten(name, 80) for name in listed[:2])


# Writing ----------------------------------------------------------------------------------------------------------


def write(
    folder: str | os.PathLike[str],
    adapter: Mapping[str, Mapping[str, LayerChange]],
    weight_name: str = FILE,
    dtype: str = "float32",
) -> Path:
    """Write a file that diffusers loads, atomically.

    Args:
        folder: created if missing.
        adapter: the changes by network, "unet" or "prior", with which the names in the file begin.
        weight_name: the file's name.
        dtype: of the tensors in the file, "float32" or "float16".
    """
    target = Path(folder) / check_weight_name(weight_name)
    if target.suffix != ".safetensors":
        raise ValueError(f"weight_name={quote(weight_name)} must end in .safetensors, the format that is written")
    target.parent.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, np.ndarray] = {}
    about: dict[str, object] = {}
    for component, changes in sorted(adapter.items()):
        for name, change in sorted(changes.items()):
            kernel = (1,) * (change.down.ndim - 2)
            tensors[f"{component}.{name}.lora_A.weight"] = np.ascontiguousarray(change.down, dtype)
            tensors[f"{component}.{name}.lora_B.weight"] = np.ascontiguousarray(
                change.up.reshape(*change.up.shape, *kernel), dtype
            )
        about |= {f"{component}.{name}": value for name, value in _describe(changes).items()}
    readers = {
        name: tensor_files.Tensor(array.shape, functools.partial(np.asarray, array), array.dtype)
        for name, array in tensors.items()
    }
    tensor_files.write(target, readers, {METADATA: json.dumps(about, sort_keys=True)})
    return target


def _describe(changes: Mapping[str, LayerChange]) -> dict[str, object]:
    """Return peft's configuration of changes: the most frequent rank and alpha, and patterns for the others."""
    ranks = {name: change.rank for name, change in changes.items()}
    alphas = {name: _number(change.scale * change.rank) for name, change in changes.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {_exactly(name): own for name, own in sorted(ranks.items()) if own != rank},
        "alpha_pattern": {_exactly(name): own for name, own in sorted(alphas.items()) if own != alpha},
        "target_modules": sorted(changes),
    }


def _exactly(name: str) -> str:
    return "^" + name.replace(".", "\\.")


def _number(value: float) -> float:
    """Undo the rounding of dividing by a rank and multiplying by it again."""
    rounded = float(f"{value:.15g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e9 else rounded
