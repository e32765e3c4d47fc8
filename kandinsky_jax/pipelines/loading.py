"""Loading and saving of pipelines: the components of a checkpoint are opened, checked, read and written."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

from flax import nnx

from kandinsky_jax.checkpoint import (
    CheckpointError,
    Layout,
    LazyNetwork,
    describe_network,
    flat_params,
    hub,
    load_network,
    loading_bar,
    preview_map,
    recommended_settings,
    save_network,
    stored_bytes,
    zero_embed,
)
from kandinsky_jax.checkpoint.manifest import MANIFEST, note_saved, write_manifest
from kandinsky_jax.checkpoint.recommended_settings import RecommendedSettings
from kandinsky_jax.checkpoint.saving import check_saving_arguments
from kandinsky_jax.checkpoint.tensor_files import WeightSelection, stored_variants
from kandinsky_jax.checkpoint.tokenizer import check_tokenizer, load_tokenizer
from kandinsky_jax.common.atomic import replace_file
from kandinsky_jax.common.errors import quote, shorten, summarize
from kandinsky_jax.common.reading import of_file
from kandinsky_jax.common.storage import check_replaceable, complete_or_absent, read_json
from kandinsky_jax.compilation import compiling_ahead
from kandinsky_jax.images import CLIPImageProcessor
from kandinsky_jax.models import NETWORKS, CLIPVisionModelWithProjection, VQModel
from kandinsky_jax.parallel.mesh import Mesh, default_mesh
from kandinsky_jax.parallel.sharding import Rules
from kandinsky_jax.pipelines.loading_arguments import Dtypes, without_diffusers_arguments
from kandinsky_jax.pipelines.modes import class_names, repository_of
from kandinsky_jax.schedulers import SCHEDULERS, Scheduler, scheduler_from_config
from kandinsky_jax.schedulers.base import near

Warmup = Mapping[str, object] | Callable[[Any], object]  # arguments of `warmup`, or a function that calls a pipeline


@dataclasses.dataclass(frozen=True)
class LoadOptions:
    """How a pipeline is loaded: see `PretrainedMixin.from_pretrained`."""

    dtypes: Dtypes
    mesh: Mesh | None
    rules: Rules
    hub: hub.HubOptions


class PretrainedMixin:
    """Loading and saving of a pipeline."""

    REPOSITORY: ClassVar[str]

    if TYPE_CHECKING:  # of `Pipeline`
        _settings_to_save: Callable[[Path], RecommendedSettings]
        _settle_scheduler: Callable[[], None]

        def _held(self) -> dict[str, Any]: ...

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        dtype: object = None,
        torch_dtype: object = None,
        variant: str | None = None,
        use_safetensors: bool | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        subfolder: str | None = None,
        warmup: Warmup | None = None,
        mesh: Mesh | None = None,
        shard_rules: Rules = (),
        **components: Any,
    ) -> Self:
        """Load a pipeline.

        The vision tower is validated at once, except for its values, and read when a picture first needs it.

        Args:
            name: "tiny" (embedded), a folder in diffusers' layout or ours, or a Hub repository.
            dtype: of the networks: a name, a NumPy, JAX or PyTorch dtype, or a dictionary of them by component, with
                "default" for all others; None is float32 on a CPU and bfloat16 on a TPU or GPU.
            torch_dtype: diffusers' older name of `dtype`.
            variant: read files such as `*.fp16.safetensors`, and plain ones where a component has none of these.
            use_safetensors: True refuses `.bin` files, False reads nothing else; None prefers safetensors.
            revision, cache_dir, token, local_files_only, force_download: see `kandinsky_jax.checkpoint.hub.HubOptions`.
            subfolder: of the folder or repository that holds the model.
            warmup: what to compile while the networks are read: arguments of `warmup`, such as `{"height": 512,
                "width": 512, "batch": 1}`, or a function that gets a pipeline without arrays and calls it as the loaded
                one will be called.
            mesh: the devices to run on, see `kandinsky_jax.make_mesh`; None is all of this process, each for
                its own images.
            shard_rules: which parameters are sharded over the mesh's `rows`, for networks that would not fit on one
                device: (pattern, PartitionSpec) pairs, see `kandinsky_jax.parallel.sharding.Rules`.
            components: components to use instead of loading them, by the constructor's names.
        Raises:
            CheckpointError, ConfigError, SchedulerError: before any network is read, where possible.
            TypeError: for an argument of diffusers that has no use here; the message says what to write instead.
        """
        components = without_diffusers_arguments(components, f"{cls.__name__}.from_pretrained")
        options = LoadOptions(
            dtypes=Dtypes.read(dtype, torch_dtype, component_names(cls)),
            mesh=mesh or default_mesh(),
            rules=shard_rules,
            hub=hub.HubOptions(
                revision=revision,
                cache_dir=cache_dir,
                token=token,
                local_files_only=local_files_only,
                force_download=force_download,
                subfolder=subfolder,
                selection=WeightSelection(variant, use_safetensors),
            ),
        )
        with hub.hint_for_cached_files():
            return cls._load(cls._open(name, options, components), warmup)

    @classmethod
    def _open(
        cls, name: str | os.PathLike[str], options: LoadOptions, components: Mapping[str, object]
    ) -> Sequence[_Store]:
        """Open the folders that make up the pipeline."""
        folder = hub.resolve(name, cls.REPOSITORY, **vars(options.hub))
        return [describe(cls, folder, options, components)]

    @classmethod
    def _load(cls, stores: Sequence[_Store], warmup: Warmup | None) -> Self:
        """Read the networks while compiling."""
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
        self,
        folder: str | os.PathLike[str],
        *,
        layout: Layout = "diffusers",
        overwrite: bool | None = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        **arguments: Any,
    ) -> None:
        """Write the pipeline atomically, with a manifest of checksums for `kandinsky-jax verify`.

        Args:
            folder: created if missing. It may exist if it is empty or holds a pipeline of this kind, which is replaced;
                other files in it, such as a README, are kept.
            layout: "diffusers" writes files that diffusers loads; "orbax" a checkpoint that a pod restores fastest.
            overwrite: True replaces a pipeline of another kind too, False nothing at all.
            safe_serialization: True; no pickles are written.
            variant, max_shard_size: see `kandinsky_jax.save_network`.
            arguments: further arguments of diffusers, which have no use here.
        Raises:
            FileExistsError: where the folder holds something else.
            TypeError: for a further argument; the message says what to write instead.
        """
        check_saving_arguments(f"{type(self).__name__}.save_pretrained", safe_serialization, arguments)
        folder = Path(folder)
        _check_target(type(self), folder, overwrite)
        self._settle_scheduler()
        parts = self._held()
        needed = sum(_component_bytes(part) for part in parts.values())
        with complete_or_absent(folder, needed, overwrite=overwrite is not False) as scratch:
            index: dict[str, object] = {"_class_name": type(self).__name__}
            for name, held in parts.items():
                part = held.read_once() if isinstance(held, LazyNetwork) else held
                if isinstance(part, nnx.Module):
                    save_network(part, scratch / name, layout, None, variant, max_shard_size)
                    if isinstance(part, VQModel):
                        preview_map.copy_stored(part, scratch / name)
                    if isinstance(held, LazyNetwork):
                        saved = WeightSelection(variant)
                        zero_embed.copy_stored(held.folder, scratch / name, held.config, held.selection, saved)
                else:
                    part.save_pretrained(scratch / name)
                index[name] = _index_entry(part)
            (scratch / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
            try:
                recommended_settings.write(self._settings_to_save(scratch), scratch)
            except CheckpointError as error:
                warnings.warn(f"saved without recommended settings: {error}", stacklevel=2)
            write_manifest(scratch)
            _keep_other_files(folder, scratch)
        note_saved(folder, own=False)

    def save_config(self, folder: str | os.PathLike[str], **arguments: object) -> None:
        """Write the pipeline's `model_index.json` into a folder, which is created if missing."""
        check_saving_arguments(f"{type(self).__name__}.save_config", True, arguments)
        held = {name: part.cls if isinstance(part, LazyNetwork) else part for name, part in self._held().items()}
        index = {"_class_name": type(self).__name__} | {name: _index_entry(part) for name, part in held.items()}
        Path(folder).mkdir(parents=True, exist_ok=True)
        replace_file(Path(folder) / "model_index.json", (json.dumps(index, indent=2) + "\n").encode())


