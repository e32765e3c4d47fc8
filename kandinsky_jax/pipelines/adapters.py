"""LoRA in pipelines: adapters are loaded, and their changes are added to the networks' weights.

Names and behaviour are those of diffusers' loaders. Weights are changed in place, so that generating with LoRA costs no
more than without and compiles nothing; the original weights are kept as long as a change can be undone. All arithmetic
is done by NumPy on the host, so no program is compiled for it either.
"""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from kandinsky_jax.checkpoint import CheckpointError, flat_params, hub, lora_files, set_params
from kandinsky_jax.checkpoint.lora_files import Adapter
from kandinsky_jax.common.errors import quote, shorten
from kandinsky_jax.lora import FILE, LayerChange, parameter_of
from kandinsky_jax.models import PriorTransformer, UNet2DConditionModel
from kandinsky_jax.models.quantized import dequantize_weight, output_axis, quantize_weight, weight_parameters
from kandinsky_jax.parallel.sharding import in_memory
from kandinsky_jax.pipelines import lora_weights
from kandinsky_jax.pipelines.lora_weights import LayerWeights

TRAINED = (UNet2DConditionModel, PriorTransformer)  # networks that LoRA is for

Weight = float | Mapping[str, object]  # of an adapter: one number, or one for each network by component name


@dataclass(frozen=True)
class Adapters:
    """LoRA adapters of one network, which several pipelines may share; immutable.

    Attributes:
        loaded: the adapters by name.
        weights: of the active adapters, by layer.
        fused: weights of the adapters that are fused into the network's weights.
        enabled: whether active adapters are applied.
    """

    loaded: Mapping[str, Adapter] = field(default_factory=dict)
    weights: Mapping[str, LayerWeights] = field(default_factory=dict)
    fused: Mapping[str, LayerWeights] = field(default_factory=dict)
    enabled: bool = True

    def changes(self) -> dict[str, list[tuple[LayerChange, float]]]:
        """Return the changes to apply and their weights, by parameter; fused ones exclude all others of a layer."""
        found: dict[str, list[tuple[LayerChange, float]]] = {}
        for weights in (self.fused, self.weights) if self.enabled else ():
            fused = set(found)
            for name, by_layer in weights.items():
                for layer, change in self.loaded[name].items():
                    parameter = parameter_of(layer, change.down.ndim)
                    if weights is self.fused or parameter not in fused:
                        weight = lora_weights.in_layer(by_layer, layer)
                        found.setdefault(parameter, []).append((change, weight))
        return found


@dataclass
class _State:
    adapters: Adapters = field(default_factory=Adapters)
    before: dict[str, jax.Array] = field(default_factory=dict)  # original values of changed parameters


_STATES: weakref.WeakKeyDictionary[nnx.Module, _State] = weakref.WeakKeyDictionary()


def apply_adapters(updates: Sequence[tuple[nnx.Module, Adapters]]) -> None:
    """Set the adapters of networks and change their weights accordingly: all of them, or none on an error."""
    ready = []
    for module, adapters in updates:
        state = _STATES.get(module) or _State()
        params = flat_params(module)
        changes = adapters.changes()
        touched = {part for name in changes for part in weight_parameters(name, params)}
        before = state.before | {name: params[name] for name in touched - state.before.keys()}
        before = {name: _put_like(array, params[name]) for name, array in before.items()}
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # NumPy's loops release the GIL
            found = pool.map(lambda name: _changed(name, before, changes[name]), changes)  # noqa: B023
            changed = before | {name: array for arrays in found for name, array in arrays.items()}
        kept = {name: array for name, array in before.items() if name in touched}
        ready.append((module, params | changed, _State(adapters, kept)))
    for module, params, state in ready:
        set_params(module, params)
        _STATES[module] = state


def _put_like(array: jax.Array, like: jax.Array) -> jax.Array:
    """Put an array where `like` is, in its dtype: the network may have been moved or cast since."""
    if array.dtype != like.dtype:
        array = jax.device_put(np.asarray(array).astype(like.dtype))
    if array.sharding == like.sharding and array.committed == like.committed:
        return array
    return jax.device_put(array, in_memory(like.sharding, like.shape))


