"""Linear layers of few rows, which a CPU multiplies with the weight first."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kandinsky_jax.models.layers import FEW_ROWS, linear


def layer_and_input(*rows: int, dtype=jnp.float32):
    layer = linear(40, 24, nnx.Rngs(0))
    layer.bias.set_value(jnp.arange(24, dtype=jnp.float32))
    x = np.random.default_rng(0).standard_normal((*rows, 40))
    layer.weight.set_value(layer.weight[...].astype(dtype))
    layer.bias.set_value(layer.bias[...].astype(dtype))
    return layer, jnp.asarray(x, dtype)


@pytest.mark.parametrize("rows", [(2,), (4,), (5,), (2, 3), (8,), (2, 2, 3), (FEW_ROWS,), (1,), (FEW_ROWS + 1,)])
def test_it_is_the_product(rows):
    layer, x = layer_and_input(*rows)
    expected = np.asarray(x, np.float64) @ np.asarray(layer.weight[...], np.float64).T + np.arange(24)
    np.testing.assert_allclose(layer(x), expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "dtype", "few"),
    [
        (2, jnp.float32, True),
        (FEW_ROWS, jnp.float32, True),
        (1, jnp.float32, False),
        (FEW_ROWS + 1, jnp.float32, False),
        (6, jnp.bfloat16, False),
    ],
)
def test_which_way_a_platform_takes(rows, dtype, few):
    layer, x = layer_and_input(rows, dtype=dtype)
    traced = jax.jit(lambda x: layer(x)).trace(x)
    for platform in ("cpu", "tpu", "cuda"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("optimization_barrier" in text) == (few and platform == "cpu")


def test_xla_leaves_the_weight_first():
    """A second factor would be packed anew in each product."""
    layer, x = layer_and_input(6)
    weight = layer.weight[...]
    text = jax.jit(lambda x, weight: nnx.merge(*nnx.split(layer))(x) + 0 * weight[0, 0]).lower(x, weight).compile()
    assert "f32[24,8]" in text.as_text()  # outputs first, six rows filled up to eight


def test_the_gradient():
    layer, x = layer_and_input(2, 3)
    structure, params = nnx.split(layer)

    def loss(params, x):
        return (nnx.merge(structure, params)(x) ** 3).sum()

    def plain(params, x):
        return ((x @ params["weight"][...].T + params["bias"][...]) ** 3).sum()

    ours, theirs = (jax.tree.leaves(jax.grad(f, (0, 1))(params, x)) for f in (loss, plain))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)
