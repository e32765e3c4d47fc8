"""Convolutions, each by the method that measures fastest on its platform at its shape.

On a TPU or GPU that is always XLA's own. On a CPU, XLA's 3x3 convolution loses to matrix products of the same sums:
- a small picture with many channels, or a tiny one: gather the nine taps and multiply once;
- a large one with many channels: Winograd's F(2x2, 3x3), which needs 16 products for 4 pixels instead of 36. Its
  rounding error is that of the plain sum (both about 1e-5 of the result's spread against float64); the larger tiles' is
  ten times that, so they are not used.
The figures are in `tpu_scripts/results/NOTES.md`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from kandinsky_jax.common.types import Array, Float
from kandinsky_jax.parallel.stationary import InOut, multiply

# Lavin & Gray 2015 (arXiv 1509.09308), section 4.1: the transforms of inputs, kernels and outputs, as rows of weights.
_INPUT = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))
_KERNEL = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))
_OUTPUT = ((1, 1, 1, 0), (0, 1, -1, -1))
_TILE = 4  # pixels of input along a tile's side, for 2 of output


def convolve(x: Float[Array, "B h w C"], kernel: Float[Array, "kh kw C D"]) -> Float[Array, "B h w D"]:
    """The plain 3x3 convolution: `x [B, H, W, in]`, `kernel [3, 3, in, out]` -> `[B, H, W, out]`, zeros around it."""
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


@jax.jit  # so that layers of the same shape are traced once
def gather(x: Float[Array, "B h w C"], kernel: Float[Array, "kh kw C D"]) -> Float[Array, "B h w D"]:
    """`convolve` as one product of the nine taps side by side."""
    b, h, w, c = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    taps = jnp.concatenate([padded[:, i : i + h, j : j + w] for i in range(3) for j in range(3)], axis=-1)
    return (taps.reshape(b * h * w, 9 * c) @ kernel.reshape(9 * c, -1)).reshape(b, h, w, -1)


@jax.jit
def winograd(x: Float[Array, "B h w C"], kernel: Float[Array, "3 3 C D"]) -> Float[Array, "B h w D"]:
    """`convolve` by F(2x2, 3x3), for even H and W."""
    b, h, w, c = x.shape
    # The kernel waits for the input. XLA would otherwise transform the kernels of all layers first, 1 GB of them in the
    # official UNet. (It does away with an `optimization_barrier` before it puts things in order.)
    first = x[0, 0, 0, 0]
    kernel = kernel + jnp.where(jnp.isfinite(first), 0 * first, 0)  # one picture's NaN is not its neighbours'
    tiles = range(_TILE)
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    # Both transforms work along a row of the tile, then along a column. The 16 products stay separate: stacked into
    # one, XLA spends as long on moving their inputs together as on multiplying.
    across = _combine(_INPUT, [padded[:, :, j : j + w - 1 : 2] for j in tiles])  # 4 x [B, H + 2, W/2, in]
    kernels = _combine(_KERNEL, [kernel[:, j] for j in range(3)])  # 4 x [3, in, out]
    products = []
    for part, factor in zip(across, kernels, strict=True):
        inputs = _combine(_INPUT, [part[:, i : i + h - 1 : 2] for i in tiles])  # 4 x [B, H/2, W/2, in]
        factors = _combine(_KERNEL, [factor[i] for i in range(3)])  # 4 x [in, out]
        column = [tile.reshape(-1, c) @ f for tile, f in zip(inputs, factors, strict=True)]
        products.append(jnp.stack(_combine(_OUTPUT, column), axis=1))  # [B H/2 W/2, 2, out]
    pixels = jnp.stack(_combine(_OUTPUT, products), axis=2)  # [B H/2 W/2, 2, 2, out]
    return pixels.reshape(b, h // 2, w // 2, 2, 2, -1).transpose(0, 1, 3, 2, 4, 5).reshape(b, h, w, -1)


def _combine(rows: Sequence[Sequence[float]], terms: Sequence[jax.Array]) -> list[jax.Array]:
    """Each row's weighted sum of the terms, without products by 0 and 1."""
    sums = []
    for row in rows:
        parts = [
            term if abs(weight) == 1 else abs(weight) * term for weight, term in zip(row, terms, strict=True) if weight
        ]
        signs = [weight > 0 for weight in row if weight]
        total = parts[0] if signs[0] else -parts[0]
        for part, positive in zip(parts[1:], signs[1:], strict=True):
            total = total + part if positive else total - part
        sums.append(total)
    return sums


def cpu_method(
    x: Float[Array | jax.ShapeDtypeStruct, "B h w C"], kernel: Float[Array | jax.ShapeDtypeStruct, "3 3 C D"]
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """What is fastest on a CPU for these shapes; other dtypes than float32 are not measured, and keep XLA's."""
    b, h, w, cin = x.shape
    if x.dtype != jnp.float32 or kernel.dtype != jnp.float32:
        return convolve
    if cin * kernel.shape[-1] < 128 * 128:
        return gather if h * w <= 4 else convolve
    if b * h * w <= 1024:
        return gather
    return winograd if h % 2 == 0 and w % 2 == 0 else convolve


def _fastest(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.platform_dependent(x, kernel, cpu=cpu_method(x, kernel), default=convolve)


CONV_AXES = InOut(inputs=2, outputs=3)


class Conv(nnx.Conv):
    """`nnx.Conv` whose 3x3 convolutions take the fastest way on a CPU."""

    def __call__(self, x: Float[Array, "*B h w C"], **kwargs: object) -> Float[Array, "*B h2 w2 D"]:
        kernel, strides = self.kernel[...], self.strides
        if kernel.shape[:2] != (3, 3) or strides not in (1, (1, 1)) or self.padding not in (1, (1, 1)) or x.ndim != 4:
            return super().__call__(x, **kwargs)
        y = multiply(_fastest, x, kernel, CONV_AXES, InOut(self.in_features, self.out_features))
        return y if self.bias is None else y + self.bias[...]
