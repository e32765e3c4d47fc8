"""What all pipelines share: components, loading and saving, the progress bar, and driving the loop with callbacks."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import jax
import numpy as np
from flax import nnx
from PIL import Image
from tqdm.auto import tqdm

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
    move_network,
    save_network,
    stored_bytes,
)
from kandinsky_jax.compilation import compiling_ahead, use_compilation_cache
from kandinsky_jax.images import CLIPImageProcessor
from kandinsky_jax.models import NETWORKS
from kandinsky_jax.noise import Source
from kandinsky_jax.pipelines.adapters import LoraLoader
from kandinsky_jax.sampling import Lane, Network, sample
from kandinsky_jax.schedulers import SCHEDULERS, Schedule, Scheduler, scheduler_from_config
from kandinsky_jax.sharding import Mesh, Rules, default_mesh
from kandinsky_jax.storage import check_replaceable, complete_or_absent, read_json

Callback = Callable[[Any, int, int, dict[str, Any]], dict[str, Any]]
Warmup = Mapping[str, Any] | Callable[[Any], Any]  # arguments of `warmup`, or what calls a pipeline


class ImagePipelineOutput(NamedTuple):
    """images: a list of PIL pictures, or an array, as `output_type` asks."""

    images: Any


class Late:
    """The attribute of a component that may be `Deferred`: whoever asks for it gets the network."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, pipe: Any, owner: type | None = None) -> Any:
        part = self if pipe is None else vars(pipe)[self._name]
        return part.load() if isinstance(part, Deferred) else part

    def __set__(self, pipe: Any, part: Any) -> None:
        vars(pipe)[self._name] = part


