"""Compiled calls of one network's methods, on one device or a mesh."""

from __future__ import annotations

import functools
from typing import Any

import jax

from kandinsky_jax.compilation import program
from kandinsky_jax.diffusion import (
    Network,
    Params,
    matmul_precision,
)
from kandinsky_jax.parallel.sharding import REPLICATED, batch_specs, shard_batch, sharded


def call(network: Network, params: Params, *args: Any, method: str = "__call__") -> Any:
    """Run one method of a network on arrays `[B, ...]`, compiled once per structure and shapes."""
    if network.mesh is None:
        return _run(network, params, *args, method=method)
    images = len(jax.tree.leaves(args)[0])
    whole = shard_batch(network.mesh, _run(network, params, *shard_batch(network.mesh, args), method=method))
    return _first_rows(whole, images) if images % network.devices else whole


def condition(network: Network, params: Params, *args: Any) -> Any:
    """A network's `condition` for the examples of a loop.

    Args:
        args: arrays `[G, B, ...]`; G is 2 with guidance, uncond before cond, and 1 without.
    Returns:
        the condition, `[G, B, ...]` too; on a mesh, B is what an uneven batch is filled up to.
    """
    args = shard_guidance(network, args)
    return shard_guidance(network, _run(network, params, *args, method="condition", guidance_axis=True))


def shard_guidance(network: Network, tree: Any) -> Any:
    """Arrays `[G, B, ...]` where a network wants them.

    What a program over a mesh gives is there already; a rehearsal's zeros are not, and the next program depends on it.
    """
    return tree if network.mesh is None else shard_batch(network.mesh, tree, 1, guidance_axis=True, pictures=False)


@program(static_argnames=("network", "method", "guidance_axis"))
def _run(network: Network, params: Params, *args: Any, method: str, guidance_axis: bool = False) -> Any:
    axis, widest = int(guidance_axis), max(jax.tree.leaves(args), key=lambda leaf: leaf.shape[0])

    def local(params: Params, *args: Any) -> Any:
        with matmul_precision(params):
            output = getattr(network.bind(params), method)(*(_flat(args) if guidance_axis else args))
        if not guidance_axis:
            return output
        count = max(leaf.shape[0] for leaf in jax.tree.leaves(args))
        return jax.tree.map(lambda leaf: leaf.reshape(count, -1, *leaf.shape[1:]), output)

    each, out = (batch_specs(network.mesh, tree, axis, guidance_axis) for tree in (list(args), widest))
    return sharded(network.mesh, local, (REPLICATED, *each), out)(params, *args)


def _flat(tree: Any) -> Any:
    """`[G, B, ...]` as `[G * B, ...]`, what a network takes."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), tree)


@functools.partial(jax.jit, static_argnames="images")
def _first_rows(tree: Any, images: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[:images], tree)
