"""MoVQ's spatial norm on TPUs works block by block, and gives what it gives elsewhere."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kandinsky_jax.models.movq import SpatialNorm


@pytest.fixture(scope="module")
def norm():
    made = SpatialNorm(64, 4, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    for parameter in (made.norm_layer.scale, made.norm_layer.bias):
        parameter.set_value(jnp.asarray(rng.standard_normal(64), jnp.float32))
    return made


@pytest.mark.parametrize("factor", [(1, 1), (2, 2), (8, 4)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blocks_are_the_resized_maps(norm, factor, dtype):
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((2, 4 * factor[0], 6 * factor[1], 64)), dtype)
    scale, shift = (jnp.asarray(rng.standard_normal((2, 4, 6, 64)), dtype) for _ in range(2))
    arguments = (x, *norm.norm_layer.statistics(x), scale, shift)
    resized, blocks = norm._resized(*arguments), norm._by_blocks(*arguments)
    assert blocks.shape == x.shape
    np.testing.assert_allclose(np.float32(blocks), np.float32(resized), rtol=1e-6, atol=1e-6)
    first = np.float32(norm.norm_layer(x)[0, 0, 0]) * np.float32(scale[0, 0, 0]) + np.float32(shift[0, 0, 0])
    np.testing.assert_allclose(np.float32(blocks[0, 0, 0]), first, rtol=2e-2, atol=2e-2)


def test_only_tpus_work_by_blocks(norm):
    graphdef, state = nnx.split(norm)
    shapes = jax.ShapeDtypeStruct((2, 16, 16, 64), jnp.bfloat16), jax.ShapeDtypeStruct((2, 8, 8, 4), jnp.bfloat16)
    traced = jax.jit(lambda state, x, zq: nnx.merge(graphdef, state)(x, zq)).trace(state, *shapes)
    texts = {platform: traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("tpu", "cpu", "cuda")}
    assert {platform: "optimization_barrier" in text for platform, text in texts.items()} == {
        "tpu": True,
        "cpu": False,
        "cuda": False,
    }
