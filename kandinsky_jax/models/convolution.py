"""Convolutions, each by the method that measures fastest on its platform at its shape.

On a TPU or GPU that is always XLA's own. On a CPU, XLA's convolution loses to matrix products of the same sums:
- a 1x1 convolution is one product;
- 3x3 of a small picture with many channels, or a tiny one: gather the nine taps and multiply once;
- 3x3 of a large one with many channels: Winograd's F(2x2, 3x3), which needs 16 products for 4 pixels instead of 36. Its
  rounding error is that of the plain sum (both about 1e-5 of the result's spread against float64); the larger tiles' is
  ten times that, so they are not used.
The figures are in `tpu_scripts/results/NOTES.md`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from kandinsky_jax.common.types import Array, Float, Num
from kandinsky_jax.parallel.stationary import InOut, multiply

Weights: TypeAlias = tuple[tuple[float, ...], ...]


class Transforms(NamedTuple):
    """Winograd's algorithm along one side of a tile: weights of sums, of which each row is one."""

    input: Weights  # of neighbouring pixels, a sum for each product
    kernel: Weights  # of the three taps, a sum for each product
    output: Weights  # of the products, a sum for each of two pixels of output
    step: int  # pixels of input from tile to tile


# Lavin & Gray 2015 (arXiv 1509.09308), section 4.1.
F_2_3 = Transforms(
    input=((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1)),
    kernel=((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1)),
    output=((1, 1, 1, 0), (0, 1, -1, -1)),
    step=2,
)
# The same of a picture whose pixels are all there twice: of its pixels a, b, b, c the third sum, b - b, is nothing.
F_2_3_DOUBLED = Transforms(
    input=((1, -1, 0), (0, 1, 0), (0, 1, -1)),
    kernel=((1, 0, 0), (1, 1, 1), (0, 0, 1)),
    output=((1, 1, 0), (0, 1, -1)),
    step=1,
)


def upsample_nearest(x: Num[Array, "B h w C"]) -> Num[Array, "B 2*h 2*w C"]:
    """Double both sides, `[B, H, W, C] -> [B, 2H, 2W, C]`, each pixel four times."""
    b, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)


def convolve(x: Float[Array, "B h w C"], kernel: Float[Array, "kh kw C D"]) -> Float[Array, "B h w D"]:
    """The plain convolution with zeros around: `x [B, H, W, in]`, `kernel [k, k, in, out]` -> `[B, H, W, out]`."""
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def multiply_pixels(x: Float[Array, "B h w C"], kernel: Float[Array, "1 1 C D"]) -> Float[Array, "B h w D"]:
    """`convolve` by a 1x1 kernel as one product."""
    return (x.reshape(-1, x.shape[-1]) @ kernel[0, 0]).reshape(*x.shape[:-1], -1)


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
    return _by_tiles(x, kernel, F_2_3)


@jax.jit
def winograd_doubled(x: Float[Array, "B h w C"], kernel: Float[Array, "3 3 C D"]) -> Float[Array, "B 2*h 2*w D"]:
    """`convolve` of the picture with each pixel four times, of which 9 of F(2x2, 3x3)'s 16 products are left."""
    return _by_tiles(x, kernel, F_2_3_DOUBLED)


