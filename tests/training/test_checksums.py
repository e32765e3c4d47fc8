"""Checksums of sharded arrays: independent of the sharding, and changed by any changed element."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kandinsky_jax.parallel.hosts import Hosts
from kandinsky_jax.training.checksums import _sum_of_hashes, sharded_checksums

DTYPES = ("float32", "bfloat16", "int32", "uint8", "bool")


def arrays(dtype: str) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).integers(0, 2, (6, 5, 4)) * 3.7, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_changed_element_changes_it(dtype):
    array = arrays(dtype)
    before = sharded_checksums({"a": array}, Hosts())
    seen = {before["['a']"]}
    for index in np.ndindex(array.shape):
        other = ~array[index] if dtype == "bool" else array[index] + 1
        seen |= set(sharded_checksums({"a": array.at[index].set(other)}, Hosts()).values())
    assert len(seen) == 1 + array.size


def test_the_order_and_the_shape_count():
    array = jnp.arange(24.0)
    kinds = (array, array[::-1], array.reshape(4, 6), array.reshape(6, 4), jnp.asarray(array, jnp.int32))
    assert len({sharded_checksums({"a": each}, Hosts())["['a']"] for each in kinds}) == len(kinds)
    assert sharded_checksums({"a": jnp.float32(3)}, Hosts()) == sharded_checksums({"a": np.float32(3)}, Hosts())


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("dtype", DTYPES)
def test_shards_add_up_to_the_whole(dtype, axis):
    """The sums of parts, each with its offset in the whole array."""
    array = arrays(dtype)
    strides = (20, 4, 1)
    middle = array.shape[axis] // 2
    first, second = (
        jax.lax.slice_in_dim(array, *ends, axis=axis) for ends in ((0, middle), (middle, array.shape[axis]))
    )
    sums = [
        _sum_of_hashes(first, np.uint32(0), strides),
        _sum_of_hashes(second, np.uint32(middle * strides[axis]), strides),
    ]
    whole = sharded_checksums({"a": array}, Hosts())["['a']"]
    assert f"{sum(map(int, sums)) % 2**32:08x}" == whole.partition(":")[2]
