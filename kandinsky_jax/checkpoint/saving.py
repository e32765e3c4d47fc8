"""Saving of networks: `config.json` and tensors, in diffusers' layout or ours, in one file or in shards."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from kandinsky_jax.checkpoint import orbax, tensor_files, tensor_names
from kandinsky_jax.checkpoint.manifest import note_saved
from kandinsky_jax.checkpoint.networks import Layout, Progress, flat_params
from kandinsky_jax.checkpoint.tensor_files import WeightSelection
from kandinsky_jax.common.atomic import replace_file
from kandinsky_jax.common.errors import quote

# Arguments of diffusers' save_pretrained that have no use here, and what to write instead.
INSTEAD = {
    "push_to_hub": "save into a folder and run `hf upload OWNER/NAME FOLDER`",
    "repo_id": "save into a folder and run `hf upload OWNER/NAME FOLDER`",
    "state_dict": "put the arrays into the network and save that",
    "save_function": "leave it out, safetensors are written by this library",
    "is_main_process": "call it on one process only",
}


def check_saving_arguments(function: str, safe_serialization: object, arguments: Mapping[str, object]) -> None:
    """Raise TypeError for arguments of diffusers' save_pretrained that are not supported, saying what to do instead."""
    if safe_serialization is not True:
        raise TypeError(
            f"{function} writes safetensors, which diffusers loads, and no pickles: leave safe_serialization="
            f"{safe_serialization} out"
        )
    for name, value in arguments.items():
        if name not in INSTEAD:
            raise TypeError(f"{function} has no argument {quote(name)}")
        if value not in (None, False) and not (name == "is_main_process" and value is True):
            raise TypeError(f"{function} takes no {name}: {INSTEAD[name]}")


def save_network(
    module: nnx.Module,
    folder: str | os.PathLike[str],
    layout: Layout = "diffusers",
    progress: Progress | None = None,
    variant: str | None = None,
    max_shard_size: int | str | None = None,
) -> None:
    """Write a network's `config.json` and tensors into `folder`, which is created if missing.

    Tensor files of an earlier save with other names, of the same variant, are removed as out of date.

    Args:
        layout: "diffusers" writes the safetensors file that diffusers or transformers reads; "orbax" writes `params/`.
        progress: updated by the number of bytes as they are written.
        variant: written into the files' names, as in `diffusion_pytorch_model.fp16.safetensors`; changes no values.
        max_shard_size: bytes, or a text such as "5GB"; larger networks are written in shards, with an index.
    """
    if layout not in ("diffusers", "orbax"):
        raise ValueError(f"layout={quote(layout)} is not supported, only diffusers and orbax")
    WeightSelection(variant)  # validates the name
    if layout == "orbax" and (variant is not None or max_shard_size is not None):
        raise ValueError("variant and max_shard_size are for layout='diffusers'")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_config(module, folder)
    params, config = flat_params(module), module.config.to_dict()
    if layout == "orbax":
        shutil.rmtree(folder / orbax.FOLDER, ignore_errors=True)
        orbax.save(folder / orbax.FOLDER, params)
        written = set()
    else:
        tensors = {tensor_names.torch_name(name): _unread(name, array) for name, array in params.items()}
        stem = tensor_files.STEMS[0] if "_class_name" in config else tensor_files.STEMS[1]
        written = _write(folder, stem, tensors, variant, max_shard_size)
        if variant is None:
            shutil.rmtree(folder / orbax.FOLDER, ignore_errors=True)
    for path in folder.iterdir():
        same_kind = tensor_files.WEIGHT_FILE.fullmatch(path.name) and tensor_files.variant_of(path.name) == variant
        if same_kind and path.name not in written:
            path.unlink()
    note_saved(folder)
    if progress is not None:
        progress.update(sum(leaf.nbytes for leaf in params.values()))


def save_config(module: nnx.Module, folder: str | os.PathLike[str]) -> None:
    """Write a network's `config.json` into `folder`, which is created if missing."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    module.to_json_file(Path(folder) / "config.json")


def _write(
    folder: Path,
    stem: str,
    tensors: Mapping[str, tensor_files.Tensor],
    variant: str | None,
    max_shard_size: int | str | None,
) -> set[str]:
    """Write safetensors, in one file or in shards with an index; return the names of the files."""
    middle = "" if variant is None else f".{variant}"
    if max_shard_size is None:
        tensor_files.write(folder / f"{stem}{middle}.safetensors", tensors)
        return {f"{stem}{middle}.safetensors"}
    from huggingface_hub import split_state_dict_into_shards_factory

    split = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda tensor: math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize,
        filename_pattern=f"{stem}{middle}{{suffix}}.safetensors",
        max_shard_size=max_shard_size,
    )
    for name, held in split.filename_to_tensors.items():
        tensor_files.write(folder / name, {key: tensors[key] for key in held})
    written = set(split.filename_to_tensors)
    if split.is_sharded:
        index = f"{stem}.safetensors.index{middle}.json"
        content = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        replace_file(folder / index, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())
        written.add(index)
    return written


def _unread(name: str, array: jax.Array) -> tensor_files.Tensor:
    """Wrap a parameter as a PyTorch tensor that is copied from its device when it is written."""
    return tensor_files.Tensor(
        tensor_names.torch_shape(name, array.shape),
        lambda: tensor_names.to_torch(name, np.asarray(array)),
        np.dtype(array.dtype),
    )
