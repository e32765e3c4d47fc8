"""Conversion of a model between diffusers' layout and Orbax checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
from flax import nnx
from jax.typing import DTypeLike
from tqdm.auto import tqdm

from kandinsky_jax.checkpoint import (
    CheckpointError,
    Layout,
    flat_params,
    hub,
    load_network,
    orbax,
    preview_map,
    recommended_settings,
    save_network,
    stored_bytes,
    zero_embed,
)
from kandinsky_jax.checkpoint.manifest import MANIFEST, write_manifest
from kandinsky_jax.checkpoint.networks import bytes_as
from kandinsky_jax.checkpoint.quantization import InputRanges, quantize_network
from kandinsky_jax.common.errors import quote
from kandinsky_jax.common.storage import check_replaceable, complete_or_absent, read_json
from kandinsky_jax.models import NETWORKS
from kandinsky_jax.models.layers import abstract

# Files of components without tensors; others (code, pickles) are not copied.
_PLAIN = {".json", ".txt", ".md"}


@dataclasses.dataclass(frozen=True)
class Quantization:
    """What a model's networks are quantized to while it is converted.

    Attributes:
        dtype: "int8" or "float8_e4m3fn".
        input_ranges: gives, by component, the ranges from calibration, or None for scales at run time; see
            `quantize_network`. It is called after all else has been checked, because it may take long.
    """

    dtype: str
    input_ranges: Callable[[], Mapping[str, InputRanges | None]]


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    layout: Layout | None = None,
    dtype: DTypeLike | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
    quantization: Quantization | None = None,
) -> Path:
    """Convert a model, one component after the other.

    Args:
        source: a folder with `model_index.json` in either layout, a Hub repository, or "tiny/kandinsky-2-2-...".
        target: the folder to make; it is complete or absent, also after a kill.
        layout: of the target; None is the one that the source does not have, or with `quantization` the one it has.
        dtype: of the tensors; None keeps each tensor's own.
        overwrite: replace an existing target.
        revision, cache_dir: of a Hub repository.
        progress: show a bar.
        quantization: of the networks that it names.
    Returns:
        the target.
    Raises:
        CheckpointError, ConfigError: the source cannot be used; every fault is listed.
        OSError: if the disk is too small, before anything is written where possible.
        ValueError: for another layout.
    """
    if layout not in (None, "orbax", "diffusers"):
        raise ValueError(f'layout must be "orbax", "diffusers" or None, got {quote(layout)}')
    folder = hub.resolve(source, hub.DECODER, revision=revision, cache_dir=cache_dir)
    parts = {name: hub.component_folder(folder, name) for name in hub.components(folder)}
    classes = hub.components(folder)
    networks = {name: part for name, part in parts.items() if classes[name] in NETWORKS}
    adapters = recommended_settings.lora_files(folder)
    if not networks:
        raise CheckpointError(f"{folder} has none of the networks {', '.join(NETWORKS)}")
    if layout is None:
        stored_by_orbax = all((part / orbax.FOLDER).is_dir() for part in networks.values())
        layout = "diffusers" if stored_by_orbax == (quantization is None) else "orbax"
    read = {name: stored_bytes(part) for name, part in networks.items()}
    needed = sum(_target_bytes(NETWORKS[classes[name]], part, read[name], dtype) for name, part in networks.items())
    target = Path(target)
    check_replaceable(target)
    cpu = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(complete_or_absent(target, needed, overwrite))
        input_ranges = {} if quantization is None else quantization.input_ranges()
        bar = stack.enter_context(tqdm(total=sum(read.values()), unit="B", unit_scale=True, disable=not progress))
        for path in folder.iterdir():
            if path.is_file() and (path.suffix in _PLAIN or path.name in adapters) and path.name != MANIFEST:
                shutil.copy(path, scratch / path.name)
        for name, part in parts.items():
            bar.set_description(f"{folder.name}/{name}")
            if name in networks:
                module = load_network(NETWORKS[classes[name]], part, dtype, cpu, bar)
                if quantization is not None and name in input_ranges:
                    module = quantize_network(module, input_ranges[name], quantization.dtype)
                save_network(module, scratch / name, layout)
                if classes[name] == "VQModel":
                    preview_map.copy_stored(module, scratch / name, part)
                config = module.config
                del module  # before the next one is read, so that the peak is one component
                if classes[name] == "CLIPVisionModelWithProjection":
                    with jax.default_device(jax.devices("cpu")[0]):
                        if not zero_embed.copy_stored(part, scratch / name, config):
                            zero_embed.store(scratch / name, config)
            else:
                (scratch / name).mkdir()
                for path in part.iterdir():
                    if path.is_file() and path.suffix in _PLAIN:
                        shutil.copy(path, scratch / name / path.name)
        write_manifest(scratch)
    return target


def _target_bytes(cls: type[nnx.Module], folder: Path, stored: int, dtype: DTypeLike | None) -> int:
    """Estimate the bytes of a component in the target."""
    if dtype is None:
        return stored
    path = folder / "config.json"
    return bytes_as(flat_params(abstract(cls, cls.CONFIG.from_dict(read_json(path), str(path)))), dtype)
