"""Weights of LoRA adapters by layer: one number, or a dictionary by parts of a network as in diffusers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np

from kandinsky_jax.common.errors import quote, shorten

# Keys are parts of layers' names; the first that a name contains applies, and "" matches all.
LayerWeights = Mapping[str, float]

_ATTENTION = re.compile(r"^(down|up)_blocks\.(\d+)\.attentions\.(\d+)\.")

_LARGEST = float(np.finfo(np.float32).max)


def in_all_layers(weight: float) -> LayerWeights:
    """Return the same weight for every layer."""
    return {"": weight}


def in_layer(weights: LayerWeights, layer: str) -> float:
    """Return the weight for one layer."""
    return next((weight for part, weight in weights.items() if part in layer), 1.0)


def scaled(weights: LayerWeights, factor: float) -> LayerWeights:
    """Multiply all weights by a factor."""
    return {part: weight * factor for part, weight in weights.items()}


def number(what: str, value: Any) -> float:
    """Check a finite number, which may be an array without axes."""
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    try:
        if isinstance(value, Real) and not isinstance(value, bool) and abs(found := float(value)) <= _LARGEST:
            return found
    except OverflowError:  # an integer beyond float's range
        pass
    raise ValueError(f"{what} is {quote(value, 60)}, needed is a finite number that float32 holds")


def of_network(component: str, given: object, layers: Iterable[str]) -> LayerWeights:
    """Convert a user's weight for one network to weights of its layers.

    Args:
        component: the network's name, for messages.
        given: a number, None for 1, or a dictionary. For a UNet its keys are those of diffusers, such as {"down": 0.5,
            "mid": 1.0, "up": {"block_0": 0.1, "block_1": [0.2, 0.3]}}; attention in blocks that are not named has 1.
            For other networks they are parts of layers' names, such as {"transformer_blocks.0.": 0.5}.
        layers: the network's layers by dotted names.
    Raises:
        ValueError: for a weight that is not a number, or a name that matches no layer.
    """
    if not isinstance(given, Mapping):
        return in_all_layers(number(f"an adapter's weight in the {component}", 1.0 if given is None else given))
    names = list(layers)
    if any(name.startswith("down_blocks.") for name in names):
        return {**_blocks(component, given, names), "": 1.0}
    weights: dict[str, float] = {}
    for part, value in given.items():
        if not isinstance(part, str) or not any(part in name for name in names):
            raise ValueError(f"the {component} has no layer with {shorten(part, 60)} in its name")
        weights[part] = number(f"an adapter's weight in {shorten(part, 60)} of the {component}", value)
    return {**weights, "": 1.0}


def _blocks(component: str, given: Mapping[object, object], names: Sequence[str]) -> dict[str, float]:
    """Return weights of a UNet's blocks, by prefixes of their attention layers' names."""
    counts: dict[str, dict[str, int]] = {"down": {}, "up": {}}
    for name in names:
        if found := _ATTENTION.match(name):
            side, block, attention = found[1], f"block_{found[2]}", int(found[3])
            counts[side][block] = max(counts[side].get(block, 0), attention + 1)
    if unknown := [side for side in given if side not in ("down", "mid", "up")]:
        raise ValueError(f"the {component} has no blocks {shorten(unknown, 60)}; it has down, mid and up")
    weights: dict[str, float] = {}
    for side, blocks in counts.items():
        value = given.get(side, 1.0)
        by_block = value if isinstance(value, Mapping) else dict.fromkeys(blocks, value)
        if unknown := [block for block in by_block if block not in blocks]:
            raise ValueError(
                f"the {component} has no attention in {side} {shorten(unknown, 60)}; it has some in {list(blocks)}"
            )
        for block, count in blocks.items():
            each = _each(f"{side} {block} of the {component}", by_block.get(block, 1.0), count)
            stem = f"{side}_blocks.{block.removeprefix('block_')}.attentions"
            weights |= {f"{stem}.{i}.": weight for i, weight in enumerate(each)}
    [weights["mid_block.attentions.0."]] = _each(f"mid of the {component}", given.get("mid", 1.0), 1)
    return weights


def _each(what: str, value: object, count: int) -> list[float]:
    """Return one weight for each attention layer of a block; a single one applies to all."""
    values = list(value) if isinstance(value, list | tuple) else [value]
    if len(values) not in (1, count):
        raise ValueError(f"there are {len(values)} weights for {count} attentions in {what}")
    found = [number(f"an adapter's weight in {what}", x) for x in values]
    return found * count if len(found) == 1 else found
