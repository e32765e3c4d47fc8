"""Reading the networks' `config.json` files, strictly.

A configuration is a frozen dataclass: hashable, so that it can be part of a jitted function's static arguments. Its
fields are the ones that change the shape or the result of the network here. Fields that the reference has but that
this port supports in one form only stand in `FIXED`; another value is an error, never ignored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self

from kandinsky_jax.common.errors import quote, shorten, summarize
from kandinsky_jax.common.fields import Bounds, field_faults
from kandinsky_jax.common.reading import of_file
from kandinsky_jax.models.quantization_config import QuantizationConfig


class ConfigError(ValueError):
    """A configuration is not supported."""


QUANTIZATION = "quantization_config"  # field of the networks that can be quantized; not written where it is None
MAX_BLOCKS = 16
_SIZES = (1, 1 << 20)  # of a network's whole numbers: the official ones' largest is a vocabulary of 49,408
_LAYERS: Bounds = dict.fromkeys(("num_layers", "num_hidden_layers", "layers_per_block"), (0, 1000))


def _freeze(value: object) -> Any:
    return tuple(_freeze(v) for v in value) if isinstance(value, list | tuple) else value


@dataclasses.dataclass(frozen=True)
class NetworkConfig(Mapping[str, Any]):
    """Base of all network configurations.

    It is also a mapping of what `to_dict` gives, as diffusers' is: `config["in_channels"]`, `dict(config)`.

    `FIXED` maps a field name of the reference to the values that lead to the network as it is built here; the first
    one is the reference's default, written back by `to_dict`. `IGNORED` names fields that never change the result at
    inference (initialisers, dropout, bookkeeping).
    """

    FIXED: ClassVar[Mapping[str, tuple[object, ...]]] = {}
    IGNORED: ClassVar[frozenset[str]] = frozenset()
    CLASS_NAME: ClassVar[str] = ""
    BOUNDS: ClassVar[Bounds] = {}  # of numbers, beside `_SIZES`

    def __post_init__(self) -> None:
        self._read_quantization()
        whole = {field.name: _SIZES for field in dataclasses.fields(self) if "int" in str(field.type)}
        faults = field_faults(self, {**whole, **_LAYERS, **self.BOUNDS})
        if not faults:
            faults = self.faults()
        if faults:
            raise ConfigError(summarize(faults))

    def __getitem__(self, name: str) -> Any:
        return self.to_dict()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.to_dict())

    def __len__(self) -> int:
        return len(self.to_dict())

    def __getattr__(self, name: str) -> Any:
        """Return the value of a field of the reference that is fixed here."""
        if name == "_class_name" and self.CLASS_NAME:
            return self.CLASS_NAME
        if name in self.FIXED:
            return self.FIXED[name][0]
        raise AttributeError(f"the configuration of a {self.CLASS_NAME or 'network'} has no {shorten(name, 80)!r}")

    def _read_quantization(self) -> None:
        """Convert `quantization_config`, of networks that have the field, from what a `config.json` says."""
        given = getattr(self, QUANTIZATION, None) if QUANTIZATION in self.__dataclass_fields__ else None
        if given is None or isinstance(given, QuantizationConfig):
            return
        try:
            object.__setattr__(self, QUANTIZATION, QuantizationConfig.from_dict(given))
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def faults(self) -> list[str]:
        """List faults of a configuration whose fields have the right types."""
        return []

    @classmethod
    def from_dict(cls, raw: Mapping[str, object], source: str = "config.json") -> Self:
        """Build the configuration from a parsed `config.json`.

        Args:
            raw: the parsed file; names beginning with `_` are the reference's own bookkeeping.
            source: what to call the file in an error.
        Raises:
            ConfigError: listing every field that is unknown and not null, or has an unsupported value.
        """
        names = {f.name for f in dataclasses.fields(cls)}
        known, faults = {}, []
        for name, given in raw.items():
            value = _freeze(given)
            if name.startswith("_") or name in cls.IGNORED:
                continue
            if name in names:
                known[name] = value
            elif name not in cls.FIXED:
                if given is not None:  # null is a feature of a later release that is off
                    faults.append(f"{shorten(name)}={quote(given)} is a field this version does not know")
            elif value not in cls.FIXED[name]:
                allowed = " or ".join(repr(v) for v in cls.FIXED[name])
                faults.append(f"{name}={quote(given)} is not supported, only {allowed}")
        if not faults:
            try:
                return cls(**known)
            except ConfigError as error:
                faults.append(str(error))
        raise ConfigError(
            of_file(source, f"describes a {cls.CLASS_NAME} that cannot be built here: {summarize(faults)}")
        )

    def to_dict(self) -> dict[str, object]:
        """Return the configuration as the reference writes it, for `json.dump`."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if (quantization := own.pop(QUANTIZATION, None)) is not None:
            own[QUANTIZATION] = quantization.to_dict()
        fixed = {name: values[0] for name, values in self.FIXED.items()}
        listed = {k: list(v) if isinstance(v, tuple) else v for k, v in (fixed | own).items()}
        return {"_class_name": self.CLASS_NAME, **listed} if self.CLASS_NAME else listed


def block_faults(config: NetworkConfig) -> list[str]:
    """List faults of down_block_types, up_block_types (`DOWN`, `UP` are the known ones) and block_out_channels."""
    faults = []
    for field, allowed in (("down_block_types", config.DOWN), ("up_block_types", config.UP)):
        faults += [f"{field} has {quote(n)}, supported: {allowed}" for n in getattr(config, field) if n not in allowed]
    if len(config.block_out_channels) > MAX_BLOCKS:
        faults.append(f"block_out_channels has {len(config.block_out_channels)} items, supported: up to {MAX_BLOCKS}")
    if not len(config.down_block_types) == len(config.up_block_types) == len(config.block_out_channels):
        faults.append("down_block_types, up_block_types and block_out_channels differ in length")
    if odd := [width for width in config.block_out_channels if width % config.norm_num_groups]:
        faults.append(f"block_out_channels has {quote(odd)}, no multiples of norm_num_groups={config.norm_num_groups}")
    return faults
