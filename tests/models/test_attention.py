"""Implementations of attention agree, and are chosen by platform and shape; GroupNorm's statistics."""

from __future__ import annotations

import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

from kandinsky_jax.models import attention
from kandinsky_jax.models.layers import GroupNorm


def shapes(queries: int, keys: int, heads: int, dim: int, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct((2, queries, heads, dim), dtype), jax.ShapeDtypeStruct((2, keys, heads, dim), dtype)


def qkv(queries: int, keys: int, heads: int, dim: int):
    keys_of = jax.random.split(jax.random.key(0), 3)
    lengths = (queries, keys, keys)
    return [jax.random.normal(k, (2, n, heads, dim), jnp.bfloat16) for k, n in zip(keys_of, lengths, strict=True)]


@pytest.mark.parametrize(
    ("queries", "keys", "heads", "dim"),
    [
        pytest.param(64, 97, 2, 64, id="two heads a block", marks=pytest.mark.slow),
        pytest.param(200, 37, 4, 32, id="a ragged last block"),
    ],
)
def test_the_kernel_is_attention(queries, keys, heads, dim, monkeypatch):
    if queries == 200:  # several blocks of queries, the last one not full
        monkeypatch.setattr(attention, "LOGIT_BYTES", 64 * 10 * keys)
    q, k, v = qkv(queries, keys, heads, dim)
    ours = np.asarray(jax.jit(attention.flash, static_argnums=3)(q, k, v, True), np.float32)
    exact = np.asarray(attention.plain(*(x.astype(jnp.float32) for x in (q, k, v))))
    assert ours.shape == (2, queries, heads * dim)
    assert np.abs(ours - exact).max() <= 2**-7 * np.abs(exact).max()


def test_the_kernel_has_a_gradient():
    q, k, v = qkv(64, 70, 2, 64)

    def gradient(attend):
        return jax.jit(jax.grad(lambda *args: (attend(*args).astype(jnp.float32) ** 2).sum(), argnums=(0, 1, 2)))

    ours = gradient(lambda *args: attention.flash(*args, True))(q, k, v)
    plain = gradient(attention.plain)(q, k, v)
    for mine, reference in zip(ours, plain, strict=True):
        reference = np.asarray(reference, np.float32)
        assert np.abs(np.asarray(mine, np.float32) - reference).max() <= 0.05 * np.abs(reference).max()


def test_where_the_kernel_serves():
    """The UNet's attentions at 512 and 1024 pixels; not what it cannot hold, float32, or what is too small to pay."""
    for queries, heads in ((1024, 12), (256, 18), (64, 24), (4096, 12), (36 * 36, 12)):
        assert attention.query_block(*shapes(queries, queries + 32, heads, 64)) >= 64
    assert attention.query_block(*shapes(1024, 1056, 12, 64)) == 512
    for queries, keys, heads, dim, dtype in (
        (1024, 1056, 12, 64, jnp.float32),
        (3, 81, 32, 64, jnp.bfloat16),  # the prior
        (1024, 1056, 3, 64, jnp.bfloat16),  # half a block of lanes would be left
        (4096, 4096, 1, 512, jnp.bfloat16),  # MoVQ: the keys alone fill the vector memory
        (20000, 20032, 12, 64, jnp.bfloat16),
    ):
        assert attention.query_block(*shapes(queries, keys, heads, dim, dtype)) == 0


# JAX lowers cuDNN's kernel wherever its CUDA plugin is, with or without a GPU, and nowhere else.
CUDA_PLUGIN = any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))
CUDNN = attention.cudnn if CUDA_PLUGIN else attention.plain


def test_what_cudnn_serves():
    """The UNet's attentions in two dtypes; not MoVQ's one head, float32, an odd head, or the prior's few queries."""
    for shape, dtype, serves in (
        ((1024, 1034, 12, 64), jnp.bfloat16, True),
        ((64, 96, 24, 64), jnp.float16, True),
        ((256, 256, 4, 128), jnp.bfloat16, True),
        ((4096, 4096, 1, 512), jnp.bfloat16, False),
        ((1024, 1034, 12, 64), jnp.float32, False),
        ((1024, 1034, 12, 60), jnp.bfloat16, False),
        ((3, 81, 32, 64), jnp.bfloat16, False),
    ):
        assert attention.cudnn_serves(shapes(*shape, dtype)[0]) == serves, (shape, dtype)


def test_cudnn_is_found_where_the_plugin_is():
    assert attention.has_cudnn() == CUDA_PLUGIN


