"""What two or more of the networks share: norms, convolutions, the ResNet block's parts, time embedding.

Pictures inside are NHWC. Layers compute in the dtype of their parameters, except statistics of norms and softmax,
which are float32. Epsilons follow PyTorch's defaults (1e-5), not Flax's (1e-6).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.custom_derivatives import SymbolicZero
from jax.typing import DTypeLike

from kandinsky_jax.common.types import Array, Float, Num, Params
from kandinsky_jax.models.config import NetworkConfig
from kandinsky_jax.models.convolution import Conv
from kandinsky_jax.models.quantization_config import has_own_dtype
from kandinsky_jax.parallel.stationary import InOut, multiply

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
}


def dtype_of(module: nnx.Module) -> jnp.dtype:
    """The dtype in which `module` computes: that of its first parameter, but for quantized weights and their scales."""
    return next(dtypes_of(nnx.to_pure_dict(nnx.state(module, nnx.Param))))


def dtypes_of(params: Params) -> Iterator[jnp.dtype]:
    """Yield the dtypes of parameters, but for quantized weights and their scales."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path[-1:], simple=True)
        if not has_own_dtype(name, leaf.dtype) and jnp.issubdtype(leaf.dtype, jnp.floating):
            yield leaf.dtype


class Shapes:
    """Stands in for `nnx.Rngs` when a network is built for its structure alone.

    Parameters are then `jax.ShapeDtypeStruct`s. `nnx.eval_shape` gives the same, but traces every random initialiser:
    8 seconds for the official UNet against 0.2.
    """

    def params(self) -> None:
        return None


Rngs: TypeAlias = "nnx.Rngs | Shapes"


def abstract(cls: type[nnx.Module], config: NetworkConfig) -> nnx.Module:
    """A network of `cls` whose parameters are shapes and dtypes, no arrays."""
    return cls(config, rngs=Shapes())


def _shape_or(init: Callable[..., jax.Array]) -> Callable[..., jax.Array | jax.ShapeDtypeStruct]:
    def make(
        key: jax.Array | None, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32, **kwargs: object
    ) -> jax.Array | jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype) if key is None else init(key, shape, dtype, **kwargs)

    return make


_normal, _embedding = _shape_or(nnx.initializers.lecun_normal()), _shape_or(nnx.initializers.normal(0.02))
_rows = _shape_or(nnx.initializers.lecun_normal(in_axis=-1, out_axis=-2))
_zeros, _ones = _shape_or(nnx.initializers.zeros_init()), _shape_or(nnx.initializers.ones_init())


def param(shape: tuple[int, ...], rngs: Rngs) -> nnx.Param:
    return nnx.Param(_embedding(rngs.params(), shape))


LINEAR_AXES = InOut(inputs=1, outputs=0)


class Linear(nnx.Module):
    """`x @ weight.T + bias`.

    The weight is `[out, in]`, as PyTorch keeps it, where Flax would have a kernel `[in, out]`: a product of few rows
    reads it in the order in which it lies, several times as fast on a CPU, where the prior's steps do nothing else.
    """

    def __init__(self, cin: int, cout: int, *, bias: bool, rngs: Rngs):
        self.features = InOut(cin, cout)
        self.weight = nnx.Param(_rows(rngs.params(), (cout, cin)))
        self.bias = nnx.Param(_zeros(rngs.params(), (cout,))) if bias else None

    def __call__(self, x: Float[Array, "*B cin"]) -> Float[Array, "*B cout"]:
        """x: `[..., in]`; `[..., out]`."""
        y = multiply(_product, x, self.weight[...], LINEAR_AXES, self.features)
        return y if self.bias is None else y + self.bias[...]


def _times(x: jax.Array, weight: jax.Array) -> jax.Array:
    """`x @ weight.T`."""
    return jax.lax.dot_general(x, weight, (((x.ndim - 1,), (1,)), ((), ())))


FEW_ROWS = 96  # up to which a CPU is faster by `_few_times`


@jax.jit  # so that layers of the same shape are traced once
def _few_times(x: jax.Array, weight: jax.Array) -> jax.Array:
    """`_times` with the weight as the first factor: XLA for CPUs packs the second one anew in each product, and reads
    the first as it lies, two to three times as fast for a few rows. The barrier keeps it from swapping them; multiples
    of eight rows are as fast as a few less."""
    rows = x.reshape(-1, x.shape[-1])
    count = len(rows)
    rows = jnp.pad(rows, ((0, -count % (8 if count > 4 else 4)), (0, 0)))
    y = jax.lax.optimization_barrier(jax.lax.dot_general(weight, rows, (((1,), (1,)), ((), ()))))
    return y.T[:count].reshape(*x.shape[:-1], -1)