def _changed(
    name: str, arrays: Mapping[str, jax.Array], changes: Sequence[tuple[LayerChange, float]]
) -> dict[str, jax.Array]:
    """Return a parameter with changes added in float32, in its own dtype and sharding; if quantized, with its scale.

    Args:
        arrays: the parameters before.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        (first, amount), *others = changes
        total = first.delta(amount)
        for change, weight in others:
            total += change.delta(weight)
        names = weight_parameters(name, arrays)
        if len(names) > 1:
            return _requantized(names, arrays, total)
        return {name: _added(name, arrays[name], total)}


def _requantized(names: Sequence[str], arrays: Mapping[str, jax.Array], total: np.ndarray) -> dict[str, jax.Array]:
    """Return a quantized weight with a change, rounded again by scales of its own, and what belongs to it.

    Args:
        names: of the weight, its scale and its sum.
    """
    weight, scale, outputs = arrays[names[0]], arrays[names[1]], output_axis(names[0])
    whole = dequantize_weight(np.asarray(weight), np.asarray(scale), outputs) + total
    if not np.isfinite(whole).all():
        raise NotFiniteError(f"makes {names[0]} not finite")
    found = zip(names, quantize_weight(whole, weight.dtype.name, outputs), strict=False)
    return {name: _put_like(array, arrays[name]) for name, array in found}


def _added(name: str, before: jax.Array, total: np.ndarray) -> jax.Array:
    """Return a parameter with a change added."""
    parts = []
    for shard in before.addressable_shards:
        array = np.add(np.asarray(shard.data, np.float32), total[shard.index]).astype(before.dtype)
        if not np.isfinite(array).all():
            raise NotFiniteError(f"makes {name} too large for {before.dtype}, or not finite")
        # An uncommitted array has to stay uncommitted, or programs are compiled anew.
        parts.append(jax.device_put(array, shard.device if before.committed else None))
    if not before.committed:
        return parts[0]
    whole = jax.make_array_from_single_device_arrays(before.shape, before.sharding, parts)
    return jax.device_put(whole, in_memory(before.sharding, before.shape))


class NotFiniteError(ValueError):
    """Changed weights are not finite."""


class LoraLoader:
    """Mixin of pipelines that load LoRA adapters."""

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | Mapping[str, object],
        adapter_name: str | None = None,
        weight: float = 1.0,
        *,
        weight_name: str | None = None,
        subfolder: str | None = None,
        metadata: Mapping[str, object] | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        hotswap: bool = False,
    ) -> None:
        """Load LoRA for the UNet, the prior or both, and make it the active adapter of these networks.

        As in diffusers, adapters loaded before stay loaded and become inactive there; `set_adapters` activates several
        at once.

        Args:
            pretrained_model_name_or_path_or_dict: a `.safetensors` or tensors-only `.bin` file of diffusers, peft,
                kohya or this package; a folder that holds one, such as a training checkpoint or a folder of peft; a Hub
                repository ("owner/name"); or a dictionary of arrays with the names of such a file.
            adapter_name: name of the adapter; None numbers it, "default_0" and so on.
            weight: scale of the adapter.
            weight_name: the file's name in the folder or repository.
            subfolder: of the folder or repository.
            metadata: peft's configuration for a dictionary.
            revision, cache_dir, token, local_files_only, force_download: of a Hub repository, see huggingface_hub.
            hotswap: replace the adapter of this name.
        Raises:
            CheckpointError: for a file that cannot be read, is not supported, or fits no network of this pipeline.
            ValueError: for a name that is taken, or with `hotswap` one that is not.
        """
        networks = self._networks()
        if not networks:
            raise CheckpointError(f"{type(self).__name__} has no network that LoRA is trained for")
        given = pretrained_model_name_or_path_or_dict
        amount = lora_weights.in_all_layers(lora_weights.number("weight", weight))
        if isinstance(given, Mapping):
            if metadata is not None and not (
                isinstance(metadata, Mapping) and all(isinstance(key, str) for key in metadata)
            ):
                raise TypeError(f"metadata must be a dictionary of peft's fields by name, got {quote(metadata)}")
            opened = lora_files.from_dict(given, metadata)
        elif metadata is not None:
            raise ValueError("metadata is for a dictionary of arrays; a file has its own")
        else:
            found_at = hub.resolve_lora(
                given,
                weight_name,
                subfolder=subfolder,
                revision=revision,
                cache_dir=cache_dir,
                token=token,
                local_files_only=local_files_only,
                force_download=force_download,
            )
            with hub.hint_for_cached_files():
                opened = lora_files.open_file(lora_files.find(found_at, weight_name))
        layers = {_bare(name): lora_files.layers_of(flat_params(module)) for name, module in networks.items()}
        with hub.hint_for_cached_files():
            found, left_out = lora_files.read(opened, layers)
        modules = {bare: module for name, module in networks.items() if (bare := _bare(name)) in found}
        name = self._name_of(adapter_name, modules, hotswap)
        updates = []
        for bare, module in modules.items():
            now = adapters_of(module)
            if name in now.fused:
                raise ValueError(f"the adapter {name!r} is fused into the {bare}; call unfuse_lora first")
            updates.append((module, replace(now, loaded={**now.loaded, name: found[bare]}, weights={name: amount})))
        try:
            apply_adapters(updates)
        except NotFiniteError as error:
            raise opened.error(error) from None
        for other, count in left_out.items():
            warnings.warn(
                f"{shorten(opened.source, 200)} also changes {count} layers of a {other}, which are left out: "
                f"{type(self).__name__} has none",
                stacklevel=2,
            )

    def save_lora_weights(
        self,
        save_directory: str | os.PathLike[str],
        adapter_name: str | None = None,
        weight_name: str | None = None,
        safe_serialization: bool = True,
    ) -> Path:
        """Write a loaded adapter as a file that diffusers and `load_lora_weights` read.

        diffusers' method takes the layers' tensors instead. In both, the adapter's weight is not saved.

        Args:
            save_directory: created if missing.
            adapter_name: which adapter; may be None where only one is loaded.
            weight_name: the file's name; None is "pytorch_lora_weights.safetensors".
            safe_serialization: safetensors; nothing else is written.
        Returns:
            the file.
        Raises:
            ValueError: where the adapter is ambiguous or unknown, or `safe_serialization` is off.
        """
        if not safe_serialization:
            raise ValueError("only safetensors files are written; leave safe_serialization at True")
        names = self._loaded_names()
        if adapter_name is None and len(names) != 1:
            raise ValueError(f"there are {len(names)} adapters: {shorten(names)}; give adapter_name=")
        [name] = self._known([names[0] if adapter_name is None else adapter_name])
        parts = {_bare(part): now.loaded[name] for part, _, now in self._adapters() if name in now.loaded}
        return lora_files.write(save_directory, parts, FILE if weight_name is None else weight_name)

    def set_adapters(
        self,
        adapter_names: str | Sequence[str],
        adapter_weights: Weight | Sequence[Weight | None] | None = None,
    ) -> None:
        """Activate these adapters, each with its weight, and no others.

        Args:
            adapter_names: of loaded adapters.
            adapter_weights: a number for all, or one for each; None is 1. Instead of a number, a dictionary gives one
                for each network by its name in the pipeline, or for parts of it: {"unet": {"down": 0.5, "up":
                {"block_1": [0.2, 0.3]}}, "prior": 1.0}, see `lora_weights.of_network`.
        Raises:
            ValueError: for the name of an adapter that is not loaded, a wrong number of weights, a weight that is not a
                number, or an unknown part of a network.
        """
        wanted = self._known(adapter_names)
        listed = isinstance(adapter_weights, Sequence) and not isinstance(adapter_weights, str | bytes)
        if listed or getattr(adapter_weights, "ndim", 0) == 1:
            each: list[Any] = list(adapter_weights)  # type: ignore[arg-type]
        else:
            each = [adapter_weights] * len(wanted)
        if len(each) != len(wanted):
            raise ValueError(
                f"there are {len(each)} weights for {len(wanted)} adapters; give one for each, or one number"
            )
        own = [name for component in self._networks() for name in (component, _bare(component))]
        if unknown := [name for given in each if isinstance(given, Mapping) for name in given if name not in own]:
            raise ValueError(
                f"weights for {shorten(unknown)}; {type(self).__name__} has LoRA in {list(self._networks())}"
            )
        for name, given in zip(wanted, each, strict=True):
            self._warn_of_unused(name, given)
        updates = []
        for component, module, now in self._adapters():
            layers = lora_files.layers_of(flat_params(module))
            weights = {
                name: lora_weights.of_network(_bare(component), _of_component(component, given), layers)
                for name, given in zip(wanted, each, strict=True)
                if name in now.loaded
            }
            updates.append((module, replace(now, weights=weights)))
        apply_adapters(updates)

    def _warn_of_unused(self, name: str, given: Weight | None) -> None:
        """Warn of weights for networks that the adapter does not change."""
        if not isinstance(given, Mapping):
            return
        changed = [component for component, _, now in self._adapters() if name in now.loaded]
        known = {*changed, *map(_bare, changed)}
        if unused := [component for component in given if component not in known]:
            warnings.warn(
                f"the weights of the adapter {shorten(name, 60)!r} for {shorten(unused)} are not used: "
                f"it changes {changed} only",
                stacklevel=3,
            )

    def get_active_adapters(self) -> list[str]:
        """Return the names of the active adapters, even after `disable_lora`."""
        return list(dict.fromkeys(name for _, _, now in self._adapters() for name in now.weights))

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Return the names of all loaded adapters, by the component that they change."""
        return {component: list(now.loaded) for component, _, now in self._adapters() if now.loaded}

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Unload these adapters.

        Raises:
            ValueError: for an adapter that is not loaded, or is fused.
        """
        names = self._known(adapter_names)
        updates = []
        for _, module, now in self._adapters():
            if fused := [name for name in names if name in now.fused]:
                raise ValueError(f"the adapters {shorten(fused)} are fused; call unfuse_lora first")
            loaded = {name: adapter for name, adapter in now.loaded.items() if name not in names}
            weights = {name: weight for name, weight in now.weights.items() if name not in names}
            updates.append((module, replace(now, loaded=loaded, weights=weights)))
        apply_adapters(updates)

    def disable_lora(self) -> None:
        """Restore the original weights; adapters stay loaded, and `enable_lora` applies the active ones again."""
        apply_adapters([(module, replace(now, enabled=False)) for _, module, now in self._adapters()])

    def enable_lora(self) -> None:
        """Apply the active adapters again, after `disable_lora`."""
        apply_adapters([(module, replace(now, enabled=True)) for _, module, now in self._adapters()])

    def fuse_lora(
        self,
        components: Sequence[str] | None = None,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: Sequence[str] | None = None,
    ) -> None:
        """Fuse adapters into the weights, where they stay when adapters are unloaded.

        `save_pretrained` writes weights with the active adapters whether they are fused or not.

        Args:
            components: the networks, by their names in the pipeline; None is all.
            lora_scale: multiplies the adapters' weights.
            safe_fusing: without effect; weights that are not finite are always refused.
            adapter_names: which adapters; None is the active ones.
        Raises:
            ValueError: for an adapter that is not loaded, or a component without LoRA.
        """
        names = None if adapter_names is None else self._known(adapter_names)
        scale = lora_weights.number("lora_scale", lora_scale)
        updates = []
        for _, module, now in self._chosen(components):
            chosen = [name for name in (now.weights if names is None else names) if name in now.loaded]
            weights = {name: now.weights.get(name, lora_weights.in_all_layers(1.0)) for name in chosen}
            new = {name: lora_weights.scaled(weight, scale) for name, weight in weights.items()}
            updates.append((module, replace(now, fused={**new, **now.fused})))
        apply_adapters(updates)

    def unfuse_lora(self, components: Sequence[str] | None = None) -> None:
        """Undo `fuse_lora`; active adapters are applied with their own weights again.

        Args:
            components: as in `fuse_lora`.
        """
        apply_adapters([(module, replace(now, fused={})) for _, module, now in self._chosen(components)])

    @property
    def fused_loras(self) -> set[str]:
        """Names of the fused adapters."""
        return {name for _, _, now in self._adapters() for name in now.fused}

    @property
    def num_fused_loras(self) -> int:
        """Number of fused adapters."""
        return len(self.fused_loras)

    def unload_lora_weights(self) -> None:
        """Unload all adapters; restores the original weights bit for bit, except for fused adapters."""
        held = self._adapters()
        apply_adapters([(module, replace(now, weights={}, enabled=True)) for _, module, now in held])
        for _, module, _ in held:
            del _STATES[module]

    # Networks and names -------------------------------------------------------------------------------------------

    def _networks(self) -> dict[str, nnx.Module]:
        held: Mapping[str, object] = self._held()  # type: ignore[attr-defined]
        return {name: part for name, part in held.items() if isinstance(part, TRAINED)}

    def _adapters(self) -> list[tuple[str, nnx.Module, Adapters]]:
        """Return (name, network, adapters) of the components that have LoRA loaded."""
        return [
            (name, module, _STATES[module].adapters) for name, module in self._networks().items() if module in _STATES
        ]

    def _chosen(self, components: Sequence[str] | None) -> list[tuple[str, nnx.Module, Adapters]]:
        """Return the entries of `_adapters` for the named components, all for None."""
        names = [components] if isinstance(components, str) else components
        own = list(self._networks())
        if names is not None and (unknown := [n for n in names if n not in own and n not in map(_bare, own)]):
            raise ValueError(f"{shorten(unknown)} has no LoRA in {type(self).__name__}; it has {own}")
        return [each for each in self._adapters() if names is None or each[0] in names or _bare(each[0]) in names]

    def _loaded_names(self) -> list[str]:
        return list(dict.fromkeys(name for _, _, now in self._adapters() for name in now.loaded))

    def _known(self, names: str | Sequence[str]) -> list[str]:
        """Return names as a list; ValueError for one that is not loaded."""
        if not isinstance(names, str) and not (
            isinstance(names, Sequence) and all(isinstance(name, str) for name in names)
        ):
            raise TypeError(f"adapters are named by a string or a list of strings, got {quote(names)}")
        wanted = [names] if isinstance(names, str) else list(names)
        known = self._loaded_names()
        if missing := [name for name in wanted if name not in known]:
            raise ValueError(f"no adapter {shorten(missing)} is loaded; there are {shorten(sorted(known))}")
        return wanted

    def _name_of(self, name: str | None, modules: Mapping[str, nnx.Module], hotswap: bool) -> str:
        """Choose or check the name of a new adapter of these networks."""
        taken = {each for module in modules.values() for each in adapters_of(module).loaded}
        if name is None:
            if hotswap:
                raise ValueError("hotswap needs adapter_name=, the name of the adapter to replace")
            numbers = range(max((len(adapters_of(module).loaded) for module in modules.values()), default=0), 10**9)
            return next(f"default_{i}" for i in numbers if f"default_{i}" not in taken)
        if not isinstance(name, str) or not name:
            raise ValueError(f"adapter_name is {shorten(name, 60)}, needed is a name")
        if hotswap != (name in taken):
            what = "no adapter" if hotswap else "an adapter"
            advice = "leave hotswap out" if hotswap else "give another name, unload it first, or give hotswap=True"
            raise ValueError(f"there is {what} {shorten(name, 60)!r} already; {advice}")
        return name


def adapters_of(module: nnx.Module) -> Adapters:
    """Return the adapters of a network."""
    return _STATES[module].adapters if module in _STATES else Adapters()


def _bare(component: str) -> str:
    """Return a component's name without the prefix that it has in a combined pipeline."""
    return component.removeprefix("prior_")


def _of_component(component: str, given: Any) -> Any:
    """Return the part of an adapter's weight that applies to one network."""
    return given.get(component, given.get(_bare(component))) if isinstance(given, Mapping) else given
