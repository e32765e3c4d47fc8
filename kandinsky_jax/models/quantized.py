"""Linear layers and convolutions with weights and inputs of 8 bits, computed by qwix.

A layer's weight is int8 (or float8) with a float32 scale per output channel. Its input is rounded to the same dtype by
one scale, from calibration or, dynamic, from the input itself; the product sums in int32 and is scaled in float32.
Names are those of HF's compressed-tensors: `weight` (of a convolution `kernel`), `weight_scale`, `input_scale`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from kandinsky_jax.common.errors import summarize
from kandinsky_jax.common.types import Array, Float
from kandinsky_jax.models.config import ConfigError
from kandinsky_jax.models.convolution import Conv
from kandinsky_jax.models.layers import Linear
from kandinsky_jax.models.quantization_config import QuantizationConfig
from kandinsky_jax.models.structure import named_modules, replace_module

Leaf = jax.Array | jax.ShapeDtypeStruct


class QuantizedLayer(nnx.Module):
    """Base of quantized layers.

    Args:
        layer: that is replaced, with arrays, which are quantized, or with shapes alone. The input's scale is 1 until
            `set_params` sets it.
        config: of the network.
    """

    WEIGHT: ClassVar[str]  # name of the parameter
    OUTPUTS: ClassVar[int]  # its axis of output channels

    weight_scale: nnx.Param  # float32, [out, 1, ...], as many axes as the weight
    input_scale: nnx.Param | None  # float32, [1]; None for dynamic
    bias: nnx.Param | None

    def __init__(self, layer: Linear | Conv, config: QuantizationConfig):
        self.dtype = config.dtype
        weight, scale = _quantized_leaf(getattr(layer, self.WEIGHT).get_value(), config.dtype, self.OUTPUTS)
        setattr(self, self.WEIGHT, nnx.Param(weight))
        self.weight_scale = nnx.Param(scale)
        self.input_scale = None if config.dynamic else nnx.Param(_like(scale, (1,)))
        self.bias = None if layer.bias is None else nnx.Param(layer.bias.get_value())

    def _quantized_input(self, x: jax.Array, shared: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        """Return the input in the layer's dtype, and its scale with as many axes.

        Args:
            x: the input.
            shared: the axes that share a scale, where it is dynamic.
        """
        x, bound = x.astype(jnp.float32), dtype_bound(self.dtype)
        if self.input_scale is None:
            largest = jnp.max(jnp.abs(x), shared, keepdims=True)
            scale = jnp.where(largest > 0, largest / bound, 1)
        else:
            scale = self.input_scale[...].reshape((1,) * x.ndim)
        x = jnp.clip(x * (1 / scale), -bound, bound)
        if jnp.issubdtype(self.dtype, jnp.integer):
            x = jnp.round(x)
        return x.astype(self.dtype), scale

    def _with_bias(self, y: jax.Array, dtype: DTypeLike) -> jax.Array:
        return (y if self.bias is None else y + self.bias[...].astype(jnp.float32)).astype(dtype)


class QuantizedLinear(QuantizedLayer):
    """`x @ weight.T + bias` of a quantized input and weight."""

    WEIGHT, OUTPUTS = "weight", 0

    weight: nnx.Param  # [out, in]

    def __call__(self, x: Float[Array, "*B cin"]) -> Float[Array, "*B cout"]:
        """x: `[..., in]`; `[..., out]` in the dtype of x."""
        import qwix

        last = x.ndim - 1
        value, scale = self._quantized_input(x, (last,))
        # The precision of float32 products that may be set around a network is nothing to 8 bits.
        y = qwix.dot_general(
            qwix.QArray(value, scale),
            qwix.QArray(self.weight[...], self.weight_scale[...]),
            (((last,), (1,)), ((), ())),
            precision=jax.lax.Precision.DEFAULT,
        )
        return self._with_bias(y, x.dtype)


class QuantizedConv(QuantizedLayer):
    """A convolution of a quantized input and kernel, NHWC."""

    WEIGHT, OUTPUTS = "kernel", 3

    kernel: nnx.Param  # [height, width, in, out]

    def __init__(self, layer: Conv, config: QuantizationConfig):
        super().__init__(layer, config)
        self.strides = _pair(layer.strides)
        self.padding = _pads(layer.padding)

    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h2 w2 D"]:
        """x: `[B, H, W, in]`; `[B, H', W', out]` in the dtype of x."""
        import qwix

        value, scale = self._quantized_input(x, (1, 2, 3))
        with jax.default_matmul_precision("default"):
            y = qwix.conv_general_dilated(
                qwix.QArray(value, scale),
                qwix.QArray(self.kernel[...], self.weight_scale[...].reshape(1, 1, 1, -1)),
                self.strides,
                self.padding,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
        return self._with_bias(y, x.dtype)


def _pair(value: int | tuple[int, int] | None) -> tuple[int, int]:
    if value is None or isinstance(value, int):
        return (value or 1, value or 1)
    return value


def _pads(padding: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    return ((padding, padding), (padding, padding)) if isinstance(padding, int) else tuple(padding)


def _like(leaf: Leaf, shape: tuple[int, ...]) -> Leaf:
    """Return ones of a shape, or the shape alone where the other leaf is one."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(shape, jnp.float32)
    return jnp.ones(shape, jnp.float32)


