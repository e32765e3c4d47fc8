"""Quantization of a network: its weights to 8 bits, and the scales of its layers' inputs from calibration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, Sharding

from kandinsky_jax.checkpoint.networks import flat_params, set_params
from kandinsky_jax.common.errors import quote, summarize
from kandinsky_jax.models.layers import abstract
from kandinsky_jax.models.quantization_config import DTYPES, WEIGHT_SUM, QuantizationConfig
from kandinsky_jax.models.quantized import (
    input_scale,
    layers_to_ignore,
    quantize_weight,
    quantized_layers,
)
from kandinsky_jax.parallel.sharding import REPLICATED, in_memory

# Classes of networks that can be quantized, and which of their layers are: see `layers_to_ignore`.
QUANTIZABLE = ("UNet2DConditionModel", "PriorTransformer", "VQModel")
InputRanges = Mapping[str, tuple[float, float]]  # the least and the largest input of each layer, by its dotted name


def check_dtype(dtype: str) -> None:
    """Raise ValueError for a dtype that is not supported."""
    if dtype not in DTYPES:
        raise ValueError(f"quantization to {quote(dtype)} is not supported, only {', '.join(DTYPES)}")


def check_quantizable(network: nnx.Module, dtype: str = "int8", name: str | None = None) -> None:
    """Raise ValueError for a network that is quantized already or cannot be, or a dtype that is not supported.

    Args:
        name: of the network in its pipeline, for the error; None is its class.
    """
    check_dtype(dtype)
    cls = type(network).__name__
    if cls not in QUANTIZABLE:
        raise ValueError(f"a {cls} cannot be quantized, only {', '.join(QUANTIZABLE)}")
    if is_quantized(network):
        raise ValueError(f"the {name or cls} is quantized already: leave it out, or load the full weights again")


def is_quantized(network: nnx.Module) -> bool:
    """Return whether a network has quantized layers."""
    return getattr(network.config, "quantization_config", None) is not None


def quantize_network(
    network: nnx.Module, input_ranges: InputRanges | None, dtype: str = "int8", keep: str | None = None
) -> nnx.Module:
    """Return a network of the same class whose layers are quantized by the rule of its class.

    The layers that stay as they are share their arrays with the given network, which is unchanged.

    Args:
        network: a UNet, a prior or MoVQ, with its full weights.
        input_ranges: from calibration, see `kandinsky_jax.pipelines.quantization`; None scales inputs by their own
            maximum at run time.
        dtype: of quantized weights and inputs, "int8" or "float8_e4m3fn".
        keep: a regular expression over whole names of layers that stay as they are besides.
    Raises:
        ValueError: for a network that cannot be quantized, or layers without a range.
    """
    check_quantizable(network, dtype)
    before: Any = network
    quantization = QuantizationConfig(dtype, input_ranges is None, layers_to_ignore(network, keep))
    made = abstract(type(network), dataclasses.replace(before.config, quantization_config=quantization))
    params = flat_params(network)
    layers = dict(quantized_layers(made))
    if input_ranges is not None and (missing := [name for name in layers if name not in input_ranges]):
        raise ValueError(f"calibration has no inputs of {summarize(missing)}: quantize with dynamic=True, or calibrate")
    found = {name: array for name, array in params.items() if name.rpartition(".")[0] not in layers}
    for name, layer in layers.items():
        weight = params[f"{name}.{layer.WEIGHT}"]
        arrays = quantize_weight(weight, dtype, layer.OUTPUTS)
        for own, array in zip((layer.WEIGHT, "weight_scale", WEIGHT_SUM), arrays, strict=True):
            if getattr(layer, own) is not None:
                found[f"{name}.{own}"] = _beside(array, weight)
        if layer.bias is not None:
            found[f"{name}.bias"] = params[f"{name}.bias"]
        if layer.input_scale is not None and input_ranges is not None:
            width, zero = input_scale(*input_ranges[name], quantization)
            found[f"{name}.input_scale"] = _beside(jnp.full((1,), width, jnp.float32), weight)
            if layer.input_zero_point is not None:
                found[f"{name}.input_zero_point"] = _beside(jnp.full((1,), zero, dtype), weight)
    return set_params(made, found)


def _beside(array: jax.Array, like: jax.Array) -> jax.Array:
    """Put an array where `like` is; one of another shape on all of its devices. What is uncommitted stays so."""
    if not like.committed:
        return array
    place: Sharding = like.sharding
    if array.shape != like.shape and isinstance(place, NamedSharding):
        place = NamedSharding(place.mesh, REPLICATED)
    return jax.device_put(array, in_memory(place, array.shape))
