"""Linear layers and convolutions with weights and inputs of 8 bits, computed by qwix.

A layer's weight is int8 (or float8) with a float32 scale per output channel. Its input is rounded to the same dtype by
one scale, from calibration or, dynamic, from the input itself; the product sums in int32 and is scaled in float32.
With calibration an int8 input has a zero point, since what comes out of SiLU and GELU is hardly ever negative: that
makes its rounding half as large. Names are those of HF's compressed-tensors: `weight` (of a convolution `kernel`),
`weight_scale`, `input_scale`, `input_zero_point`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Container, Iterator
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from kandinsky_jax.common.errors import summarize
from kandinsky_jax.common.types import Array, Float
from kandinsky_jax.models.config import ConfigError
from kandinsky_jax.models.convolution import Conv, upsample_nearest
from kandinsky_jax.models.layers import Linear
from kandinsky_jax.models.quantization_config import SMALLEST_SCALE, WEIGHT_SUM, QuantizationConfig
from kandinsky_jax.models.structure import named_modules, replace_module

Leaf = jax.Array | jax.ShapeDtypeStruct
Padding = tuple[tuple[int, int], tuple[int, int]]  # of rows and columns


class QuantizedLayer(nnx.Module):
    """Base of quantized layers.

    Args:
        layer: that is replaced, with arrays, which are quantized, or with shapes alone. The input's scale is 1 and its
            zero point 0 until `set_params` sets them.
        config: of the network.
    """

    WEIGHT: ClassVar[str]  # name of the parameter
    OUTPUTS: ClassVar[int]  # its axis of output channels

    weight_scale: nnx.Param  # float32, [out, 1, ...], as many axes as the weight
    weight_sum: nnx.Param | None  # int32, [out], of the weight over its inputs; None where the zero point is 0
    input_scale: nnx.Param | None  # float32, [1]; None for dynamic
    input_zero_point: nnx.Param | None  # int8, [1], what stands for an input of 0; None where it is 0
    bias: nnx.Param | None

    def __init__(self, layer: Linear | Conv, config: QuantizationConfig):
        self.dtype = config.dtype
        weight, scale, each = _quantized_leaves(getattr(layer, self.WEIGHT).get_value(), config.dtype, self.OUTPUTS)
        setattr(self, self.WEIGHT, nnx.Param(weight))
        self.weight_scale = nnx.Param(scale)
        self.weight_sum = None if config.symmetric else nnx.Param(each)
        self.input_scale = None if config.dynamic else nnx.Param(_filled(scale, 1, jnp.float32))
        self.input_zero_point = None if config.symmetric else nnx.Param(_filled(scale, 0, config.dtype))
        self.bias = None if layer.bias is None else nnx.Param(layer.bias.get_value())

    def _quantized_input(self, x: jax.Array, shared: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        """Return the input in the layer's dtype, and its scale, float32, of as many axes.

        Args:
            x: the input.
            shared: the axes that share a scale, where it is dynamic.
        """
        x, least, most = x.astype(jnp.float32), *dtype_bounds(self.dtype)
        if self.input_scale is None:
            largest = jnp.max(jnp.abs(x), shared, keepdims=True)
            scale = jnp.where(largest > 0, largest / most, 1)
        else:
            scale = self.input_scale[...].reshape((1,) * x.ndim)
        x = x * (1 / scale)
        if jnp.issubdtype(self.dtype, jnp.integer):
            x = jnp.round(x)
        if self.input_zero_point is not None:
            x = x + self.input_zero_point[...].astype(jnp.float32)
        return jnp.clip(x, least, most).astype(self.dtype), scale

    def _scaled(self, sums: jax.Array, scale: jax.Array, dtype: DTypeLike) -> jax.Array:
        """Return the output in `dtype`.

        Args:
            sums: of products, int32 (float32 of float8), `[..., out]`.
            scale: of the input.
        """
        # In floats already here: XLA knows a convolution of 8 bits on a GPU by the conversion that follows it.
        y = sums.astype(jnp.float32)
        if self.input_zero_point is not None and self.weight_sum is not None:
            # Computed here, the sum would be read off the weight again at each step of a loop.
            y = y - (self.weight_sum[...] * self.input_zero_point[...]).astype(jnp.float32)
        y = y * (scale * self.weight_scale[...].reshape(-1))
        return (y if self.bias is None else y + self.bias[...].astype(jnp.float32)).astype(dtype)

    @property
    def _sums(self) -> DTypeLike:
        return jnp.int32 if jnp.issubdtype(self.dtype, jnp.integer) else jnp.float32


class QuantizedLinear(QuantizedLayer):
    """`x @ weight.T + bias` of a quantized input and weight."""

    WEIGHT, OUTPUTS = "weight", 0

    weight: nnx.Param  # [out, in]

    def __call__(self, x: Float[Array, "*B cin"]) -> Float[Array, "*B cout"]:
        """x: `[..., in]`; `[..., out]` in the dtype of x."""
        last = x.ndim - 1
        value, scale = self._quantized_input(x, (last,))
        contracted = (((last,), (1,)), ((), ()))
        with _default_precision():
            sums = _qwix().dot_general(value, self.weight[...], contracted, preferred_element_type=self._sums)
        return self._scaled(sums, scale, x.dtype)


class QuantizedConv(QuantizedLayer):
    """A convolution of a quantized input and kernel, NHWC."""

    WEIGHT, OUTPUTS = "kernel", 3

    kernel: nnx.Param  # [height, width, in, out]

    def __init__(self, layer: Conv, config: QuantizationConfig):
        super().__init__(layer, config)
        self.strides = _pair(layer.strides)
        self.padding = _pads(layer.padding)

    def __call__(self, x: Float[Array, "B h w C"], *, doubled: bool = False) -> Float[Array, "B h2 w2 D"]:
        """x: `[B, H, W, in]`; `[B, H', W', out]` in the dtype of x. doubled: as in `Conv`."""
        value, scale = self._quantized_input(x, (1, 2, 3))
        value = upsample_nearest(value) if doubled else value
        kernel = self.kernel[...]
        if self.input_zero_point is None or not any(map(any, self.padding)):
            sums = self._convolve(value, kernel, self.padding)
        else:
            borders = [(0, 0, 0), *((*sides, 0) for sides in self.padding), (0, 0, 0)]
            padded = jax.lax.pad(value, self.input_zero_point[...][0], borders)
            sums = jax.lax.platform_dependent(padded, kernel, cpu=self._convolve_on_cpu, default=self._convolve)
        return self._scaled(sums, scale, x.dtype)

    def _convolve(self, value: jax.Array, kernel: jax.Array, padding: Padding = ((0, 0), (0, 0))) -> jax.Array:
        """Return the sums of products of 8 bits, `[B, H', W', out]`, with zeros around the input."""
        with _default_precision():
            return _qwix().conv_general_dilated(
                value,
                kernel,
                self.strides,
                padding,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                preferred_element_type=self._sums,
            )

    def _convolve_on_cpu(self, value: jax.Array, kernel: jax.Array) -> jax.Array:
        """Return the same as `_convolve` of a padded input, by a convolution that pads it once more: XLA's convolution
        of 8 bits takes up to twice as long without padding."""
        if self.strides != (1, 1):
            return self._convolve(value, kernel)
        (top, bottom), (left, right) = self.padding
        sums = self._convolve(value, kernel, self.padding)
        return sums[:, top : sums.shape[1] - bottom, left : sums.shape[2] - right]


def _qwix() -> Any:
    """Import qwix, which only quantized networks need; it takes 30 ms.

    Raises:
        ImportError: where it is not installed, saying what to do.
    """
    try:
        import qwix
    except ImportError as error:
        raise ImportError(f"quantized networks need qwix ({error}): pip install 'kandinsky-jax[quantize]'") from None
    return qwix


def _default_precision() -> AbstractContextManager[object]:
    """Products of 8 bits as they are, whatever precision is set for float32 ones."""
    return jax.default_matmul_precision("default")


def _pair(value: int | tuple[int, int] | None) -> tuple[int, int]:
    if value is None or isinstance(value, int):
        return (value or 1, value or 1)
    return value


def _pads(padding: Any) -> Padding:
    return ((padding, padding), (padding, padding)) if isinstance(padding, int) else tuple(padding)


def _filled(leaf: Leaf, value: float, dtype: DTypeLike) -> Leaf:
    """Return `[value]`, or the shape alone where the other leaf is one."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((1,), jnp.dtype(dtype))
    return jnp.full((1,), value, dtype)


