"""How a network is quantized: the `quantization_config` of its `config.json`, in the format compressed-tensors.

Source: https://github.com/vllm-project/compressed-tensors; a strict subset of it: one scale per output channel of a
weight, and one per tensor (or, computed at run time, per token) of a layer's input, of 8 bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import jax.numpy as jnp
import numpy as np

from kandinsky_jax.common.errors import quote, summarize

# The dtypes of quantized weights and inputs: (type, format) in compressed-tensors' words.
DTYPES: Mapping[str, tuple[str, str]] = {
    "int8": ("int", "int-quantized"),
    "float8_e4m3fn": ("float", "float-quantized"),
}
SCALES = ("weight_scale", "input_scale")  # parameters of a quantized layer that are float32 whatever its network is
WEIGHT_SUM = "weight_sum"  # int32, see `QuantizedLayer`
BESIDE_WEIGHTS = (*SCALES, WEIGHT_SUM, "input_zero_point")  # what a quantized layer has more than others
SMALLEST_SCALE = float(np.finfo(np.float32).tiny)  # the reciprocal of a smaller one is infinite
_TARGETS = ("Linear", "Conv2d")
# What a reader of ours may pass over: other programs' bookkeeping, and features that are off.
_WITHOUT_EFFECT = frozenset({"quantization_status", "global_compression_ratio", "version", "observer", "actorder"})


def has_own_dtype(name: str, dtype: Any) -> bool:
    """Whether a parameter keeps its dtype whatever the network's is: a quantized weight, its scales and sums.

    Args:
        name: dotted, or its last part.
        dtype: of the parameter.
    """
    return name.rpartition(".")[2] in BESIDE_WEIGHTS or jnp.dtype(dtype).itemsize == 1


@dataclasses.dataclass(frozen=True)
class QuantizationConfig:
    """Which layers of a network are quantized, and how.

    Attributes:
        dtype: of weights and inputs, "int8" or "float8_e4m3fn".
        dynamic: whether inputs are scaled by their own maximum at run time, and not by one from calibration.
        ignore: dotted names of the linear layers and convolutions that are not quantized, sorted.
    """

    dtype: str = "int8"
    dynamic: bool = False
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"quantization to {quote(self.dtype)} is not supported, only {', '.join(DTYPES)}")

    @property
    def symmetric(self) -> bool:
        """Whether 0 stands for an input of 0; calibrated int8 has a zero point."""
        return self.dynamic or self.dtype != "int8"

    @classmethod
    def from_dict(cls, raw: object) -> Self:
        """Read the `quantization_config` of a `config.json`.

        Raises:
            ValueError: for a method or scheme that is not supported; all of them are listed.
        """
        if not isinstance(raw, Mapping):
            raise ValueError(f"quantization_config must be an object, got {quote(raw)}")
        ignore = raw.get("ignore") or []
        if not isinstance(ignore, list | tuple) or not all(isinstance(name, str) for name in ignore):
            raise ValueError(f"quantization_config.ignore must be a list of layers' names, got {quote(ignore)}")
        faults: list[str] = []
        for dtype in DTYPES:
            for dynamic in (False, True):
                config = cls(dtype, dynamic, tuple(sorted(ignore)))
                found = _differences(config.to_dict(), raw, "quantization_config")
                if not found:
                    return config
                faults = found if not faults or len(found) < len(faults) else faults
        raise ValueError(summarize(faults))

    def to_dict(self) -> dict[str, Any]:
        """Return what `config.json` says, as `from_dict` reads it."""
        kind, form = DTYPES[self.dtype]
        scheme = {"num_bits": 8, "type": kind}
        strategy = "token" if self.dynamic else "tensor"
        inputs = scheme | {"symmetric": self.symmetric, "strategy": strategy, "dynamic": self.dynamic}
        weights = scheme | {"symmetric": True, "strategy": "channel", "dynamic": False}
        group = {"targets": list(_TARGETS), "weights": weights, "input_activations": inputs}
        return {
            "quant_method": "compressed-tensors",
            "format": form,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": list(self.ignore),
        }


def _differences(wanted: Mapping[str, Any], given: object, path: str) -> list[str]:
    """List where an object is not what is wanted; null and bookkeeping may stand beside it."""
    if not isinstance(given, Mapping):
        return [f"{path} must be an object, got {quote(given)}"]
    faults = []
    for name, value in wanted.items():
        if name in _WITHOUT_EFFECT or name == "ignore":
            continue
        here = f"{path}.{name}"
        if isinstance(value, dict):
            faults += _differences(value, given.get(name), here)
        elif given.get(name) != value or type(given.get(name)) is not type(value):
            faults.append(f"{here}={quote(given.get(name))} is not supported, only {quote(value)}")
    known = wanted.keys() | _WITHOUT_EFFECT
    extra = [name for name, value in given.items() if name not in known and value not in (None, {}, [])]
    return faults + [f"{path}.{name}={quote(given[name])} is not supported" for name in extra]
