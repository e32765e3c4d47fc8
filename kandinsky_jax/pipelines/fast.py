"""A model's own fast adapter in pipelines: a LoRA distilled for few steps, with the settings that it was made for.

The model's folder names it, see `checkpoint.fast_adapters`. Which folder a network was read from is kept with the
network, so pipelines that share the network find its adapter too.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from flax import nnx

from kandinsky_jax.checkpoint import CheckpointError, fast_adapters, flat_params, hub, lora_files
from kandinsky_jax.checkpoint.fast_adapters import FastAdapter
from kandinsky_jax.checkpoint.lora_files import Adapter
from kandinsky_jax.checkpoint.recommended_settings import NO_SETTINGS, FastSettings, RecommendedSettings
from kandinsky_jax.common.errors import shorten
from kandinsky_jax.models import PriorTransformer
from kandinsky_jax.pipelines import lora_weights
from kandinsky_jax.pipelines.adapters import (
    TRAINED,
    Adapters,
    LoraLoader,
    NotFiniteError,
    adapters_of,
    apply_adapters,
)
from kandinsky_jax.schedulers import Scheduler, scheduler_named

NAME = "fast"  # of the adapter


@dataclass
class _Source:
    """Where a network was read from.

    Attributes:
        folder: of the model.
        adapter: its fast adapter there, None for none, or what is wrong with the folder's settings.
        loaded: the adapter's content, once it was loaded.
        kept: whether the weights have the adapter for good: it was fused, and unloaded then.
    """

    folder: Path
    adapter: FastAdapter | CheckpointError | None
    loaded: Adapter | None = None
    kept: bool = False


_LOCK = threading.RLock()  # of loading and unloading
_SOURCES: weakref.WeakKeyDictionary[nnx.Module, _Source] = weakref.WeakKeyDictionary()


def remember_folder(network: object, folder: Path, component: str) -> None:
    """Note which folder a network was read from; nothing for a network without LoRA.

    Args:
        component: the network's name in the folder.
    """
    if not isinstance(network, TRAINED):
        return
    try:
        _SOURCES[network] = _Source(folder, fast_adapters.of_folder(folder, component))
    except CheckpointError as error:  # which is the business of those who load the adapter
        _SOURCES[network] = _Source(folder, error)


def keep_folder(network: nnx.Module, other: nnx.Module) -> None:
    """Note that a network was made from another one: their model's folder is the same."""
    if (source := _SOURCES.get(network)) is not None:
        _SOURCES[other] = replace(source)


@contextmanager
def without_fast_adapter(network: nnx.Module) -> Iterator[None]:
    """Save a network as one that no fast adapter was made for, since its weights are others, within the block."""
    source = _SOURCES.pop(network, None)
    try:
        yield
    finally:
        if source is not None:
            _SOURCES[network] = source


def _adapter_of(network: nnx.Module) -> FastAdapter | None:
    """Return the fast adapter of a network; CheckpointError where the settings that name it are not valid."""
    source = _SOURCES.get(network)
    if source is not None and isinstance(source.adapter, CheckpointError):
        raise source.adapter
    return source.adapter if source is not None else None  # type: ignore[return-value]


def _is_applied(network: nnx.Module) -> bool:
    """Return whether a network's weights have its fast adapter."""
    if (source := _SOURCES.get(network)) is None:
        return False
    now = adapters_of(network)
    active = now.fused or now.weights  # fused ones stand in the place of active ones
    return source.kept or (_is_loaded(network) and now.enabled and NAME in active)


def _is_loaded(network: nnx.Module) -> bool:
    """Return whether a network's own fast adapter is loaded, and not another one of that name."""
    now, source = adapters_of(network), _SOURCES.get(network)
    return source is not None and NAME in now.loaded and now.loaded[NAME] is source.loaded


@dataclass(frozen=True)
class _FastMode:
    """What `load_fast` has changed in a decoder or a prior.

    Attributes:
        settings: those of its calls.
        scheduler: the one that was set, None for none.
        replaced: the one before.
    """

    settings: FastSettings
    scheduler: Scheduler | None = None
    replaced: Scheduler | None = None


