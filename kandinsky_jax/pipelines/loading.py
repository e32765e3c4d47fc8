"""Pipelines from folders and back: the components of a checkpoint opened, checked, read and written."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import jax
from flax import nnx

from kandinsky_jax import hub, zero_embed
from kandinsky_jax.checkpoint import (
    CheckpointError,
    Deferred,
    Layout,
    default_dtype,
    describe_network,
    flat_params,
    load_network,
    loading_bar,
    save_network,
    stored_bytes,
)
from kandinsky_jax.checkpoint.tokenizer import load_tokenizer
from kandinsky_jax.compilation import compiling_ahead
from kandinsky_jax.images import CLIPImageProcessor
from kandinsky_jax.models import NETWORKS
from kandinsky_jax.schedulers import SCHEDULERS, Scheduler, scheduler_from_config
from kandinsky_jax.sharding import Mesh, Rules, default_mesh
from kandinsky_jax.storage import check_replaceable, complete_or_absent, read_json

Warmup = Mapping[str, Any] | Callable[[Any], Any]  # arguments of `warmup`, or what calls a pipeline


class PretrainedMixin:
    """Loading and saving of a pipeline."""

    REPOSITORY: ClassVar[str]

    if TYPE_CHECKING:  # of `Pipeline`

        def _held(self) -> dict[str, Any]: ...

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        dtype: Any = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        warmup: Warmup | None = None,
        mesh: Mesh | None = None,
        shard_rules: Rules = (),
        **components: Any,
    ) -> Self:
        """Load a pipeline.

        The vision tower is checked, but for its numbers, and read from its folder when a picture first needs it.

        Args:
            name: "tiny" (embedded), a folder in diffusers' layout or ours, or a Hub repository.
            dtype: of the networks; None is float32 on a CPU and bfloat16 on a TPU or GPU.
            revision, cache_dir: of a Hub repository.
            warmup: what to compile while the networks are read: arguments of `warmup`, such as `{"height": 512,
                "width": 512, "batch": 1}`, or a function that calls the pipeline that it is given, which has no
                arrays, as the loaded one will be called.
            mesh: the devices to draw on, see `kandinsky_jax.sharding.make_mesh`; None is all of this process, each for
                its own images.
            shard_rules: which parameters are divided over the mesh's `rows`, for networks that would not fit on one
                device: (pattern, PartitionSpec) pairs, see `kandinsky_jax.sharding.Rules`.
            components: ready components, by the constructor's names, that are not loaded.
        Raises:
            CheckpointError, ConfigError, SchedulerError: before any network is read where that can be known.
        """
        folder = hub.resolve(name, cls.REPOSITORY, revision=revision, cache_dir=cache_dir)
        return cls._load([describe(cls, folder, dtype, components, mesh or default_mesh(), shard_rules)], warmup)

    @classmethod
    def _load(cls, stores: Sequence[_Store], warmup: Warmup | None) -> Self:
        """Read the networks, and compile meanwhile."""
        ready = {name: part for store in stores for name, part in store.ready.items()}
        networks = {name: part for store in stores for name, part in store.networks.items()}

        def rehearse() -> None:
            if warmup is not None:
                twin: Any = cls(**ready, **networks)
                twin.set_progress_bar_config(disable=True)
                if callable(warmup):
                    warmup(twin)
                else:
                    twin.warmup(**warmup)

        with compiling_ahead(rehearse):
            for store in stores:
                ready |= _read(store)
        return cls(**ready)

    def save_pretrained(
        self, folder: str | os.PathLike[str], *, layout: Layout = "diffusers", overwrite: bool = False
    ) -> None:
        """Write the pipeline; the folder is complete or absent.

        Args:
            layout: "diffusers" writes what diffusers loads; "orbax" what a pod restores fastest.
        """
        check_replaceable(folder)
        parts = self._held()
        needed = sum(_bytes(part) for part in parts.values())
        with complete_or_absent(folder, needed, overwrite) as scratch:
            index: dict[str, Any] = {"_class_name": type(self).__name__}
            for name, held in parts.items():
                part = held.peek() if isinstance(held, Deferred) else held
                if isinstance(part, nnx.Module):
                    save_network(part, scratch / name, layout)
                    if isinstance(held, Deferred):
                        zero_embed.carry(held.folder, scratch / name, held.config)
                else:
                    part.save_pretrained(scratch / name)
                library = "diffusers" if isinstance(part, Scheduler) or _is_diffusers(part) else "transformers"
                index[name] = [library, type(part).__name__]
            (scratch / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


# Components -------------------------------------------------------------------------------------------------------

_NETWORK_OF = {
    "unet": "UNet2DConditionModel",
    "movq": "VQModel",
    "prior": "PriorTransformer",
    "text_encoder": "CLIPTextModelWithProjection",
    "image_encoder": "CLIPVisionModelWithProjection",
}


_DEFERRED = ("image_encoder",)  # a prompt needs nothing of it but its embedding of zeros, see `zero_embed`


def _bare(name: str) -> str:
    """`prior_text_encoder` of a combined pipeline is a `text_encoder`; `prior_prior` a `prior`."""
    return name.removeprefix("prior_")


def expected_types(name: str) -> tuple[type, ...]:
    """The classes that a component of this name may have."""
    bare = _bare(name)
    if bare in _NETWORK_OF:
        return (NETWORKS[_NETWORK_OF[bare]],)
    if bare == "scheduler":
        return (Scheduler,)
    if bare == "image_processor":
        return (CLIPImageProcessor,)
    from transformers import CLIPTokenizer

    return (CLIPTokenizer,)


def _is_diffusers(part: Any) -> bool:
    return isinstance(part, nnx.Module) and not type(part).__name__.startswith("CLIP")


def _bytes(part: Any) -> int:
    """How many a network takes."""
    if isinstance(part, Deferred):
        return part.nbytes
    return sum(leaf.nbytes for leaf in flat_params(part).values()) if isinstance(part, nnx.Module) else 0


def component_names(cls: type) -> tuple[str, ...]:
    """The components that a pipeline's constructor takes."""
    return tuple(inspect.signature(cls).parameters)


