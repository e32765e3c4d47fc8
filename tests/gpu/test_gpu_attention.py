"""cuDNN's attention on a GPU: its results, and its speed compared with the others.

    pytest -m gpu -n 0 -s tests/gpu

Under a minute; the times are printed at the end of the run, under "measured".
"""

from __future__ import annotations

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kandinsky_jax.models import attention
from tests.conftest import note

pytestmark = pytest.mark.gpu

HEADS = {4096: 12, 1024: 12, 256: 18, 64: 24}  # by queries: the UNet at 512 pixels, and the first of 1024 pixels
IMAGE_TOKENS = 32
TOLERANCE = {jnp.bfloat16: 2**-7, jnp.float16: 2**-10}  # of the largest value


def qkv(batch: int, queries: int, keys: int, heads: int, dim: int, dtype) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    shapes = [(batch, length, heads, dim) for length in (queries, keys, keys)]
    return [jnp.asarray(rng.standard_normal(shape, np.float32), dtype) for shape in shapes]


def unet_qkv(queries: int, dtype, batch: int = 2) -> list[jax.Array]:
    return qkv(batch, queries, queries + IMAGE_TOKENS, HEADS[queries], 64, dtype)


@functools.partial(jax.jit, static_argnums=0)
def gradients(function, q, k, v, weights):
    """Of a weighted sum of the output, in float32."""
    return jax.grad(lambda *args: (function(*args).astype(jnp.float32) * weights).sum(), argnums=(0, 1, 2))(q, k, v)


def close(found: jax.Array, exact: jax.Array, tolerance: float) -> bool:
    error = jnp.abs(found.astype(jnp.float32) - exact).max() / jnp.abs(exact).max()
    return note(float(error), f"{found.dtype}, max|d| / max") <= tolerance


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("queries", HEADS)
def test_cudnn_is_attention(queries, dtype):
    q, k, v = unet_qkv(queries, dtype)
    with jax.default_matmul_precision("highest"):
        exact = jax.jit(attention.plain)(*(x.astype(jnp.float32) for x in (q, k, v)))
    assert close(jax.jit(attention.cudnn)(q, k, v), exact, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("queries", [1024, 64])
def test_cudnn_has_attentions_gradient(queries, dtype):
    q, k, v = unet_qkv(queries, dtype)
    weights = jax.random.normal(jax.random.key(1), (2, queries, HEADS[queries] * 64))
    with jax.default_matmul_precision("highest"):
        exact = gradients(attention.plain, *(x.astype(jnp.float32) for x in (q, k, v)), weights)
    for found, reference in zip(gradients(attention.attend, q, k, v, weights), exact, strict=True):
        assert close(found, reference, 4 * TOLERANCE[dtype])


def test_attend_takes_cudnn():
    assert attention.has_cudnn()
    q, k, v = unet_qkv(256, jnp.bfloat16)
    text = jax.jit(attention.attend).lower(q, k, v).compile().as_text()
    assert "__cudnn$fmhaSoftmax" in text


def milliseconds(function, *arrays: jax.Array, runs: int = 20) -> float:
    """Of one call, the mean of `runs` in a row, without compiling."""
    jitted = jax.jit(function)
    jax.block_until_ready(jitted(*arrays))
    began = time.perf_counter()
    for _ in range(runs):
        out = jitted(*arrays)
    jax.block_until_ready(out)
    return (time.perf_counter() - began) / runs * 1000


def candidates() -> dict[str, attention.Attention]:
    """The implementations by name; tokamax's where it is installed."""
    found = {"plain": attention.plain, "cudnn": attention.cudnn}
    try:
        import tokamax
    except ImportError:
        return found
    for name in ("triton", "mosaic"):
        found[f"tokamax {name}"] = functools.partial(tokamax.dot_product_attention, implementation=name)
    return found


@pytest.mark.parametrize("queries", HEADS)
def test_time_of_the_unets_attention(queries):
    """Batch 32: 16 pictures with guidance. 1024 pixels: 4."""
    batch = 8 if queries == 4096 else 32
    q, k, v = unet_qkv(queries, jnp.bfloat16, batch)
    times = {}
    for name, function in candidates().items():
        times[name] = note(milliseconds(function, q, k, v), f"{name}, {queries} queries, batch {batch}, ms")
        print(f"{name}: {times[name]:.3f} ms")
    assert times["cudnn"] < times["plain"]


@pytest.mark.parametrize(("side", "batch"), [(64, 16), (96, 4)])
def test_time_of_movqs_attention_in_blocks(side, batch, monkeypatch):
    """What `BLOCK_BYTES` should be; the rule must not cost more than a fifth."""
    q, k, v = qkv(batch, side**2, side**2, 1, 512, jnp.bfloat16)
    whole = note(milliseconds(attention.plain, q, k, v), f"plain, {side} x {side}, batch {batch}, ms")
    rule = attention.BLOCK_BYTES
    for size in (2**25, 2**27, rule, 2**29):
        monkeypatch.setattr(attention, "BLOCK_BYTES", size)
        in_blocks = lambda *args: attention.in_blocks(*args)  # noqa: E731  a new function, to be traced anew
        found = note(milliseconds(in_blocks, q, k, v), f"{size >> 20} MiB blocks, {side} x {side}, batch {batch}, ms")
        assert size != rule or found <= 1.2 * whole


def test_blocks_are_plain_attention_on_a_gpu():
    q, k, v = qkv(2, 96 * 96, 96 * 96, 1, 512, jnp.bfloat16)
    assert attention.implementation("cuda", q, k) is attention.in_blocks
    plain = np.asarray(jax.jit(attention.plain)(q, k, v), np.float32)
    blocks = np.asarray(jax.jit(attention.attend)(q, k, v), np.float32)
    assert np.abs(blocks - plain).max() <= 2**-7 * np.abs(plain).max()
