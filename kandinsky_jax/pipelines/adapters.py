"""LoRA in pipelines: files are loaded beside the networks, and their changes added to the weights.

The names are those of diffusers' loaders. Weights are always changed in place, so that drawing with LoRA costs what
drawing without costs, and compiles nothing; the weights as they were are kept while a change may be taken back.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kandinsky_jax import lora
from kandinsky_jax.checkpoint import CheckpointError, flat_params, set_params
from kandinsky_jax.models import PriorTransformer, UNet2DConditionModel

_TRAINED = (UNet2DConditionModel, PriorTransformer)


@dataclass
class Adapters:
    """The LoRA of one network, which several pipelines may share."""

    files: dict[str, tuple[lora.Lora, float]] = field(default_factory=dict)  # by name: changes, and their own scale
    weights: dict[str, float] = field(default_factory=dict)  # of those that are active
    before: dict[str, jax.Array] = field(default_factory=dict)  # weights without any change
    fused: bool = False

    def apply(self, module: nnx.Module) -> None:
        """Set the weights to what they were, plus what is active now."""
        active = [(*self.files[name], weight) for name, weight in self.weights.items()]
        touched = {f"{layer}.weight" for changes, _, _ in active for layer in changes}
        params = flat_params(module)
        self.before |= {name: params[name] for name in touched - self.before.keys()}
        new = dict(self.before)
        for changes, scale, weight in active:
            for layer, pair in changes.items():
                name = f"{layer}.weight"
                new[name] = new[name].astype(jnp.float32) + lora.change(pair, scale * weight)
        dtypes = {name: leaf.dtype for name, leaf in self.before.items()}
        placed = {n: jax.device_put(x.astype(dtypes[n]), self.before[n].sharding) for n, x in new.items()}
        set_params(module, params | placed)
        self.before = {name: leaf for name, leaf in self.before.items() if name in touched}


_ADAPTERS: weakref.WeakKeyDictionary[nnx.Module, Adapters] = weakref.WeakKeyDictionary()


class LoraLoader:
    """The part of a pipeline that loads LoRA."""

    def load_lora_weights(
        self, path: str | os.PathLike[str], adapter_name: str | None = None, weight: float = 1.0
    ) -> None:
        """Load a file of LoRA, for the UNet or the prior, and draw with it, beside those that are active already.

        Args:
            path: a `.safetensors` file of diffusers', peft's or ours, or the folder that holds
                `pytorch_lora_weights.safetensors`.
            adapter_name: to call it by; None is its number, "default_0" and so on.
            weight: how much of it.
        Raises:
            CheckpointError: where it cannot be read, or fits no network of this pipeline.
            ValueError: where the name is taken.
        """
        file = Path(path)
        component, module = self._trained_by(file)
        shapes = {name: tuple(leaf.shape) for name, leaf in flat_params(module).items()}
        try:
            changes, config = lora.read(file, shapes)
        except CheckpointError as error:
            raise CheckpointError(f"for the {component}: {error}") from None
        adapters = _ADAPTERS.setdefault(module, Adapters())
        name = f"default_{len(adapters.files)}" if adapter_name is None else adapter_name
        if name in adapters.files:
            raise ValueError(f"there is an adapter {name!r} already; give another name, or unload it first")
        adapters.files[name] = (changes, config.scale)
        adapters.weights[name] = float(weight)
        adapters.apply(module)

    def set_adapters(self, names: str | Sequence[str], weights: float | Sequence[float] = 1.0) -> None:
        """Draw with these adapters, each with its weight, and with no others.

        Raises:
            ValueError: for a name that was not loaded, or another number of weights.
        """
        wanted = [names] if isinstance(names, str) else list(names)
        each = [float(weights)] * len(wanted) if isinstance(weights, int | float) else [float(x) for x in weights]
        if len(each) != len(wanted):
            raise ValueError(
                f"there are {len(each)} weights for {len(wanted)} adapters; give one for each, or one number"
            )
        known = {name for _, adapters in self._adapters() for name in adapters.files}
        if missing := [name for name in wanted if name not in known]:
            raise ValueError(f"no adapter {missing} is loaded; there are {sorted(known)}")
        given = dict(zip(wanted, each, strict=True))
        for module, adapters in self._adapters():
            adapters.weights = {name: weight for name, weight in given.items() if name in adapters.files}
            adapters.apply(module)

    def get_active_adapters(self) -> list[str]:
        """The names of those that are drawn with."""
        return [name for _, adapters in self._adapters() for name in adapters.weights]

    def fuse_lora(self) -> None:
        """Make the changes lasting: unloading leaves them in the weights, and `save_pretrained` writes them anyway."""
        for _, adapters in self._adapters():
            adapters.fused = True

    def unfuse_lora(self) -> None:
        """Take `fuse_lora` back."""
        for _, adapters in self._adapters():
            adapters.fused = False

    def unload_lora_weights(self) -> None:
        """Forget all adapters; the weights are again, bit for bit, what they were, unless they were fused."""
        for module, adapters in self._adapters():
            if not adapters.fused:
                adapters.weights = {}
                adapters.apply(module)
            del _ADAPTERS[module]

    def _networks(self) -> dict[str, nnx.Module]:
        held: Mapping[str, Any] = self._held()  # type: ignore[attr-defined]
        return {name: part for name, part in held.items() if isinstance(part, _TRAINED)}

    def _adapters(self) -> list[tuple[nnx.Module, Adapters]]:
        return [(module, _ADAPTERS[module]) for module in self._networks().values() if module in _ADAPTERS]

    def _trained_by(self, file: Path) -> tuple[str, nnx.Module]:
        """The network that has most of a file's layers."""
        networks, wanted = self._networks(), lora.layers(file)
        if not networks:
            raise CheckpointError(f"{type(self).__name__} has no network that LoRA is trained for")
        shared = {n: len(wanted & {k.removesuffix(".weight") for k in flat_params(m)}) for n, m in networks.items()}
        best = max(shared, key=lambda name: shared[name])
        return best, networks[best]