def _check_index(cls: type[PretrainedMixin], folder: Path, names: Sequence[str]) -> None:
    """Raise where a folder's model_index.json is not one of this pipeline."""
    found = hub.pipeline_class(folder)
    if (kind := hub.kind(folder)) != cls.REPOSITORY:
        right = f"load it with {' or '.join(hub.KINDS[kind])}, or " if kind else ""
        raise CheckpointError(
            f"{folder} holds a {found}, which {cls.__name__} cannot use; {right}give {cls.__name__} a "
            + " or ".join(hub.KINDS[cls.REPOSITORY])
        )
    listed, faults = hub.components(folder), []
    for name in names:
        allowed = [t.__name__ for t in expected_types(name)] if _bare(name) != "scheduler" else list(SCHEDULERS)
        allowed += ["CLIPTokenizerFast"] if _bare(name) == "tokenizer" else []
        if name not in listed:
            faults.append(f"{name} is missing")
        elif listed[name] not in allowed:
            faults.append(f"{name} is a {listed[name]}, supported: {', '.join(allowed)}")
    if faults:
        raise CheckpointError(f"{folder / 'model_index.json'}: " + "; ".join(faults))


class _Store(NamedTuple):
    """A pipeline's folder, opened: what is cheap is read, the networks are described."""

    folder: Path
    dtype: Any
    ready: dict[str, Any]  # given, or read, by the names of the pipeline's constructor
    networks: dict[str, nnx.Module]  # to be read; without their arrays
    prefix: str = ""  # of the names

    def within(self, prefix: str) -> _Store:
        """The same for the constructor of a combined pipeline."""
        ready, networks = ({prefix + k: v for k, v in parts.items()} for parts in (self.ready, self.networks))
        return self._replace(ready=ready, networks=networks, prefix=prefix)


def describe(
    cls: type[PretrainedMixin], folder: Path, dtype: Any, given: Mapping[str, Any], mesh: Mesh | None, rules: Rules
) -> _Store:
    """Check and open a pipeline's folder; `given` components are not looked for in it."""
    names = component_names(cls)
    if unknown := given.keys() - set(names):
        raise TypeError(f"{cls.__name__} has no component {sorted(unknown)}; it has {list(names)}")
    missing = [name for name in names if name not in given]
    _check_index(cls, folder, missing)
    folders = {name: hub.component_folder(folder, name) for name in missing}
    dtype = default_dtype() if dtype is None else jax.numpy.dtype(dtype)
    heavy = [name for name in missing if _bare(name) in _NETWORK_OF]
    cheap = {name: _load_small(_bare(name), folders[name]) for name in missing if name not in heavy}
    kinds = {name: NETWORKS[_NETWORK_OF[_bare(name)]] for name in heavy}
    later = {n: Deferred(kind, folders[n], dtype, mesh, rules) for n, kind in kinds.items() if _bare(n) in _DEFERRED}
    networks = {
        n: describe_network(kind, folders[n], dtype, mesh, rules) for n, kind in kinds.items() if n not in later
    }
    return _Store(folder, dtype, {**given, **cheap, **later}, networks)


def _read(store: _Store) -> dict[str, Any]:
    """A pipeline's networks, under a progress bar."""
    folders = {name: hub.component_folder(store.folder, name.removeprefix(store.prefix)) for name in store.networks}
    with loading_bar(sum(stored_bytes(folder) for folder in folders.values()), store.folder.name) as bar:
        return {n: load_network(store.networks[n], folder, store.dtype, progress=bar) for n, folder in folders.items()}


def _load_small(bare: str, folder: Path) -> Any:
    if bare == "scheduler":
        path = folder / "scheduler_config.json"
        return scheduler_from_config(read_json(path), str(path))
    if bare == "image_processor":
        return CLIPImageProcessor.from_pretrained(folder)
    return load_tokenizer(folder)