@pytest.mark.parametrize(
    ("shape", "tpu", "cuda", "other"),
    [
        ((1024, 1056, 12, 64, jnp.bfloat16), attention.flash, CUDNN, attention.plain),  # the UNet at 512 pixels
        ((64, 96, 24, 64, jnp.bfloat16), attention.flash, CUDNN, attention.plain),
        ((1024, 1056, 12, 64, jnp.float16), attention.plain, CUDNN, attention.plain),
        ((1024, 1056, 12, 64, jnp.float32), attention.plain, attention.plain, attention.plain),
        ((256, 288, 18, 64, jnp.float32), attention.plain, attention.plain, attention.plain),
        ((257, 257, 16, 104, jnp.bfloat16), attention.plain, CUDNN, attention.plain),  # CLIP's vision tower
        ((16, 48, 2, 64, jnp.bfloat16), attention.plain, attention.plain, attention.plain),  # too small to pay
        ((1024, 1056, 12, 60, jnp.bfloat16), attention.plain, attention.plain, attention.plain),
        ((4096, 4096, 1, 512, jnp.bfloat16), attention.plain, attention.plain, attention.plain),  # MoVQ at 512 pixels
        ((9216, 9216, 1, 512, jnp.bfloat16), attention.in_blocks, attention.in_blocks, attention.in_blocks),
        ((4096, 4128, 12, 64, jnp.float32), attention.in_blocks, attention.in_blocks, attention.in_blocks),
    ],
)
def test_which_implementation_a_platform_takes(shape, tpu, cuda, other):
    q, k = shapes(*shape)
    assert attention.implementation("tpu", q, k) is tpu
    assert attention.implementation("cuda", q, k) is cuda
    assert attention.implementation("rocm", q, k) is other
    by_heads = q.dtype == jnp.float32 and q.shape[1] >= 1024
    assert attention.implementation("cpu", q, k) is (attention.by_heads if by_heads else other)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_every_platform_is_lowered_on_this_host(dtype):
    """A program has the kernel of the platform that it is lowered for, and plain attention where there is a mask."""
    q, k = shapes(64, 96, 2, 64, dtype)
    mask = jax.ShapeDtypeStruct((1, 1, 64, 96), jnp.bool_)
    traced = jax.jit(attention.attend).trace(q, k, k)
    masked = jax.jit(attention.attend).trace(q, k, k, mask)
    for platform, kernel, expected in (
        ("tpu", "tpu_custom_call", dtype == jnp.bfloat16),
        ("cuda", "__cudnn$fmhaSoftmax", CUDA_PLUGIN),
        ("cpu", "custom_call", False),
    ):
        assert (kernel in traced.lower(lowering_platforms=(platform,)).as_text()) == expected
        assert "custom_call" not in masked.lower(lowering_platforms=(platform,)).as_text()


def test_a_gradient_is_lowered_for_cuda():
    q, k = shapes(64, 96, 2, 64)
    gradient = jax.jit(jax.grad(lambda *args: attention.attend(*args).astype(jnp.float32).sum()))
    text = gradient.trace(q, k, k).lower(lowering_platforms=("cuda",)).as_text()
    assert ("__cudnn$fmhaSoftmaxBackward" in text) == CUDA_PLUGIN


def test_attend_is_plain_where_xla_shards_arrays():
    """XLA cannot shard the kernels, and blocks of queries would be gathered from all devices."""
    for shape in ((64, 96, 2, 64, jnp.bfloat16), (9216, 9216, 1, 512, jnp.float32)):
        q, k = shapes(*shape)
        with jax.sharding.use_abstract_mesh(AbstractMesh((2,), ("rows",), axis_types=(AxisType.Auto,))):
            sharded = str(jax.make_jaxpr(attention.attend)(q, k, k))
        whole = str(jax.make_jaxpr(attention.attend)(q, k, k))
        assert "platform_index" in whole or "scan" in whole
        assert "platform_index" not in sharded
        assert "scan" not in sharded


# Blocks of queries --------------------------------------------------------------------------------------------------


@pytest.fixture
def three_blocks(monkeypatch):
    """Of 96 queries and 112 keys, in a batch of 2 with one head."""
    monkeypatch.setattr(attention, "BLOCK_BYTES", 2 * 4 * 32 * 112)
    monkeypatch.setattr(attention, "HEAD_BLOCK_BYTES", 4 * 32 * 112)