def _fastest_times(x: jax.Array, weight: jax.Array) -> jax.Array:
    if x.dtype == weight.dtype == jnp.float32 and 1 < math.prod(x.shape[:-1]) <= FEW_ROWS:
        return jax.lax.platform_dependent(x, weight, cpu=_few_times, default=_times)
    return _times(x, weight)


_product = jax.custom_jvp(_fastest_times)


def _product_jvp(primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    # JAX's own weight gradient sums over all leading axes at once. For that XLA's CPU compiler wants a transposed copy
    # of the output's gradient, and computes it again, in the wrong order of memory: a quarter of the prior's training
    # step. Of rows in one axis it does not.
    (x, weight), (dx, dweight) = primals, tangents
    y = _product(x, weight)
    parts = []
    if not isinstance(dx, SymbolicZero):
        parts.append(_times(dx, weight))
    if not isinstance(dweight, SymbolicZero):
        parts.append(_times(x.reshape(-1, x.shape[-1]), dweight).reshape(y.shape))
    return y, functools.reduce(jnp.add, parts) if parts else jnp.zeros_like(y)


_product.defjvp(_product_jvp, symbolic_zeros=True)


def linear(cin: int, cout: int, rngs: Rngs, bias: bool = True) -> Linear:
    return Linear(cin, cout, bias=bias, rngs=rngs)


def embed(count: int, dim: int, rngs: Rngs) -> nnx.Embed:
    return nnx.Embed(count, dim, embedding_init=_embedding, rngs=rngs)


# XLA gives a GPU's sum over positions one block per 128 channels of an example: 6 blocks for the 132 processors of an
# H100 at 64 x 64, 384 channels, two rows. Beyond `SPLIT_BY_XLA` positions it splits the sum itself.
REDUCTION_BLOCKS, REDUCTION_PARTS, SPLIT_BY_XLA = 264, 16, 4096


def reduction_parts(batch: int, positions: int, channels: int) -> int:
    """Parts of at least 32 positions into which a GPU's sum over them is split, so that it has enough blocks."""
    parts, blocks = 1, batch * -(-channels // 128)
    while (
        positions <= SPLIT_BY_XLA
        and parts < REDUCTION_PARTS
        and parts * blocks < REDUCTION_BLOCKS
        and positions % (2 * parts) == 0
        and positions >= 2 * parts * 32
    ):
        parts *= 2
    return parts


class GroupNorm(nnx.GroupNorm):
    """GroupNorm over all but the batch and the group's channels, statistics in float32; output in the input's dtype.

    The variance in two passes, as the reference, because E[x^2] - E[x]^2 cancels; but of bfloat16 in one, which a TPU
    may compute while it writes the input. There the cancellation is no news: with a mean of r standard deviations it
    costs the variance about r^2 * 2^-24, and the rounding of the input to bfloat16 has cost it r^2 * 2^-20.
    """

    def __init__(self, channels: int, groups: int, eps: float, rngs: Rngs):
        super().__init__(channels, num_groups=groups, epsilon=eps, scale_init=_ones, bias_init=_zeros, rngs=rngs)

    def __call__(self, x: Float[Array, "B *spatial C"]) -> Float[Array, "B *spatial C"]:
        mean, factor = self.statistics(x)
        return self.normalized(x, mean, factor)

    def statistics(self, x: Float[Array, "B *spatial C"]) -> tuple[jax.Array, jax.Array]:
        """Return the mean, and what the distance from it is multiplied by; float32, `[B, 1, .., C]`."""
        mean, variance = (self._once if x.dtype == jnp.bfloat16 else self._twice)(x.astype(jnp.float32))
        return mean, jax.lax.rsqrt(variance + self.epsilon) * self.scale[...].astype(jnp.float32)

    def normalized(
        self, x: Float[Array, "B *spatial C"], mean: jax.Array, factor: jax.Array
    ) -> Float[Array, "B *spatial C"]:
        """Return the output for statistics that may be of the same numbers in another shape."""
        bias = self.bias[...].astype(jnp.float32)
        return ((x.astype(jnp.float32) - mean) * factor + bias).astype(x.dtype)

    def _twice(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and variance, sums channel by channel first and then over each group's few: an order of memory in which
        a CPU adds up vectors, two to eight times faster than sums of a group at once, and with less rounding."""

        def mean(y: jax.Array) -> jax.Array:
            return self._per_channel(self._grouped(y.mean(tuple(range(1, y.ndim - 1)))).mean(2), x.ndim)

        first = mean(x)
        return first, mean(jnp.square(x - first))

    def _once(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and variance from the means of the numbers and of their squares, of a group at once."""
        mean, squares = jax.lax.platform_dependent(x, cuda=self._means_by_parts, default=self._means)  # [B, groups]
        variance = jnp.maximum(squares - jnp.square(mean), 0)
        return self._per_channel(mean, x.ndim), self._per_channel(variance, x.ndim)

    def _means(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Means of a group at once: channel by channel, XLA has a TPU read 7 % more in MoVQ."""
        grouped = self._grouped(x)
        axes = (*range(1, x.ndim - 1), x.ndim)
        return grouped.mean(axes), jnp.square(grouped).mean(axes)

    def _means_by_parts(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`_means`, the positions in parts whose sums are then added up: enough blocks for all of a GPU."""
        batch, channels = x.shape[0], x.shape[-1]
        positions = math.prod(x.shape[1:-1])
        parts = reduction_parts(batch, positions, channels)
        if parts == 1:
            return self._means(x)
        split = x.reshape(batch, parts, -1, channels)
        sums = jnp.stack([split.sum(2), jnp.square(split).sum(2)])  # [2, B, parts, C]
        groups = self._grouped(sums).sum((2, 4)) / (positions * self.group_size)
        return groups[0], groups[1]

    def _grouped(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], self.num_groups, self.group_size)

    def _per_channel(self, statistic: jax.Array, ndim: int) -> jax.Array:
        """`[B, groups]` -> `[B, 1.., C]`."""
        return jnp.repeat(statistic, self.group_size, axis=1).reshape(len(statistic), *[1] * (ndim - 2), -1)


def layer_norm(channels: int, rngs: Rngs, eps: float = 1e-5) -> nnx.LayerNorm:
    return nnx.LayerNorm(
        channels,
        epsilon=eps,
        use_fast_variance=False,
        scale_init=_ones,
        bias_init=_zeros,
        rngs=rngs,
    )


def conv(
    cin: int,
    cout: int,
    rngs: Rngs,
    kernel: int = 3,
    stride: int = 1,
    padding: Sequence[tuple[int, int]] | int | str | None = None,
    bias: bool = True,
) -> Conv:
    """A convolution, by default with PyTorch's symmetric padding; Flax's SAME pads one-sidedly at stride 2."""
    return Conv(
        cin,
        cout,
        (kernel, kernel),
        strides=stride,
        padding=kernel // 2 if padding is None else padding,
        use_bias=bias,
        kernel_init=_normal,
        bias_init=_zeros,
        rngs=rngs,
    )


def downsample_mean(x: Float[Array, "B h w C"]) -> Float[Array, "B h//2 w//2 C"]:
    """Halve both sides, `[B, H, W, C] -> [B, H/2, W/2, C]`, the mean of each 2x2 square (an odd last row or column
    is dropped, as by the reference's average pooling)."""
    b, h, w, c = x.shape
    return x[:, : h // 2 * 2, : w // 2 * 2].reshape(b, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4), dtype=x.dtype)


def timestep_embedding(timestep: Num[Array | np.ndarray, "B"], dim: int) -> Float[Array, "B dim"]:
    """Sinusoidal embedding, cosines first, of `timestep [B]` -> float32 `[B, dim]`.

    Reference: `diffusers.models.embeddings.Timesteps` with flip_sin_to_cos=True, freq_shift=0.
    """
    half = dim // 2
    frequency = np.exp(np.float32(-math.log(10000)) * np.arange(half, dtype=np.float32) / half)
    angle = timestep.astype(jnp.float32)[:, None] * frequency
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


class TimestepEmbedding(nnx.Module):
    """Two linear layers with SiLU between, on the sinusoidal embedding."""

    def __init__(self, channels: int, hidden: int, out: int, *, rngs: Rngs):
        self.linear_1 = linear(channels, hidden, rngs)
        self.linear_2 = linear(hidden, out, rngs)

    def __call__(self, x: Float[Array, "B C"]) -> Float[Array, "B D"]:
        return self.linear_2(jax.nn.silu(self.linear_1(x)))


def split_heads(x: Float[Array, "B T D"], heads: int) -> Float[Array, "B T {heads} D//{heads}"]:
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)  # [B, T, D] -> [B, T, N, D/N]
