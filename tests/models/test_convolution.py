"""Implementations of a convolution agree, and are chosen by platform and shape."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kandinsky_jax.models.convolution import (
    Conv,
    convolve,
    cpu_method,
    cpu_method_doubled,
    gather,
    multiply_pixels,
    upsample_nearest,
    winograd,
    winograd_doubled,
)
from kandinsky_jax.models.layers import conv
from tests.conftest import note


def inputs(b: int, h: int, w: int, cin: int, cout: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((b, h, w, cin)) + 0.5  # a mean: at the border, zeros are no news otherwise
    return x, rng.standard_normal((3, 3, cin, cout)) * (9 * cin) ** -0.5


def exact(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """In float64, tap by tap."""
    _, h, w, _ = x.shape
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return sum(padded[:, i : i + h, j : j + w] @ kernel[i, j] for i in range(3) for j in range(3))


@pytest.mark.parametrize("shape", [(1, 8, 8, 16, 24), (2, 6, 10, 256, 32), (1, 2, 2, 8, 8)])
@pytest.mark.parametrize("method", [convolve, gather, winograd])
def test_every_way_is_the_convolution(method, shape):
    x, kernel = inputs(*shape)
    expected = exact(x, kernel)
    found = method(jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32))
    error = np.abs(np.asarray(found) - expected).max() / expected.std()
    assert note(error, f"{getattr(method, '__name__', method)}, max|d| / std") <= 1e-5


@pytest.mark.parametrize("shape", [(1, 8, 8, 16, 24), (2, 3, 5, 256, 32), (1, 1, 1, 8, 8)])
def test_a_doubled_picture_by_nine_products(shape):
    x, kernel = inputs(*shape)
    expected = exact(x.repeat(2, axis=1).repeat(2, axis=2), kernel)
    found = winograd_doubled(jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32))
    error = np.abs(np.asarray(found) - expected).max() / expected.std()
    assert note(error, "doubled, max|d| / std") <= 1e-5


def test_a_kernel_of_one_pixel_is_a_product():
    x, kernel = inputs(2, 5, 7, 16, 24)
    found = multiply_pixels(jnp.asarray(x, jnp.float32), jnp.asarray(kernel[:1, :1], jnp.float32))
    np.testing.assert_allclose(found, x @ kernel[0, 0], rtol=1e-5, atol=1e-5)


def test_odd_sides_are_gathered():
    x, kernel = inputs(1, 5, 7, 16, 8)
    found = gather(jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32))
    np.testing.assert_allclose(found, exact(x, kernel), atol=1e-5)


@pytest.mark.parametrize(
    ("b", "h", "w", "cin", "cout", "expected"),
    [
        (2, 8, 8, 1536, 1536, gather),
        (2, 16, 16, 1152, 1152, winograd),
        (1, 16, 16, 1152, 1152, gather),  # transforming the kernel takes longer than what it saves
        (8, 8, 8, 1536, 1536, winograd),
        (2, 32, 32, 768, 768, winograd),
        (2, 64, 64, 1152, 384, winograd),
        (1, 512, 512, 128, 128, winograd),
        (2, 33, 64, 768, 768, convolve),  # half a tile
        (2, 64, 64, 4, 384, convolve),  # nothing to multiply
        (1, 512, 512, 128, 3, convolve),
        (16, 8, 8, 64, 64, convolve),  # a small network's
        (16, 2, 2, 80, 80, gather),
    ],
)
def test_which_way_a_cpu_takes(b, h, w, cin, cout, expected):
    x, kernel = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((b, h, w, cin), (3, 3, cin, cout)))
    assert cpu_method(x, kernel) is expected


def test_which_way_a_cpu_takes_for_a_kernel_of_one_pixel():
    for dtype, expected in ((jnp.float32, multiply_pixels), (jnp.bfloat16, convolve)):
        x, kernel = (jax.ShapeDtypeStruct(s, dtype) for s in ((1, 8, 8, 4), (1, 1, 4, 16)))
        assert cpu_method(x, kernel) is expected


@pytest.mark.parametrize(
    ("side", "channels", "dtype", "expected"),
    [(8, 1536, jnp.float32, 9), (32, 128, jnp.float32, 9), (32, 64, jnp.float32, 0), (32, 768, jnp.bfloat16, 0)],
)
def test_which_way_a_cpu_takes_for_a_doubled_picture(side, channels, dtype, expected):
    x, kernel = (
        jax.ShapeDtypeStruct(shape, dtype) for shape in ((2, side, side, channels), (3, 3, channels, channels))
    )
    method = cpu_method_doubled(x, kernel)
    assert jax.eval_shape(method, x, kernel).shape == (2, 2 * side, 2 * side, channels)
    assert str(jax.make_jaxpr(method)(x, kernel)).count("dot_general") == expected


def test_other_dtypes_keep_xlas_own():
    for b, side in ((2, 8), (2, 64)):
        x, kernel = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((b, side, side, 384), (3, 3, 384, 384)))
        assert cpu_method(x, kernel) is convolve


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("method", [convolve, gather, winograd, winograd_doubled])
def test_a_spoilt_picture_spoils_no_other(method, bad):
    x, kernel = (jnp.asarray(a, jnp.float32) for a in inputs(2, 8, 8, 16, 24))
    np.testing.assert_array_equal(method(x.at[0].set(bad), kernel)[1], method(x, kernel)[1])


@pytest.mark.parametrize(("kernel", "doubled", "on_cpu"), [(3, False, 16), (3, True, 9), (1, False, 1), (1, True, 1)])
@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_other_platforms_keep_xlas_convolution(kernel, doubled, on_cpu, platform):
    layer, products = conv(128, 128, nnx.Rngs(0), kernel=kernel), on_cpu if platform == "cpu" else 0
    x = jax.ShapeDtypeStruct((1, 34, 34, 128), jnp.float32)
    text = jax.jit(lambda x: layer(x, doubled=doubled)).trace(x).lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.dot_general") == products
    assert text.count("stablehlo.convolution") == (0 if products else 1)


@pytest.mark.parametrize("settings", [{"kernel": 1}, {}, {"padding": 0}, {"kernel": 5}, {"kernel": 1, "stride": 2}])
def test_a_doubled_picture_is_doubled_first(settings):
    layer = conv(8, 8, nnx.Rngs(0), **settings)
    x = jnp.asarray(inputs(1, 8, 8, 8, 8)[0], jnp.float32)
    np.testing.assert_allclose(layer(x, doubled=True), layer(upsample_nearest(x)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [{"stride": 2}, {"padding": ((0, 1), (0, 1)), "stride": 2}])
def test_other_convolutions_are_flax_own(settings):
    layer = conv(8, 8, nnx.Rngs(0), **settings)
    x = jnp.asarray(inputs(1, 8, 8, 8, 8)[0], jnp.float32)
    assert isinstance(layer, Conv)
    np.testing.assert_array_equal(layer(x), nnx.Conv.__call__(layer, x))


@pytest.mark.parametrize("settings", [{"kernel": 1}, {"kernel": 1, "bias": False}, {}])
def test_the_layer_is_flax_own_but_for_rounding(settings):
    layer = conv(8, 8, nnx.Rngs(0), **settings)
    x = jnp.asarray(inputs(1, 8, 8, 8, 8)[0], jnp.float32)
    np.testing.assert_allclose(layer(x), nnx.Conv.__call__(layer, x), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_winograd_has_the_convolutions_gradient():
    x, kernel = (jnp.asarray(a, jnp.float32) for a in inputs(1, 4, 4, 8, 8))

    def gradient(method):
        return jax.grad(lambda x, k: (method(x, k) ** 2).sum(), argnums=(0, 1))(x, kernel)

    def doubled_first(x, kernel):
        return convolve(upsample_nearest(x), kernel)

    for ours, plain in ((winograd, convolve), (winograd_doubled, doubled_first)):
        for a, b in zip(gradient(ours), gradient(plain), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
