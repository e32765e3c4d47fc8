"""Loading and saving of single networks, as in `UNet2DConditionModel.from_pretrained(name, subfolder="unet")`."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from flax import nnx

from kandinsky_jax.checkpoint import CheckpointError, Layout, default_dtype, hub, load_network, network_dtype
from kandinsky_jax.checkpoint.manifest import note_saved
from kandinsky_jax.checkpoint.saving import check_saving_arguments, save_config, save_network
from kandinsky_jax.checkpoint.tensor_files import WeightSelection, stored_variants
from kandinsky_jax.common.errors import quote, shorten
from kandinsky_jax.common.storage import read_json
from kandinsky_jax.models.pretrained import HOOKS
from kandinsky_jax.schedulers import compatibility as schedulers


def load_component(
    cls: type[nnx.Module],
    name: str | os.PathLike[str],
    *,
    subfolder: str | None = None,
    dtype: object = None,
    torch_dtype: object = None,
    variant: str | None = None,
    use_safetensors: bool | None = None,
    low_cpu_mem_usage: bool = True,
    **options: Any,
) -> nnx.Module:
    """Load a network of this class.

    Args:
        name: its folder, that of a model, a Hub repository, or an embedded model such as "tiny/kandinsky-2-2-decoder".
        subfolder: of the network, such as "unet".
        dtype: None is float32 on a CPU and bfloat16 on a TPU or GPU. torch_dtype is the older name.
        variant, use_safetensors: see `kandinsky_jax.checkpoint.WeightSelection`; a variant must exist.
        low_cpu_mem_usage: has no effect, tensors are read one by one.
        options: revision, cache_dir, token, local_files_only and force_download of `checkpoint.hub.HubOptions`.
    Raises:
        CheckpointError, ConfigError: where there is no such network.
    """
    if dtype is not None and torch_dtype is not None:
        raise TypeError("dtype and torch_dtype are two names of one argument: give one of them")
    selection = WeightSelection(variant, use_safetensors)
    wanted = network_dtype(torch_dtype if dtype is None else dtype) or default_dtype()
    folder = hub.resolve_component(name, subfolder=subfolder, selection=selection, **options)
    if variant is not None and variant not in stored_variants(folder):
        raise CheckpointError(f"{folder} has no files of the variant {quote(variant)}")
    with hub.hint_for_cached_files():
        return load_network(cls, folder, wanted, selection=selection)


def save_component(
    network: nnx.Module,
    folder: str | os.PathLike[str],
    *,
    layout: Layout = "diffusers",
    safe_serialization: bool = True,
    variant: str | None = None,
    max_shard_size: int | str | None = None,
    **arguments: object,
) -> None:
    """Write a network into a folder, see `kandinsky_jax.save_network`; `arguments` of diffusers are refused."""
    check_saving_arguments(f"{type(network).__name__}.save_pretrained", safe_serialization, arguments)
    save_network(network, folder, layout, None, variant, max_shard_size)


def save_component_config(network: nnx.Module, folder: str | os.PathLike[str], **arguments: object) -> None:
    """Write a network's configuration into a folder."""
    check_saving_arguments(f"{type(network).__name__}.save_config", True, arguments)
    save_config(network, Path(folder))
    note_saved(folder)


def load_component_config(
    name: str | os.PathLike[str],
    file: str = "config.json",
    *,
    subfolder: str | None = None,
    return_unused_kwargs: bool = False,
    **options: Any,
) -> Any:
    """Load the configuration of a network or scheduler, without downloading tensors.

    Args:
        name, subfolder, options: see `load_component`.
        file: its name in the component's folder.
        return_unused_kwargs: whether to return unknown `options` with the configuration.
    Raises:
        CheckpointError: where it is missing or damaged.
    """
    for unused in ("dtype", "torch_dtype", "variant", "use_safetensors", "low_cpu_mem_usage"):
        options.pop(unused, None)
    known = {field.name for field in dataclasses.fields(hub.HubOptions)}
    unknown = {key: options.pop(key) for key in list(options) if key not in known}
    if unknown and not return_unused_kwargs:
        raise TypeError(f"load_config has no argument {shorten(sorted(unknown))}; it takes {', '.join(sorted(known))}")
    folder = hub.resolve_component(name, subfolder=subfolder, weights=False, **options)
    with hub.hint_for_cached_files():
        config = dict(read_json(folder / file))
    return (config, unknown) if return_unused_kwargs else config


HOOKS.update(
    load_config=load_component_config, load=load_component, save=save_component, save_config=save_component_config
)
schedulers.HOOKS.update(load_config=load_component_config, saved=note_saved)