def _check_target(cls: type[PretrainedMixin], folder: Path, overwrite: bool | None) -> None:
    """Raise FileExistsError where saving a pipeline into this folder would lose something else."""
    check_replaceable(folder)
    if not folder.is_dir() or not any(folder.iterdir()):
        if folder.is_dir() and overwrite is False:
            folder.rmdir()
        return
    found = hub.pipeline_class(folder)
    if overwrite is None and repository_of(found) != cls.REPOSITORY:
        raise FileExistsError(
            f"{folder} holds a {shorten(found)}; choose another folder, or overwrite=True to replace it by a "
            f"{cls.__name__}"
        )


def _keep_other_files(folder: Path, scratch: Path) -> None:
    """Keep the files next to a pipeline that is replaced: hard-linked where the file system can, else copied."""
    if not (folder / "model_index.json").is_file():
        return
    own = {"model_index.json", MANIFEST, recommended_settings.FILE, *hub.components(folder)}
    own |= {*recommended_settings.lora_files(folder)}
    for path in folder.iterdir():
        if path.name in own or (scratch / path.name).exists():
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, scratch / path.name, symlinks=True, copy_function=_link_or_copy)
        else:
            _link_or_copy(path, scratch / path.name)


def _link_or_copy(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _index_entry(part: object) -> list[str]:
    """Return the entry of a component or class in `model_index.json`: library and class name."""
    cls = part if isinstance(part, type) else type(part)
    network_of_diffusers = issubclass(cls, nnx.Module) and not cls.__name__.startswith("CLIP")
    return ["diffusers" if issubclass(cls, Scheduler) or network_of_diffusers else "transformers", cls.__name__]


# Components -------------------------------------------------------------------------------------------------------

_NETWORK_OF = {
    "unet": "UNet2DConditionModel",
    "movq": "VQModel",
    "prior": "PriorTransformer",
    "text_encoder": "CLIPTextModelWithProjection",
    "image_encoder": "CLIPVisionModelWithProjection",
}


_LAZY = ("image_encoder",)  # text-to-image needs only its embedding of zeros, see `zero_embed`


def _bare(name: str) -> str:
    """Return a component's name without the prefix that it has in a combined pipeline."""
    return name.removeprefix("prior_")


def expected_types(name: str) -> tuple[type, ...]:
    """Return the classes that a component of this name may have."""
    bare = _bare(name)
    if bare in _NETWORK_OF:
        return (NETWORKS[_NETWORK_OF[bare]],)
    if bare == "scheduler":
        return (Scheduler,)
    if bare == "image_processor":
        return (CLIPImageProcessor,)
    from transformers import CLIPTokenizer

    return (CLIPTokenizer,)


def _component_bytes(part: object) -> int:
    """Return the bytes of a network's parameters, 0 for other components."""
    if isinstance(part, LazyNetwork):
        return part.nbytes
    return sum(leaf.nbytes for leaf in flat_params(part).values()) if isinstance(part, nnx.Module) else 0


def component_names(cls: type) -> tuple[str, ...]:
    """Return the names of the components that a pipeline's constructor takes."""
    return tuple(inspect.signature(cls).parameters)


def _check_index(cls: type[PretrainedMixin], folder: Path, names: Sequence[str]) -> None:
    """Raise CheckpointError where a folder's model_index.json does not describe this pipeline."""
    found = hub.pipeline_class(folder)
    if (kind := repository_of(found)) != cls.REPOSITORY:
        right = f"load it with {' or '.join(class_names(kind))}, or " if kind else ""
        raise CheckpointError(
            f"{folder} holds a {shorten(found)}, which {cls.__name__} cannot use; {right}give {cls.__name__} a "
            + " or ".join(class_names(cls.REPOSITORY))
        )
    listed, faults = hub.components(folder), []
    for name in names:
        bare = _bare(name)
        if name not in listed:
            faults.append(f"{name} is missing")
        elif not _is_supported(bare, listed[name]):
            if bare == "scheduler":
                supported = shorten(near(listed[name], SCHEDULERS), 150)
            else:
                supported = "supported: " + ", ".join(t.__name__ for t in expected_types(name))
            faults.append(f"{name} is a {shorten(listed[name], 60)}, {supported}")
    if faults:
        raise CheckpointError(f"{folder / 'model_index.json'}: {summarize(faults)}")


# Releases of transformers name these classes differently ("...Fast", "...Pil"); the component's own files decide.
_NAMED_BY_ITS_FILES = {"image_processor": "CLIPImageProcessor", "tokenizer": "CLIPTokenizer"}
_OLD_NAMES = {"image_processor": ("CLIPFeatureExtractor",), "tokenizer": ("TokenizersBackend",)}


def _is_supported(bare: str, class_name: str) -> bool:
    if bare in _NAMED_BY_ITS_FILES:
        return class_name.startswith(_NAMED_BY_ITS_FILES[bare]) or class_name in _OLD_NAMES[bare]
    return class_name in SCHEDULERS if bare == "scheduler" else class_name == _NETWORK_OF[bare]


class _Store(NamedTuple):
    """An opened folder of a pipeline: small components are read, networks are described."""

    folder: Path
    ready: dict[str, object]  # components given or read, by the constructor's names
    networks: dict[str, nnx.Module]  # networks still to be read, without their arrays
    folders: dict[str, Path]  # of these networks
    options: LoadOptions
    prefix: str  # of the names in the constructor of a combined pipeline


def describe(
    cls: type[PretrainedMixin], folder: Path, options: LoadOptions, given: Mapping[str, object], prefix: str = ""
) -> _Store:
    """Check and open a pipeline's folder.

    Args:
        given: components that are not looked for in the folder.
        prefix: of the components' names in the combined pipeline that this one is a part of.
    """
    names = component_names(cls)
    if unknown := given.keys() - set(names):
        raise TypeError(f"{cls.__name__} has no component {sorted(unknown)}; it has {list(names)}")
    missing = [name for name in names if name not in given]
    _check_index(cls, folder, missing)
    folders = {name: hub.component_folder(folder, name) for name in missing}
    kinds = {name: NETWORKS[_NETWORK_OF[_bare(name)]] for name in missing if _bare(name) in _NETWORK_OF}
    selection = options.hub.selection
    _check_variant(folder, [folders[name] for name in kinds], selection)
    ready = dict(given) | {name: _load_small(_bare(name), folders[name]) for name in missing if name not in kinds}
    networks = {}
    for name, kind in kinds.items():
        arguments = (kind, folders[name], options.dtypes.of(prefix + name), options.mesh, options.rules)
        if _bare(name) in _LAZY:
            ready[name] = LazyNetwork(*arguments, selection)
        else:
            networks[name] = describe_network(*arguments)
    if "tokenizer" in folders and "text_encoder" in networks:
        try:
            check_tokenizer(ready["tokenizer"], networks["text_encoder"].config)
        except CheckpointError as error:
            raise CheckpointError(of_file(folders["tokenizer"], f"does not fit the model: {error}")) from None
    return _Store(
        folder,
        {prefix + name: part for name, part in ready.items()},
        {prefix + name: network for name, network in networks.items()},
        {prefix + name: folders[name] for name in networks},
        options,
        prefix,
    )


def _check_variant(folder: Path, parts: Sequence[Path], selection: WeightSelection) -> None:
    """Raise CheckpointError where no component has the requested variant."""
    stored = sorted({variant for part in parts for variant in stored_variants(part)})
    if selection.variant is not None and parts and selection.variant not in stored:
        there = f"there are {', '.join(stored)}" if stored else "leave variant= out to load its plain files"
        raise CheckpointError(f"{folder} has no files of the variant {quote(selection.variant)}; {there}")


def _read(store: _Store) -> dict[str, object]:
    """Read a pipeline's networks, under a progress bar."""
    selection, dtypes = store.options.hub.selection, store.options.dtypes
    total = sum(stored_bytes(folder, selection) for folder in store.folders.values())
    with loading_bar(total, store.folder.name) as bar:
        networks = {
            name: load_network(store.networks[name], folder, dtypes.of(name), progress=bar, selection=selection)
            for name, folder in store.folders.items()
        }
    for part in store.ready.values():
        if isinstance(part, LazyNetwork) and part.cls is CLIPVisionModelWithProjection:
            zero_embed.of(part)  # so that prompts do not need the folder later
    return networks


def _load_small(bare: str, folder: Path) -> Any:
    if bare == "scheduler":
        path = folder / "scheduler_config.json"
        return scheduler_from_config(read_json(path), str(path))
    if bare == "image_processor":
        return CLIPImageProcessor.from_pretrained(folder)
    return load_tokenizer(folder)
