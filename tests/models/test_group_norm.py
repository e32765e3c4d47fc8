"""GroupNorm's sums, in parts on GPUs and of whole groups elsewhere, give the same statistics."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kandinsky_jax.models.layers import GroupNorm, reduction_parts


@pytest.mark.parametrize(
    ("shape", "parts"),
    [
        ((2, 4096, 384), 16),
        ((32, 4096, 384), 4),
        ((2, 64, 1536), 2),
        ((32, 64, 1536), 1),  # enough blocks
        ((2, 12288, 384), 1),  # XLA splits it
        ((2, 99, 384), 1),  # odd
    ],
)
def test_parts_of_a_sum(shape, parts):
    assert reduction_parts(*shape) == parts


@pytest.mark.parametrize("shape", [(2, 16, 16, 64), (3, 8, 12, 128), (2, 256, 64)])
def test_sums_in_parts_are_the_sums(shape):
    norm = GroupNorm(shape[-1], 32, 1e-5, nnx.Rngs(0))
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32) + 0.5
    assert reduction_parts(shape[0], int(np.prod(shape[1:-1])), shape[-1]) > 1
    for whole, split in zip(norm._means(x), norm._means_by_parts(jnp.asarray(x)), strict=True):
        assert whole.shape == split.shape == (shape[0], 32)
        assert np.allclose(whole, split, rtol=1e-5, atol=1e-6)


def test_only_gpus_take_parts():
    norm = GroupNorm(64, 32, 1e-5, nnx.Rngs(0))
    program = jax.jit(lambda x: norm(x)).trace(jax.ShapeDtypeStruct((2, 16, 16, 64), jnp.bfloat16))
    parts = "tensor<2x8x32x64xf32>"  # [B, parts, positions, C]
    assert parts in program.lower(lowering_platforms=("cuda",)).as_text()
    assert parts not in program.lower(lowering_platforms=("cpu",)).as_text()
    assert parts not in program.lower(lowering_platforms=("tpu",)).as_text()
