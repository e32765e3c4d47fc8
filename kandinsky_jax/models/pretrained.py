"""`from_pretrained` and `save_pretrained` of networks; `kandinsky_jax.pretrained` knows how."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from flax import nnx

from kandinsky_jax.atomic import replace_file

HOOKS: dict[
    str, Callable[..., Any]
] = {}  # load, load_config, save and save_config, which kandinsky_jax.pretrained puts here


class PretrainedNetwork:
    """What networks have of diffusers' and transformers' ways to load and save them."""

    config_name: ClassVar[str] = "config.json"
    has_compatibles: ClassVar[bool] = False
    ignore_for_config: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def load_config(cls, name: str | os.PathLike[str], **options: Any) -> dict[str, Any]:
        """What a network's `config.json` holds; arguments as of `from_pretrained`."""
        return HOOKS["load_config"](name, **options)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], seed: int = 0, **changes: Any) -> Self:
        """A network of this class with random weights, float32.

        Args:
            config: as `load_config` or another network's `config` gives it.
            seed: of the weights.
            changes: fields of the configuration to change.
        Raises:
            ConfigError: where the configuration is not supported.
        """
        read = cls.CONFIG.from_dict({**config, **changes}, "the configuration")  # type: ignore[attr-defined]
        return cls(read, rngs=nnx.Rngs(seed))  # type: ignore[call-arg]

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

    def to_json_string(self) -> str:
        """The configuration as it is written to `config.json`."""
        return json.dumps(self.config.to_dict(), indent=2, sort_keys=True) + "\n"  # type: ignore[attr-defined]

    def to_json_file(self, path: str | os.PathLike[str]) -> None:
        """Write the configuration to a file."""
        replace_file(Path(path), self.to_json_string().encode())
