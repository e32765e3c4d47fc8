"""`from_pretrained` and `save_pretrained` of networks; `kandinsky_jax.pretrained` knows how."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Self

HOOKS: dict[str, Callable[..., Any]] = {}  # load, save and save_config, which kandinsky_jax.pretrained puts here


class PretrainedNetwork:
    """What networks have of diffusers' and transformers' ways to load and save them."""

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], **options: Any) -> Self:
        """Load a network, see `kandinsky_jax.pretrained.load_component`."""
        return HOOKS["load"](cls, name, **options)

    def save_pretrained(self, folder: str | os.PathLike[str], **options: Any) -> None:
        """Write `config.json` and tensors, see `kandinsky_jax.pretrained.save_component`."""
        HOOKS["save"](self, folder, **options)

    def save_config(self, folder: str | os.PathLike[str], **options: Any) -> None:
        """Write `config.json`."""
        HOOKS["save_config"](self, folder, **options)