class FastLoader(LoraLoader):
    """Mixin of pipelines that load the fast adapter of their model."""

    PREFIX: ClassVar[str]
    _fast: _FastMode | None = None  # of a decoder or a prior

    if TYPE_CHECKING:  # of `Pipeline`
        scheduler: Any
        _recommended: RecommendedSettings | CheckpointError
        _held: Callable[[], dict[str, Any]]

        @property
        def recommended_settings(self) -> RecommendedSettings: ...

    def load_fast(self) -> dict[str, Any]:
        """Load the fast adapter of the model, and use its settings in calls that do not give their own.

        The adapter, named "fast", is added to the adapters that are active, and the decoder gets the scheduler that the
        adapter was made for. A combined pipeline loads the adapters of its decoder and of its prior, or of the one that
        has one. Calls, `generate` and `warmup` take what they are not given from the adapter's settings, as long as the
        adapter is active: `set_adapters("style")` alone turns it off. Loading it again does nothing.

        Returns:
            the arguments that calls use now: `pipe(prompt)` is `pipe(prompt, **pipe.load_fast())`.
        Raises:
            CheckpointError: for a model without a fast adapter, or a file that is missing or damaged.
            ValueError: where another adapter is fused, or named "fast".
        """
        with _LOCK:
            return self._load_fast()

    def _load_fast(self) -> dict[str, Any]:
        adapters = self._own_adapters()
        modes = {stage: stage._fast or stage._fast_mode(adapter.settings) for stage, adapter in adapters.items()}
        self._apply_fast()
        for stage, mode in modes.items():
            if stage._fast is None and mode.scheduler is not None:
                stage.scheduler = mode.scheduler
            stage._fast = mode
        return self._call_defaults()

    def _apply_fast(self) -> None:
        """Add the fast adapter to the weights, and change nothing else: neither schedulers nor defaults of calls."""
        with _LOCK:
            adapters = self._own_adapters()
            if not adapters:
                raise self._no_adapter([stage._own_network() for stage in self._stages()])
            updates = [_with_adapter(stage._own_network(), adapter) for stage, adapter in adapters.items()]
            try:
                apply_adapters([(network, changed) for network, changed in updates if changed != adapters_of(network)])
            except NotFiniteError as error:
                raise CheckpointError(f"the fast adapter {error}") from None

    def unload_fast(self) -> None:
        """Undo `load_fast`: the adapter is unloaded, and the scheduler and the defaults of calls are those before.

        A scheduler that was set since stays.

        Raises:
            ValueError: where the adapter is fused.
        """
        with _LOCK:
            stages = self._stages()
            networks = [stage._own_network() for stage in stages if stage._fast is not None]
            if any(NAME in adapters_of(network).fused for network in networks):
                raise ValueError(f"the adapter {NAME!r} is fused; call unfuse_lora first")
            if any(network in _SOURCES and _SOURCES[network].kept for network in networks):
                raise ValueError("the fast adapter was fused before, so the weights keep it: load the model again")
            for stage in stages:
                stage._leave_fast()

    def unload_lora_weights(self) -> None:
        """Unload all adapters; restores the original weights bit for bit, except for fused adapters.

        With a fast adapter that is fused the model stays fast.
        """
        with _LOCK:
            networks = [stage._own_network() for stage in self._stages()]
            fused = [network for network in networks if NAME in adapters_of(network).fused and _is_loaded(network)]
            super().unload_lora_weights()
            for network in fused:
                _SOURCES[network].kept = True

    def _leave_fast(self) -> None:
        """Undo `load_fast` in one stage."""
        mode, network = self._fast, self._own_network()
        if mode is None:
            return
        if NAME in adapters_of(network).loaded:
            self.delete_adapters(NAME)
        if mode.scheduler is not None and self.scheduler is mode.scheduler:
            self.scheduler = mode.replaced
        self._fast = None

    def _settle_scheduler(self) -> None:
        """Before a call: use the adapter's scheduler while the adapter is active, and the one before while it is not.

        A scheduler that was set since stays.
        """
        for stage in self._stages():
            mode = stage._fast
            if mode is None or mode.scheduler is None:
                continue
            chosen = mode.scheduler if _is_applied(stage._own_network()) else mode.replaced
            if stage.scheduler is mode.scheduler or stage.scheduler is mode.replaced:
                stage.scheduler = chosen

    # What pipelines are made of -----------------------------------------------------------------------------------

    def _stages(self) -> Sequence[FastLoader]:
        """Return the decoder and the prior of a combined pipeline; others are one stage."""
        return [self]

    def _own_adapters(self) -> dict[FastLoader, FastAdapter]:
        """Return the fast adapters of the stages that have one."""
        found = {stage: _adapter_of(stage._own_network()) for stage in self._stages()}
        return {stage: adapter for stage, adapter in found.items() if adapter is not None}

    @property
    def has_fast_adapter(self) -> bool:
        """Whether the model has a fast adapter, for `load_fast`.

        Raises:
            CheckpointError: where the settings that name it are not valid.
        """
        return bool(self._own_adapters())

    def _own_network(self) -> nnx.Module:
        """Return the network of a stage that LoRA is for."""
        [network] = self._networks().values()
        return network

    def _no_adapter(self, networks: Sequence[nnx.Module]) -> CheckpointError:
        folders = [_SOURCES[network].folder for network in networks if network in _SOURCES]
        if folders:
            return fast_adapters.no_adapter(list(dict.fromkeys(folders)))
        return CheckpointError(
            f"the networks of this {type(self).__name__} were not read from a model's folder, which could have a fast "
            "adapter: load it with from_pretrained"
        )

    # Settings -----------------------------------------------------------------------------------------------------

    def _fast_mode(self, settings: FastSettings) -> _FastMode:
        """Choose a stage's settings, and its scheduler, which is not set yet."""
        if settings.scheduler is None:
            return _FastMode(settings)
        before: Scheduler = self.scheduler
        return _FastMode(settings, scheduler_named(settings.scheduler, before.config), before)

    def _call_defaults(self) -> dict[str, Any]:
        """Return the arguments of calls that do not give their own, where they are not the usual ones."""
        found = self._combined_defaults()
        own = {name: value for name, value in found.items() if name.startswith("prior_") == bool(self.PREFIX)}
        return {name.removeprefix(self.PREFIX): value for name, value in own.items()}

    def _combined_defaults(self) -> dict[str, Any]:
        """Return those of a combined call."""
        if self._fast is None or not _is_applied(self._own_network()):
            return {}
        return self._fast.settings.arguments()

    def _of_prior(self) -> RecommendedSettings:
        """Return what the folder of a combined pipeline's prior recommends."""
        own = [stage._recommended for stage in self._stages()[1:]]
        return own[0] if own and isinstance(own[0], RecommendedSettings) else NO_SETTINGS

    def _keep_settings(self, pipes: Sequence[FastLoader]) -> None:
        """Use the settings of other pipelines, the fast ones too, in the stages that have the same network."""
        others = [stage for pipe in pipes for stage in pipe._stages()]
        for stage in self._stages():
            for other in others:
                if other._own_network() is stage._own_network():
                    stage._recommended = other._recommended
                    stage._fast = other._fast or stage._fast

    def _settings_to_save(self, folder: Path) -> RecommendedSettings:
        """Return the recommended settings of the weights as they are, and copy the fast adapters' files into a folder.

        Weights that have the fast adapter are those of a fast model: its settings are the adapter's.
        """
        settings = replace(self.recommended_settings, fast=None)
        kept: list[FastAdapter | None] = [None, None]
        applied: list[FastSettings | None] = [None, None]
        for i, stage in enumerate(self._stages()):
            source = _SOURCES.get(network := stage._own_network())
            if source is None or not isinstance(source.adapter, FastAdapter):
                continue
            if _is_applied(network):
                applied[i] = source.adapter.settings
            else:
                kept[i] = source.adapter
        of_prior = self._of_prior()
        settings = fast_adapters.with_adapters(settings, applied[0], of_prior, applied[1])
        fast = fast_adapters.copy((kept[0], kept[1]), folder)
        if fast is not None:
            of_adapter = applied[1] if kept[1] is None else kept[1].settings
            own = fast_adapters.with_adapters(of_prior, None, NO_SETTINGS, of_adapter)
            fast = replace(fast, **own.prior_arguments())
        return replace(settings, fast=fast)