def _quantized_leaves(weight: Leaf, dtype: str, outputs: int) -> tuple[Leaf, Leaf, Leaf]:
    if isinstance(weight, jax.ShapeDtypeStruct):
        count, ones, shape = weight.shape[outputs], [1] * (len(weight.shape) - 1), jax.ShapeDtypeStruct
        return shape(weight.shape, jnp.dtype(dtype)), shape((count, *ones), jnp.float32), shape((count,), jnp.int32)
    return quantize_weight(weight, dtype, outputs)


# Arrays -----------------------------------------------------------------------------------------------------------


def dtype_bounds(dtype: str) -> tuple[float, float]:
    """Return the least and the largest number that an input is rounded to."""
    info = jnp.iinfo(dtype) if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo(dtype)
    return float(info.min), float(info.max)


def input_scale(low: float, high: float, config: QuantizationConfig) -> tuple[float, int]:
    """Return the scale and the zero point of inputs within a range, which is widened to hold 0."""
    low, high = min(low, 0.0), max(high, 0.0)
    least, most = dtype_bounds(config.dtype)
    width = max(-low, high) / most if config.symmetric else (high - low) / (most - least)
    if not SMALLEST_SCALE <= width < np.inf:  # an input of zeros has no scale of its own
        return 1.0, 0
    return width, 0 if config.symmetric else round(np.clip(least - low / width, least, most))


