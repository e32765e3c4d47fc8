"""LoRA: low-rank changes of a network's layers (Hu et al. 2021, arXiv 2106.09685).

The networks themselves are unchanged. In training, `merged` adds the changes to the weights inside the function that is
differentiated. Pipelines add `LayerChange`s, read from files (`checkpoint.lora_files`), on the host.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from kandinsky_jax.common.errors import quote, summarize
from kandinsky_jax.diffusion import Params

# Layers that the reference's LoRA scripts change: queries, keys, values and output of every attention, and in the UNet
# also the keys and values from the image embedding.
ATTENTION = r"\.(to_q|to_k|to_v|to_out\.0|add_k_proj|add_v_proj)$"
FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers writes and looks for

# By the layer's dotted name: A [rank, in] of a linear layer, [rank, in, height, width] of a convolution; B [out, rank].
Lora = dict[str, dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which layers LoRA changes, and how.

    Args:
        rank: of the changes.
        alpha: the changes are scaled by alpha / rank; None is the rank, for a scale of 1.
        pattern: a regular expression over the dotted names of linear and convolutional layers.
    """

    rank: int = 4
    alpha: float | None = None
    pattern: str = ATTENTION

    @property
    def scale(self) -> float:
        """Factor of the changes."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class LayerChange:
    """The low-rank change of one layer, `scale * up @ down`.

    Args:
        down: float32, `[rank, in]` of a linear layer, `[rank, in, height, width]` of a convolution.
        up: float32, `[out, rank]`.
        scale: what the product is multiplied by, such as alpha / rank.
    """

    down: np.ndarray
    up: np.ndarray
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """Rank of the change, the first axis of `down`."""
        return self.down.shape[0]

    def delta(self, weight: float = 1.0) -> np.ndarray:
        """Return the addend of the layer's parameter, float32: `[out, in]`, or `[height, width, in, out]`.

        Args:
            weight: of the adapter, a further factor.
        """
        up = self.up * np.float32(self.scale * weight)
        return up @ self.down if self.down.ndim == 2 else self.down.transpose(2, 3, 1, 0) @ up.T


def init(params: Params, config: LoraConfig, key: jax.Array) -> Lora:
    """Initialise changes, which are zero at first: A normal with deviation 1 / rank, B zero (peft's "gaussian").

    Raises:
        ValueError: for a rank of less than 1, or a pattern that matches no layer.
    """
    if config.rank < 1:
        raise ValueError(f"rank must be at least 1, got {config.rank}")
    found = layers(params, config)
    keys = jax.random.split(key, len(found))
    return {
        name: {
            "A": jax.random.normal(each, (config.rank, *_torch_shape(leaf)[1:]), jnp.float32) / config.rank,
            "B": jnp.zeros((_torch_shape(leaf)[0], config.rank), jnp.float32),
        }
        for each, (name, leaf) in zip(keys, sorted(found.items()), strict=True)
    }


def _torch_shape(parameter: jax.Array) -> tuple[int, ...]:
    """Return a parameter's shape in PyTorch: `[out, in]`, or `[out, in, height, width]` of a kernel."""
    return (*parameter.shape[:1:-1], *parameter.shape[:2]) if parameter.ndim == 4 else parameter.shape


def layers(params: Params, config: LoraConfig) -> dict[str, jax.Array]:
    """Return the parameters of the layers that a pattern matches, by the layers' names.

    Returns:
        `[out, in]` of a linear layer, `[height, width, in, out]` of a convolution.
    Raises:
        ValueError: for a pattern that matches no layer.
    """
    weights = {name.rpartition(".")[0]: leaf for name, leaf in flat(params).items() if _changeable(name, leaf)}
    found = {name: leaf for name, leaf in weights.items() if re.search(config.pattern, name)}
    if not found:
        some = ", ".join(sorted(weights)[:5])
        raise ValueError(f"the pattern {quote(config.pattern)} matches none of the layers, such as {some}")
    return found


def _changeable(name: str, leaf: jax.Array) -> bool:
    return (leaf.ndim == 2 and name.endswith(".weight")) or (leaf.ndim == 4 and name.endswith(".kernel"))


def layer_delta(pair: Mapping[str, jax.Array], scale: float | jax.Array) -> jax.Array:
    """Return the addend of a layer's parameter, float32: `[out, in]`, or `[height, width, in, out]`."""
    down, up = pair["A"], pair["B"]
    if down.ndim == 4:
        return jnp.einsum("rihw,or->hwio", down, up, precision="highest") * scale
    return jnp.matmul(up, down, precision="highest") * scale


def merged(params: Params, lora: Lora, scale: float | jax.Array = 1.0) -> Params:
    """Return parameters with the changes added in float32, in the parameters' dtype.

    Raises:
        ValueError: for changes of layers that the parameters do not have.
    """
    weights = flat(params)
    named = {name: parameter_of(name, pair["A"].ndim) for name, pair in lora.items()}
    if unknown := [name for name, parameter in named.items() if parameter not in weights]:
        raise ValueError(f"the parameters have no layers {summarize(unknown)}, which LoRA changes")
    for name, pair in lora.items():
        weight = weights[named[name]]
        weights[named[name]] = (weight.astype(jnp.float32) + layer_delta(pair, scale)).astype(weight.dtype)
    return unflat(weights)


def parameter_of(layer: str, ndim: int) -> str:
    """Return the dotted name of a layer's parameter that LoRA changes.

    Args:
        ndim: its axes, 2 of a linear layer, 4 of a convolution; the change's `A` has as many.
    """
    return f"{layer}.kernel" if ndim == 4 else f"{layer}.weight"


def layer_changes(lora: Lora, scale: float) -> dict[str, LayerChange]:
    """Copy trained changes to the host, by the layers' names."""
    return {
        name: LayerChange(np.asarray(pair["A"], np.float32), np.asarray(pair["B"], np.float32), scale)
        for name, pair in lora.items()
    }


def flat(params: Params) -> dict[str, jax.Array]:
    """Flatten a tree of parameters to dotted names."""
    return {".".join(map(str, path)): leaf for path, leaf in traverse_util.flatten_dict(params).items()}


def unflat(weights: Mapping[str, jax.Array]) -> Params:
    """Return the tree of parameters with dotted names."""
    return traverse_util.unflatten_dict({tuple(_keys(name)): leaf for name, leaf in weights.items()})


def _keys(name: str) -> list[str | int]:
    """Split a dotted name into the keys of a tree; decimal parts are indices of lists."""
    return [int(part) if part.isdecimal() else part for part in name.split(".")]