def _by_tiles(x: jax.Array, kernel: jax.Array, transforms: Transforms) -> jax.Array:
    b, h, w, c = x.shape
    step = transforms.step  # s below
    # The kernel waits for the input. XLA would otherwise transform the kernels of all layers first, 1 GB of them in the
    # official UNet. (It does away with an `optimization_barrier` before it puts things in order.)
    kernel = _after(x, kernel)
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))

    def places(of: jax.Array, axis: int) -> list[jax.Array]:
        """The pixels of all tiles, by their place in the tile along an axis."""
        size = x.shape[axis] - step + 1
        return [jax.lax.slice_in_dim(of, i, i + size, step, axis) for i in range(len(transforms.input[0]))]

    # Both transforms work along a row of the tile, then along a column. The products stay separate: stacked into one,
    # XLA spends as long on moving their inputs together as on multiplying.
    across = _combine(transforms.input, places(padded, 2))  # [B, H + 2, W/s, in]
    kernels = _combine(transforms.kernel, [kernel[:, j] for j in range(3)])  # [3, in, out]
    products: list[jax.Array] = []
    for part, factor in zip(across, kernels, strict=True):
        # One column of products after the other: all at once, MoVQ has half as much again of temporaries.
        inputs = _combine(transforms.input, places(_after(products[-1], part) if products else part, 1))
        factors = _combine(transforms.kernel, [factor[i] for i in range(3)])  # [in, out]
        column = [tile.reshape(-1, c) @ f for tile, f in zip(inputs, factors, strict=True)]
        products.append(jnp.stack(_combine(transforms.output, column), axis=1))  # [B H/s W/s, 2, out]
    pixels = jnp.stack(_combine(transforms.output, products), axis=2).reshape(b, h // step, w // step, 2, 2, -1)
    return pixels.transpose(0, 1, 3, 2, 4, 5).reshape(b, 2 * h // step, 2 * w // step, -1)


def _after(first: jax.Array, then: jax.Array) -> jax.Array:
    """Return `then` as something that XLA cannot compute before `first`."""
    number = first.ravel()[0]
    return then + jnp.where(jnp.isfinite(number), 0 * number, 0)  # one picture's NaN is not its neighbours'


def _combine(rows: Weights, terms: Sequence[jax.Array]) -> list[jax.Array]:
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
    x: Float[Array | jax.ShapeDtypeStruct, "B h w C"], kernel: Float[Array | jax.ShapeDtypeStruct, "kh kw C D"]
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """What is fastest on a CPU for these shapes; other dtypes than float32 are not measured, and keep XLA's."""
    b, h, w, cin = x.shape
    if x.dtype != jnp.float32 or kernel.dtype != jnp.float32:
        return convolve
    if kernel.shape[:2] == (1, 1):
        return multiply_pixels
    if cin * kernel.shape[-1] < 128 * 128:
        return gather if h * w <= 4 else convolve
    if b * h * w < 512:
        return gather
    return winograd if h % 2 == 0 and w % 2 == 0 else convolve


def cpu_method_doubled(
    x: Float[Array | jax.ShapeDtypeStruct, "B h w C"], kernel: Float[Array | jax.ShapeDtypeStruct, "3 3 C D"]
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """`cpu_method` for the 3x3 convolution of a picture whose sides are doubled first."""
    both = jax.eval_shape(upsample_nearest, x)
    return _doubled_first if cpu_method(both, kernel) is convolve else winograd_doubled


def _doubled_first(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return convolve(upsample_nearest(x), kernel)


def _fastest(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.platform_dependent(x, kernel, cpu=cpu_method(x, kernel), default=convolve)


def _fastest_doubled(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.platform_dependent(x, kernel, cpu=cpu_method_doubled(x, kernel), default=_doubled_first)


CONV_AXES = InOut(inputs=2, outputs=3)


class Conv(nnx.Conv):
    """`nnx.Conv` whose 1x1 and 3x3 convolutions take the fastest way on a CPU."""

    def __call__(
        self, x: Float[Array, "*B h w C"], *, doubled: bool = False, **kwargs: object
    ) -> Float[Array, "*B h2 w2 D"]:
        """x: `[B, H, W, in]`; doubled: convolve the picture of `2H x 2W` in which each pixel is there four times."""
        kernel = self.kernel[...]
        side = self._side_of_same() if x.ndim == 4 and x.dtype == kernel.dtype else 0
        if doubled and side != 3:
            x, doubled = upsample_nearest(x), False
        if not side:
            return super().__call__(x, **kwargs)
        function = _fastest_doubled if doubled else _fastest
        y = multiply(function, x, kernel, CONV_AXES, InOut(self.in_features, self.out_features))
        return y if self.bias is None else y + self.bias[...]

    def _side_of_same(self) -> int:
        """Return 1 or 3 for a kernel of that side that leaves the picture's size as it is; 0 for any other."""
        side = self.kernel_size[0]
        same = self.padding in (side // 2, (side // 2,) * 2) and self.strides in (1, (1, 1))
        return side if same and tuple(self.kernel_size) in ((1, 1), (3, 3)) else 0