@functools.partial(jax.jit, static_argnames=("dtype", "outputs"))
def quantize_weight(weight: jax.Array, dtype: str, outputs: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Quantize a weight, with one scale per output channel.

    Args:
        weight: of floats.
        dtype: to quantize to.
        outputs: the axis of output channels.
    Returns:
        the weight in `dtype`; the scale, float32 `[out, 1, ...]`; the sum over the inputs, int32 `[out]`.
    """
    found = _qwix().quantize(weight.astype(jnp.float32), jnp.dtype(dtype), channelwise_axes=(outputs,))
    others = tuple(axis for axis in range(weight.ndim) if axis != outputs)
    each = jnp.sum(found.qvalue, others, dtype=jnp.int32 if dtype == "int8" else jnp.float32)
    return found.qvalue, found.scale.reshape(-1, *[1] * (weight.ndim - 1)), each.astype(jnp.int32)


def weight_parameters(parameter: str, params: Container[str]) -> list[str]:
    """Return the dotted names of a weight and of what belongs to it: if it is quantized, its scale and its sum."""
    layer = parameter.rpartition(".")[0]
    return [parameter, *(name for name in (f"{layer}.weight_scale", f"{layer}.{WEIGHT_SUM}") if name in params)]


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
        ImportError: where qwix is not installed.
    """
    if config is None:
        return
    _qwix()  # before anything is read
    layers = dict(float_layers(network))
    if unknown := [name for name in config.ignore if name not in layers]:
        raise ConfigError(f"quantization_config.ignore names no layers of the network: {summarize(unknown)}")
    chosen = {name: layer for name, layer in layers.items() if name not in config.ignore}
    if not chosen:
        raise ConfigError("quantization_config ignores all layers; leave it out, or name fewer")
    for name, layer in chosen.items():
        made = QuantizedLinear(layer, config) if isinstance(layer, Linear) else QuantizedConv(layer, config)
        replace_module(network, name, made)