def _with_adapter(network: nnx.Module, adapter: FastAdapter) -> tuple[nnx.Module, Adapters]:
    """Return a network and its adapters with the fast one, which is read where it is not loaded."""
    now, source = adapters_of(network), _SOURCES[network]
    if source.kept:
        return network, now
    if others := [name for name in now.fused if name != NAME]:
        raise ValueError(f"the adapters {shorten(others)} are fused, which leaves no room: call unfuse_lora first")
    if NAME not in now.loaded:
        source.loaded = _read(network, adapter)
    elif now.loaded[NAME] is not source.loaded:
        raise ValueError(f"there is an adapter {NAME!r} already that is not the model's own; unload it first")
    assert source.loaded is not None
    active: Mapping[str, Any] = now.weights if now.enabled else {}
    weights = {NAME: lora_weights.in_all_layers(1.0), **active}
    return network, replace(now, loaded={**now.loaded, NAME: source.loaded}, weights=weights, enabled=True)


def _read(network: nnx.Module, adapter: FastAdapter) -> Adapter:
    """Read the changes of one network; the file may have those of the other one too."""
    component = "prior" if isinstance(network, PriorTransformer) else "unet"
    adapter.check()
    with hub.hint_for_cached_files():
        opened = lora_files.open_file(adapter.path)
        found, _ = lora_files.read(opened, {component: lora_files.layers_of(flat_params(network))})
    return found[component]