class Pipeline(LoraLoader):
    """Base of the pipelines.

    A subclass's constructor takes its components by diffusers' names and hands them to `_register`.
    """

    REPOSITORY: ClassVar[str]  # the official repository, and the subfolder of a family
    PREFIX: ClassVar[str] = ""  # of its components' names within a combined pipeline
    STAGE: ClassVar[str] = ""  # what the progress bar says

    def _register(self, **components: Any) -> None:
        use_compilation_cache()
        for name, component in components.items():
            expected = _expected_types(name)
            kind = component.cls if isinstance(component, Deferred) else type(component)
            if not issubclass(kind, expected):
                wanted = " or ".join(t.__name__ for t in expected)
                raise TypeError(f"{type(self).__name__}: {name} must be a {wanted}, got {kind.__name__}")
            setattr(self, name, component)
        self._component_names = tuple(components)
        self._progress_bar_config: dict[str, Any] = {}

    @property
    def components(self) -> dict[str, Any]:
        """The components by the names that the constructor takes; asked for in this way, all of them are loaded."""
        return {name: getattr(self, name) for name in self._component_names}

    def _held(self) -> dict[str, Any]:
        """The components, those that nobody has needed yet as `Deferred`."""
        return {name: vars(self)[name] for name in self._component_names}

    @classmethod
    def from_pipe(cls, *pipes: Pipeline, **components: Any) -> Self:
        """Another pipeline of the same components: nothing is loaded, no array is copied.

        Args:
            pipes: one or more, such as a decoder and a prior for a combined pipeline; where two have a component of the
                same name, the last one's counts.
            components: by the constructor's names; they count before the pipes'.
        Raises:
            TypeError: where a component is missing or has no place here.
            CheckpointError: where the unet is one for another mode.
        """
        names = _parameters(cls)
        if unknown := components.keys() - set(names):
            raise TypeError(f"{cls.__name__} has no component {sorted(unknown)}; it has {list(names)}")
        found = {pipe.PREFIX + name: part for pipe in pipes for name, part in pipe._held().items()}
        ready = {name: found[cls.PREFIX + name] for name in names if cls.PREFIX + name in found} | components
        if missing := [name for name in names if name not in ready]:
            given = " and ".join(type(pipe).__name__ for pipe in pipes) or "nothing"
            raise TypeError(
                f"{cls.__name__} needs {', '.join(missing)}, which {given} does not have; name them, or give another "
                f"pipeline that has them: {cls.__name__}.from_pipe(pipe, other_pipe)"
            )
        new = cls(**ready)
        if pipes:
            new.set_progress_bar_config(**pipes[0]._progress_bar_config)
        return new

    # Loading and saving -------------------------------------------------------------------------------------------

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
        return cls._load([_describe(cls, folder, dtype, components, mesh or default_mesh(), shard_rules)], warmup)

    @classmethod
    def _load(cls, stores: Sequence[_Store], warmup: Warmup | None) -> Self:
        """Read the networks, and compile meanwhile."""
        ready = {name: part for store in stores for name, part in store.ready.items()}
        networks = {name: part for store in stores for name, part in store.networks.items()}

        def rehearse() -> None:
            if warmup is not None:
                twin = cls(**ready, **networks)
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

    # Compiling ahead ----------------------------------------------------------------------------------------------

    def warmup(self, height: int = 512, width: int = 512, batch: int = 1, **arguments: Any) -> None:
        """Compile the programs of a call, in threads, and run none of them: the call then compiles nothing.

        Args:
            height, width: of the pictures, in pixels; a prior has no use for them.
            batch: how many prompts, or for a decoder how many image embeddings, the call has.
            arguments: further ones of the call, where they choose other programs: `num_images_per_prompt`,
                `guidance_scale` and `prior_guidance_scale` (1 turns guidance off), a `TorchGenerator` as `generator`,
                `output_type="latent"`, a callback.
        """
        picture = Image.new("RGB", (64, 64))
        given: dict[str, Any] = {"height": height, "width": width, "generator": 0, "prompt": [""] * batch}
        given |= {"image": picture, "mask_image": picture.convert("L"), "hint": picture.convert("L")}
        given |= self._stand_ins(batch)
        # Another pipeline of the same parts, because a pipeline may keep results, and here they are zeros.
        twin: Any = type(self)(**self._held())
        twin.set_progress_bar_config(disable=True)
        call = {name: value for name, value in given.items() if name in inspect.signature(twin.__call__).parameters}
        with compiling_ahead(lambda: twin(**call | arguments)):
            pass

    def _stand_ins(self, batch: int) -> dict[str, Any]:
        """Arguments of a call that depend on the components, for `warmup`."""
        return {}

    # Devices ------------------------------------------------------------------------------------------------------

    def shard(self, mesh: Mesh | None, shard_rules: Rules = ()) -> None:
        """Move the networks, which other pipelines may share, onto a mesh, or onto JAX's default device.

        Args:
            mesh: see `kandinsky_jax.sharding.make_mesh`.
            shard_rules: see `from_pretrained`.
        """
        for part in self._held().values():
            if isinstance(part, Deferred):
                part.move(mesh, shard_rules)
            elif isinstance(part, nnx.Module):
                move_network(part, mesh, shard_rules)

    # Progress -----------------------------------------------------------------------------------------------------

    def set_progress_bar_config(self, **config: Any) -> None:
        """Arguments of `tqdm` for the progress bars; `disable=True` turns them off."""
        self._progress_bar_config = config

    # Sampling -----------------------------------------------------------------------------------------------------

    @property
    def guidance_scale(self) -> float:
        """Of the current or last call."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """Number of steps of the current or last call."""
        return self._num_timesteps

    def _denoise(
        self,
        module: nnx.Module,
        lanes_of: Callable[[Network, Any, Mapping[str, Any]], Sequence[Lane]],
        tensors: dict[str, Any],
        schedule: Schedule,
        latents: Sequence[jax.Array],
        source: Source,
        guidance_scale: float,
        callback: Callback | None,
        callback_inputs: Sequence[str],
        guidance_interval: tuple[int, int] | None = None,
    ) -> list[jax.Array]:
        """Run the loop under a progress bar, with the user's callback after each step.

        Args:
            lanes_of: (network, parameters, tensors) -> the lanes.
            tensors: what a callback may see and change besides the latents, by diffusers' names.
            latents: each lane's first sample.
            guidance_interval: see `sample`.
        """
        network, params = Network.split(module)
        lanes = lanes_of(network, params, tensors)
        self._guidance_scale, self._num_timesteps = guidance_scale, len(schedule)

        def call_back(done: int, samples: list[jax.Array]) -> list[jax.Array] | None:
            nonlocal lanes
            seen = tensors | {"latents": _join(samples)}
            given = {name: seen[name] for name in callback_inputs}
            assert callback is not None
            returned = callback(self, done - 1, schedule.timesteps[done - 1].item(), dict(given))
            if not isinstance(returned, dict):
                raise TypeError(f"callback_on_step_end must return a dict, returned {type(returned).__name__}")
            changed = {k: v for k, v in returned.items() if k in seen and v is not seen[k]}
            if new := {k: v for k, v in changed.items() if k != "latents"}:
                tensors.update(new)
                lanes = lanes_of(network, params, tensors)
            return _part(changed["latents"], samples) if "latents" in changed else None

        with tqdm(**({"total": len(schedule), "desc": self.STAGE} | self._progress_bar_config)) as bar:

            def after(done: int, samples: list[jax.Array]) -> list[jax.Array] | None:
                bar.update(done - bar.n)
                return call_back(done, samples) if callback is not None else None

            return sample(
                network,
                params,
                lambda: lanes,
                schedule,
                latents,
                source,
                guidance_scale if guidance_scale > 1 else None,
                interval=guidance_interval,
                after=after,
                every_step=callback is not None,
            )


def _join(samples: Sequence[jax.Array]) -> np.ndarray:
    """The lanes' samples as users see them: one batch, pictures in PyTorch's order of axes."""
    joined = np.concatenate([np.asarray(x) for x in samples])
    return joined.transpose(0, 3, 1, 2) if joined.ndim == 4 else joined


def _part(latents: Any, samples: Sequence[jax.Array]) -> list[jax.Array]:
    """What a callback returned as latents, as the lanes' samples."""
    array = np.asarray(latents, np.float32)
    if array.shape != _join(samples).shape:
        raise ValueError(f"the callback's latents have shape {array.shape}, needed is {_join(samples).shape}")
    if array.ndim == 4:
        array = array.transpose(0, 2, 3, 1)
    return [jax.numpy.asarray(part) for part in np.split(array, len(samples))]


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


def _expected_types(name: str) -> tuple[type, ...]:
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


def _parameters(cls: type) -> tuple[str, ...]:
    return tuple(inspect.signature(cls).parameters)


def _check_index(cls: type[Pipeline], folder: Path, names: Sequence[str]) -> None:
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
        allowed = [t.__name__ for t in _expected_types(name)] if _bare(name) != "scheduler" else list(SCHEDULERS)
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


def _describe(
    cls: type[Pipeline], folder: Path, dtype: Any, given: Mapping[str, Any], mesh: Mesh | None, rules: Rules
) -> _Store:
    """Check and open a pipeline's folder; `given` components are not looked for in it."""
    names = _parameters(cls)
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
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
