"""The guider of a pipeline's call: chosen by name or given, and what it needs besides."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kandinsky_jax.checkpoint import CheckpointError, hub, load_network, move_network
from kandinsky_jax.common.errors import quote, shorten
from kandinsky_jax.diffusion import Autoguidance, Guider, PerturbedAttentionGuidance, Schedule, guider_named
from kandinsky_jax.diffusion.guiders import MIDDLE_BLOCK
from kandinsky_jax.models import PriorTransformer, UNet2DConditionModel
from kandinsky_jax.models.hooks import AttentionLayer
from kandinsky_jax.models.structure import named_modules
from kandinsky_jax.parallel.mesh import Mesh, mesh_of

METHODS = ("init", "evaluations", "combine")
# Of a network in the folder of a model, of a combined one, or of a family of models.
SUBFOLDERS: dict[type[nnx.Module], tuple[str, ...]] = {
    UNet2DConditionModel: ("unet", f"{hub.DECODER}/unet"),
    PriorTransformer: ("prior", "prior_prior", f"{hub.PRIOR}/prior"),
}


@dataclasses.dataclass(frozen=True)
class Guidance:
    """The guider of a call.

    Args:
        guider: its numbers float32, without a weak model.
        weak: of autoguidance.
    """

    guider: Guider
    weak: nnx.Module | None = None

    @property
    def is_on(self) -> bool:
        """Whether the guider evaluates anything but the conditional prediction."""
        return bool(getattr(self.guider, "is_on", True))

    @property
    def uses_uncond(self) -> bool:
        """Whether unconditional predictions are evaluated."""
        return self.is_on and bool(getattr(self.guider, "uses_uncond", True))

    @property
    def scale(self) -> float:
        """The guider's scale, 1 where it has none."""
        return float(getattr(self.guider, "scale", 1.0))

    def with_scale(self, scale: float) -> Guidance:
        """Return the same with another scale, where the guider has one."""
        if not hasattr(self.guider, "scale"):
            return self
        change = getattr(self.guider, "_replace", None) or functools.partial(dataclasses.replace, self.guider)
        return dataclasses.replace(self, guider=change(scale=np.float32(scale)))

    def check(self, schedule: Schedule) -> None:
        """Raise ValueError for a schedule that the guider cannot serve."""
        if self.is_on and hasattr(self.guider, "check_schedule"):
            self.guider.check_schedule(schedule)


def choose_guider(value: object, scale: float, network: nnx.Module, name: str = "guider") -> Guidance:
    """Choose the guider of a call.

    Args:
        value: None is classifier-free guidance; a name with settings, see `guider_named`; or an object with the
            methods of `Guider`, a pytree of its numbers.
        scale: the call's guidance_scale, for a guider that is named and says none.
        network: which is guided.
        name: of the argument, for errors.
    Raises:
        ValueError, TypeError: for a guider that does not exist or does not fit.
        CheckpointError: for a weak model that does not.
    """
    guider = guider_named(value if isinstance(value, str) else "cfg", scale) if _is_name(value) else value
    _check_guider(guider, name)
    weak = None
    if isinstance(guider, Autoguidance):
        weak = _weak_model(guider.model, network, name)
        guider = dataclasses.replace(guider, model=None, condition=None)
    if isinstance(guider, PerturbedAttentionGuidance):
        guider = dataclasses.replace(guider, layers=_layers(guider.layers, network, name))
    return Guidance(jax.tree.map(np.float32, guider), weak)


def _is_name(value: object) -> bool:
    return value is None or isinstance(value, str)


def _check_guider(guider: Any, name: str) -> None:
    missing = [method for method in METHODS if not hasattr(guider, method)]
    if isinstance(guider, type) or missing:
        without = f" without {', '.join(missing)}" if missing else ", a class"
        raise TypeError(
            f"{name} must be a name such as 'apg', or an object with the methods of diffusion.Guider, got "
            f"{quote(guider)}{without}"
        )
    leaves = jax.tree.leaves(dataclasses.replace(guider, model=None) if isinstance(guider, Autoguidance) else guider)
    if any(np.ndim(leaf) or not np.issubdtype(np.asarray(leaf).dtype, np.number) for leaf in leaves):
        raise TypeError(
            f"{name} is a {type(guider).__name__}, which is no pytree of numbers; make it a NamedTuple, or a dataclass "
            f"with jax.tree_util.register_dataclass; got {shorten(leaves, 80)}"
        )


def _weak_model(model: object, network: nnx.Module, name: str) -> nnx.Module:
    """Return the weak model, loaded where it is named."""
    if isinstance(model, str):
        first, cls = jax.tree.leaves(nnx.state(network, nnx.Param))[0], cast(Hashable, type(network))
        folder = Path(model).resolve()
        key = (str(folder), _stamps(folder)) if folder.is_dir() else (model, ())  # the Hub is not asked at every call
        model = _loaded(cls, *key, str(first.dtype), mesh_of(first))
    if type(model) is not type(network):
        raise TypeError(
            f"the weak model of {name} must be a {type(network).__name__}, or the folder of one, got {quote(model)}"
        )
    same = ("in_channels", "out_channels", "encoder_hid_dim", "embedding_dim", "embedding_proj_dim", "num_embeddings")
    for field in same:
        own, other = (getattr(part.config, field, None) for part in (network, model))  # type: ignore[attr-defined]
        if own != other:
            raise ValueError(f"the weak model of {name} has {field}={other}, needed is {own} as in the model itself")
    return model


def _stamps(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Return what is another value when the files of a folder are others."""
    found = [(str(path), path.stat()) for path in sorted(folder.rglob("*")) if path.is_file()]
    return tuple((path, stat.st_size, stat.st_mtime_ns) for path, stat in found)


@functools.lru_cache(maxsize=2)  # a decoder's and a prior's
def _loaded(cls: Any, name: str, stamps: Hashable, dtype: str, mesh: Mesh | None) -> nnx.Module:
    with hub.hint_for_cached_files():
        network = load_network(cls, weak_folder(cls, name), jnp.dtype(dtype))
    if mesh is not None:
        move_network(network, mesh)
    return network


def weak_folder(cls: type[nnx.Module], name: str) -> Path:
    """Return the folder of a weak model's network.

    Args:
        cls: of the network.
        name: folder or Hub repository of a model that has such a network, or of the network itself.
    Raises:
        CheckpointError: where there is none.
    """
    for subfolder in SUBFOLDERS[cls]:
        with contextlib.suppress(CheckpointError):
            return hub.resolve_component(name, subfolder=subfolder)
    return hub.resolve_component(name)


def _layers(layers: str | None, network: nnx.Module, name: str) -> str:
    """Return the expression of the attention layers to perturb."""
    if layers is None:
        if not isinstance(network, PriorTransformer):
            return MIDDLE_BLOCK
        return rf"transformer_blocks\.{len(network.transformer_blocks) // 2}\..*"
    names = [name for name, module in named_modules(network) if isinstance(module, AttentionLayer)]
    if not any(re.fullmatch(layers, one) for one in names):
        raise ValueError(
            f"{name}: {quote(layers)} matches no attention layer; there are {shorten(', '.join(names), 200)}"
        )
    return layers
