"""Outputs of pipelines, which behave like diffusers' `BaseOutput`.

They can be indexed by name like a dictionary (`out["images"]`, `pipe(**prior(prompt))`) and by number like a tuple
(`out[0]`); each value is an attribute too (`out.images`). As in diffusers, iteration yields the names, so they are
unpacked by `embeds, negative = prior(prompt).to_tuple()`.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from typing import Any, NoReturn, Self, TypeAlias

import jax
import numpy as np

Embeds: TypeAlias = jax.Array | np.ndarray  # image embeddings [B, D]


class BaseOutput(OrderedDict[str, Any]):
    """Base of the outputs. Subclasses are dataclasses and JAX pytrees.

    Fields that are None are attributes, but no items. Values may be replaced, not removed.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        jax.tree_util.register_pytree_with_keys(
            cls,
            lambda output: (tuple((jax.tree_util.DictKey(k), getattr(output, k)) for k in _fields(output)), None),
            lambda _, values: cls(*values),
        )

    def __post_init__(self) -> None:
        for name in _fields(self):
            if (value := getattr(self, name)) is not None:
                self[name] = value

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the values in the order of the fields."""
        return tuple(self.values())

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def __setitem__(self, name: str, value: object) -> None:
        super().__setitem__(name, value)
        super().__setattr__(name, value)

    def __setattr__(self, name: str, value: object) -> None:
        if name in self and value is not None:
            super().__setitem__(name, value)
        super().__setattr__(name, value)

    def __reduce__(self) -> tuple[type[Self], tuple[object, ...]]:
        return type(self), tuple(getattr(self, name) for name in _fields(self))

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise TypeError(f"items of a {type(self).__name__} cannot be removed or merged; dict(output) makes a copy")

    __delitem__ = pop = popitem = clear = update = setdefault = _refuse


def _fields(output: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(output)]


@dataclasses.dataclass
class ImagePipelineOutput(BaseOutput):
    """images: a list of PIL pictures, or an array, as `output_type` asks."""

    images: Any


@dataclasses.dataclass
class KandinskyPriorPipelineOutput(BaseOutput):
    """image_embeds, negative_image_embeds: `[B, D]`, as the decoders take them."""

    image_embeds: Embeds
    negative_image_embeds: Embeds


# What calls return, a tuple with `return_dict=False`. Type checkers accept `pipe(...).images` and `pipe(...)[0]`, and
# refuse `pipe(...).image`.
ImageResult: TypeAlias = ImagePipelineOutput | Any
PriorResult: TypeAlias = KandinskyPriorPipelineOutput | Any
