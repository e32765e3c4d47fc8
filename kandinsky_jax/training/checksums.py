"""Checksums of arrays: of their bytes on the host, and of sharded arrays on their devices."""

from __future__ import annotations

import functools
import zlib
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from kandinsky_jax.common.types import PyTree
from kandinsky_jax.parallel.hosts import Hosts

SPREAD = 0x9E3779B1  # an odd factor whose bits are well spread (Knuth's multiplicative hashing)
MIXING = ((16, 0x85EBCA6B), (13, 0xC2B2AE35))  # of MurmurHash3's finalizer, a bijection of 32 bits


def checksums(tree: PyTree) -> dict[str, int]:
    """Compute CRC-32 of each leaf's bytes, dtype and shape, by path; the leaves are copied to the host."""
    leaves = _named(tree)
    with ThreadPoolExecutor() as pool:  # zlib releases the GIL
        return dict(zip(leaves, pool.map(_checksum, leaves.values()), strict=True))


def sharded_checksums(tree: PyTree, hosts: Hosts) -> dict[str, str]:
    """Compute a checksum of each leaf where its shards are, by path; collective.

    It is a sum modulo 2**32 of a hash of each element and its position in the whole array. So it is the same for every
    sharding; any single changed element changes it, and any other damage does with a probability of 1 - 2**-32. Each
    process adds up the shards of its devices, and processes exchange sums only.

    Returns:
        dtype, shape and sum, such as "float32[4, 2]:0badcafe".
    """
    leaves = {name: leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf) for name, leaf in _named(tree).items()}
    parts = jax.device_get(
        [
            # An array that is no global one is in every process, and counts once.
            [] if leaf.is_fully_addressable and not hosts.first else _sums_of_shards(leaf)
            for leaf in leaves.values()
        ]
    )
    mine = np.array([sum(int(part) for part in of_leaf) % 2**32 for of_leaf in parts], np.uint32)
    sums = hosts.stack(mine).astype(np.uint64).sum(0) % 2**32
    return {
        name: f"{leaf.dtype}{list(leaf.shape)}:{int(value):08x}"
        for (name, leaf), value in zip(leaves.items(), sums, strict=True)
    }


def _sums_of_shards(leaf: jax.Array) -> list[jax.Array]:
    """Return the sums of this process's shards, each element's in one process only."""
    strides = [int(np.prod(leaf.shape[axis + 1 :], dtype=np.int64)) for axis in range(leaf.ndim)]
    sums = []
    for shard in leaf.addressable_shards:
        if shard.replica_id == 0:
            starts = [index.indices(side)[0] for index, side in zip(shard.index, leaf.shape, strict=True)]
            offset = sum(start * stride for start, stride in zip(starts, strides, strict=True))
            sums.append(_sum_of_hashes(shard.data, np.uint32(offset % 2**32), tuple(strides)))
    return sums


@functools.partial(jax.jit, static_argnums=2)
def _sum_of_hashes(data: jax.Array, offset: jax.Array, strides: tuple[int, ...]) -> jax.Array:
    """Return the sum of the hashes of a shard's elements, uint32.

    Args:
        data: the shard.
        offset: position of its first element in the whole array, modulo 2**32.
        strides: of the whole array, in elements.
    """
    kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[data.dtype.itemsize]
    bits = data if data.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(data, kind)
    position = jnp.full(data.shape, offset, jnp.uint32)
    for axis, stride in enumerate(strides):
        position += jax.lax.broadcasted_iota(jnp.uint32, data.shape, axis) * jnp.uint32(stride % 2**32)
    mixed = bits.astype(jnp.uint32) + (position + 1) * jnp.uint32(SPREAD)
    for shift, factor in MIXING:
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)


def _named(tree: PyTree) -> dict[str, jax.Array]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _checksum(leaf: jax.Array) -> int:
    array = np.asarray(leaf)
    kind = zlib.crc32(f"{array.dtype}{array.shape}".encode())
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, kind)