def _quantized_leaf(weight: Leaf, dtype: str, outputs: int) -> tuple[Leaf, Leaf]:
    if isinstance(weight, jax.ShapeDtypeStruct):
        shape = (weight.shape[outputs], *[1] * (len(weight.shape) - 1))
        return jax.ShapeDtypeStruct(weight.shape, jnp.dtype(dtype)), jax.ShapeDtypeStruct(shape, jnp.float32)
    return quantize_weight(weight, dtype, outputs)


# Arrays -----------------------------------------------------------------------------------------------------------


def dtype_bound(dtype: str) -> float:
    """Return the largest number of a dtype that an input is rounded to."""
    return 127.0 if jnp.issubdtype(dtype, jnp.integer) else float(jnp.finfo(dtype).max)


@functools.partial(jax.jit, static_argnames=("dtype", "outputs"))
def quantize_weight(weight: jax.Array, dtype: str, outputs: int) -> tuple[jax.Array, jax.Array]:
    """Quantize a weight, with one scale per output channel.

    Args:
        weight: of floats.
        dtype: to quantize to.
        outputs: the axis of output channels.
    Returns:
        the weight in `dtype`, and the scale, float32 `[out, 1, ...]`.
    """
    import qwix

    found = qwix.quantize(weight.astype(jnp.float32), jnp.dtype(dtype), channelwise_axes=(outputs,))
    return found.qvalue, found.scale.reshape(-1, *[1] * (weight.ndim - 1))


def scale_of(parameter: str) -> str:
    """Return the dotted name of the scale of a quantized weight."""
    return f"{parameter.rpartition('.')[0]}.weight_scale"


def output_axis(parameter: str) -> int:
    """Return the axis of output channels of a weight with a dotted name."""
    return QuantizedConv.OUTPUTS if parameter.endswith(f".{QuantizedConv.WEIGHT}") else QuantizedLinear.OUTPUTS


def dequantize_weight(weight: np.ndarray, scale: np.ndarray, outputs: int) -> np.ndarray:
    """Return the float32 weight that `quantize_weight` has rounded."""
    shape = [1] * weight.ndim
    shape[outputs] = -1
    return weight.astype(np.float32) * scale.reshape(shape)


# Networks ---------------------------------------------------------------------------------------------------------


def float_layers(network: nnx.Module) -> Iterator[tuple[str, Linear | Conv]]:
    """Yield the linear layers and convolutions of a network that are not quantized, by dotted names."""
    for name, module in named_modules(network):
        if isinstance(module, Linear | Conv):
            yield name, module


def quantized_layers(network: nnx.Module) -> Iterator[tuple[str, QuantizedLayer]]:
    """Yield the quantized layers of a network, by dotted names."""
    for name, module in named_modules(network):
        if isinstance(module, QuantizedLayer):
            yield name, module


def layers_to_ignore(network: nnx.Module, keep: str | None = None) -> tuple[str, ...]:
    """Return the names of the layers that stay as they are, by the rule of the network's class.

    Args:
        network: of a class with `QUANTIZED`, a regular expression over whole names of layers.
        keep: a further expression, that layers match which stay too.
    """
    chosen: str = network.QUANTIZED
    names = [name for name, _ in float_layers(network)]
    kept = [n for n in names if not re.fullmatch(chosen, n) or (keep is not None and re.fullmatch(keep, n))]
    return tuple(sorted(kept))


def quantize_layers(network: nnx.Module, config: QuantizationConfig | None) -> None:
    """Replace the layers of a new network by quantized ones, as its configuration says.

    Args:
        network: with arrays or shapes.
        config: None leaves the network as it is.
    Raises:
        ConfigError: where the configuration ignores layers that the network does not have, or all of them.
    """
    if config is None:
        return
    layers = dict(float_layers(network))
    if unknown := [name for name in config.ignore if name not in layers]:
        raise ConfigError(f"quantization_config.ignore names no layers of the network: {summarize(unknown)}")
    chosen = {name: layer for name, layer in layers.items() if name not in config.ignore}
    if not chosen:
        raise ConfigError("quantization_config ignores all layers; leave it out, or name fewer")
    for name, layer in chosen.items():
        made = QuantizedLinear(layer, config) if isinstance(layer, Linear) else QuantizedConv(layer, config)
        replace_module(network, name, made)
