"""`from_pretrained` and `save_pretrained` of networks; `kandinsky_jax.checkpoint.pretrained` knows how."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from flax import nnx

from kandinsky_jax.common.atomic import replace_file
from kandinsky_jax.common.errors import quote
from kandinsky_jax.models.config import ConfigError

HOOKS: dict[
    str, Callable[..., Any]
] = {}  # load, load_config, save and save_config, which kandinsky_jax.checkpoint.pretrained puts here


class PretrainedNetwork:
    """Loading and saving of networks as in diffusers and transformers."""

    config_name: ClassVar[str] = "config.json"
    has_compatibles: ClassVar[bool] = False
    ignore_for_config: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def load_config(cls, name: str | os.PathLike[str], **options: Any) -> Any:
        """Load a network's `config.json`; arguments as in `from_pretrained`."""
        return HOOKS["load_config"](name, **options)

    @classmethod
    def from_config(
        cls, config: Mapping[str, object], seed: int = 0, return_unused_kwargs: bool = False, **changes: Any
    ) -> Any:
        """Build a network of this class with random weights, float32.

        Args:
            config: as `load_config` or another network's `config` gives it.
            seed: of the weights.
            return_unused_kwargs: whether to return the network and those of `changes` that are not fields of it.
            changes: fields of the configuration to change.
        Raises:
            ConfigError: where the configuration is not supported.
        """
        if not isinstance(config, Mapping) or not all(isinstance(name, str) for name in config):
            raise ConfigError(
                f"{cls.__name__}.from_config takes a configuration as a dictionary, got {quote(config)}; "
                "from_pretrained takes the name of a folder or repository"
            )
        if return_unused_kwargs:
            known = {field.name for field in dataclasses.fields(cls.CONFIG)}  # type: ignore[attr-defined]
            used = {name: value for name, value in changes.items() if name in known}
            rest = {name: value for name, value in changes.items() if name not in known}
            return cls.from_config(config, seed, **used), rest
        read = cls.CONFIG.from_dict({**config, **changes}, "the configuration")  # type: ignore[attr-defined]
        return cls(read, rngs=nnx.Rngs(seed))  # type: ignore[call-arg]

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], **options: object) -> Self:
        """Load a network, see `kandinsky_jax.checkpoint.pretrained.load_component`."""
        return HOOKS["load"](cls, name, **options)

    def save_pretrained(self, folder: str | os.PathLike[str], **options: object) -> None:
        """Write `config.json` and tensors, see `kandinsky_jax.checkpoint.pretrained.save_component`."""
        HOOKS["save"](self, folder, **options)

    def save_config(self, folder: str | os.PathLike[str], **options: object) -> None:
        """Write `config.json`."""
        HOOKS["save_config"](self, folder, **options)

    def to_json_string(self) -> str:
        """The configuration as it is written to `config.json`."""
        return json.dumps(self.config.to_dict(), indent=2, sort_keys=True) + "\n"  # type: ignore[attr-defined]

    def to_json_file(self, path: str | os.PathLike[str]) -> None:
        """Write the configuration to a file."""
        replace_file(Path(path), self.to_json_string().encode())