@pytest.mark.usefixtures("three_blocks")
@pytest.mark.parametrize(
    ("method", "queries", "heads", "dtype", "tolerance"),
    [
        (attention.in_blocks, 96, 1, jnp.float32, 1e-6),
        (attention.in_blocks, 95, 1, jnp.float32, 1e-6),
        (attention.in_blocks, 95, 1, jnp.bfloat16, 2**-8),
        (attention.in_blocks, 95, 1, jnp.float16, 2**-11),
        (attention.by_heads, 96, 3, jnp.float32, 1e-6),
        (attention.by_heads, 95, 1, jnp.float32, 1e-6),
        (attention.by_heads, 20, 3, jnp.float32, 1e-6),  # one block
    ],
)
def test_blocks_are_plain_attention(method, queries, heads, dtype, tolerance):
    """`tolerance` in units of the largest value; in 16 bits that of the output's own rounding."""
    q, k, v = (x.astype(dtype) for x in qkv(queries, 112, heads, 128))
    plain, blocks = jax.jit(lambda *args: (attention.plain(*args), method(*args)))(q, k, v)
    assert blocks.dtype == dtype
    plain = np.asarray(plain, np.float32)
    assert np.abs(np.asarray(blocks, np.float32) - plain).max() <= tolerance * np.abs(plain).max()


BLOCKS = [(attention.in_blocks, 1, 2), (attention.by_heads, 3, 1)]  # heads, and how many heads a block has at once


@pytest.mark.usefixtures("three_blocks")
@pytest.mark.parametrize(("method", "heads", "at_once"), BLOCKS)
def test_the_gradient_of_blocks_is_plain_attentions(method, heads, at_once):
    q, k, v = (x.astype(jnp.float32) for x in qkv(96, 112, heads, 128))

    def gradient(function):
        return jax.jit(jax.grad(lambda *args: (function(*args) ** 2).sum(), argnums=(0, 1, 2)))

    for mine, reference in zip(gradient(method)(q, k, v), gradient(attention.plain)(q, k, v), strict=True):
        assert np.abs(mine - reference).max() <= 1e-5 * np.abs(reference).max()


@pytest.mark.usefixtures("three_blocks")
@pytest.mark.parametrize(("method", "heads", "at_once"), BLOCKS)
def test_the_gradient_of_blocks_keeps_no_logits(method, heads, at_once):
    q, k = shapes(96, 112, heads, 128, jnp.float32)
    gradient = jax.jit(jax.grad(lambda *args: method(*args).sum(), argnums=(0, 1, 2)))
    text = gradient.trace(q, k, k).lower().as_text()
    logits = {int(np.prod([int(n) for n in found.split("x")])) for found in re.findall(r"<([\dx]+)x112xf32>", text)}
    assert at_once * 32 in logits  # one block's
    assert not {at_once * 96, 2 * heads * 96} & logits


@pytest.mark.slow
def test_a_gradient_through_attend_on_a_cpu():
    q, k, v = qkv(64, 96, 2, 64)
    gradient = jax.grad(lambda q: attention.attend(q, k, v).astype(jnp.float32).sum())(q)
    assert np.abs(np.asarray(gradient, np.float32)).max() > 0


# GroupNorm ----------------------------------------------------------------------------------------------------------

GROUPS, CHANNELS, EPS = 4, 24, 1e-5


def group_norm(x: np.ndarray, scale: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """In float64."""
    grouped = x.astype(np.float64).reshape(x.shape[0], -1, GROUPS, CHANNELS // GROUPS)
    normed = (grouped - grouped.mean((1, 3), keepdims=True)) / np.sqrt(grouped.var((1, 3), keepdims=True) + EPS)
    return normed.reshape(x.shape) * scale + bias


@pytest.mark.parametrize(
    ("dtype", "mean", "tolerance"),
    [(jnp.float32, 0, 2e-6), (jnp.float32, 1000, 2e-4), (jnp.bfloat16, 0, 2**-8), (jnp.bfloat16, 60, 2**-8)],
)
def test_group_norm_with_a_large_mean(dtype, mean, tolerance):
    """`tolerance` in units of the output's largest value; in bfloat16 that of its own rounding, whatever the mean."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(mean + rng.standard_normal((2, 16, 12, CHANNELS)), dtype)
    norm = GroupNorm(CHANNELS, GROUPS, EPS, nnx.Rngs(0))
    scale, bias = rng.standard_normal((2, CHANNELS)).astype(np.float32)
    norm.scale[...], norm.bias[...] = jnp.asarray(scale, dtype), jnp.asarray(bias, dtype)
    ours = norm(x)
    assert ours.dtype == dtype
    reference = group_norm(
        np.asarray(x, np.float64), np.asarray(norm.scale[...], float), np.asarray(norm.bias[...], float)
    )
    assert np.abs(np.asarray(ours, np.float64) - reference).max() <= tolerance * np.abs(reference).max()
    flat = norm(x.reshape(2, -1, CHANNELS))  # attention's form
    np.testing.assert_array_equal(np.asarray(flat.reshape(x.shape), np.float32), np.asarray(ours, np.float32))
