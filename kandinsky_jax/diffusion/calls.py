"""Compiled calls of one network's methods, on one device or a mesh."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from kandinsky_jax.common.types import Params, PyTree
from kandinsky_jax.compilation import program
from kandinsky_jax.diffusion.network import Network, matmul_precision
from kandinsky_jax.parallel.mesh import GUIDANCE_AXIS
from kandinsky_jax.parallel.sharding import REPLICATED, batch_specs, shard_batch, sharded

Arrays = Mapping[str, jax.Array]


def call(network: Network, params: Params, *args: PyTree, method: str = "__call__") -> PyTree:
    """Run one method of a network on arrays `[B, ...]`, compiled once per structure and shapes."""
    if network.mesh is None:
        return _call(network, params, *args, method=method)
    images = len(jax.tree.leaves(args)[0])
    whole = shard_batch(network.mesh, _call(network, params, *shard_batch(network.mesh, args), method=method))
    return _first_rows(whole, images) if images % network.devices else whole


@program(static_argnames=("network", "method"))
def _call(network: Network, params: Params, *args: PyTree, method: str) -> PyTree:
    def local(params: Params, *args: PyTree) -> PyTree:
        with matmul_precision(params):
            return getattr(network.bind(params), method)(*args)

    each = [batch_specs(network.mesh, tree) for tree in args]
    out = batch_specs(network.mesh, max(jax.tree.leaves(args), key=lambda leaf: leaf.shape[0]))
    return sharded(network.mesh, local, (REPLICATED, *each), out)(params, *args)


@functools.partial(jax.jit, static_argnames="images")
def _first_rows(tree: PyTree, images: int) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[:images], tree)


def condition(
    network: Network,
    params: Params,
    cond: Arrays,
    uncond: Arrays | None = None,
    shared: Arrays | None = None,
    method: str = "condition",
) -> tuple[PyTree, PyTree]:
    """Run a network's `condition` for the examples of a loop.

    Args:
        cond, uncond: its arguments by name, arrays `[B, ...]`; uncond is None where guidance is off.
        shared: further arguments, the same for both.
        method: of the network, in the place of `condition`.
    Returns:
        the conditions for cond and for uncond, None without it; arrays `[B, ...]`. On a mesh, B is what an uneven batch
        is padded to.
    """
    args = shard_condition(network, (dict(cond), None if uncond is None else dict(uncond), dict(shared or {})))
    return shard_condition(network, _condition(network, params, *args, method=method))


def shard_condition(network: Network, tree: PyTree) -> PyTree:
    """Shard arrays `[B, ...]` over a network's mesh.

    What a program over a mesh returns is sharded already; a rehearsal's zeros are not, and the next program depends on
    it.
    """
    return tree if network.mesh is None else shard_batch(network.mesh, tree, pictures=False)


@program(static_argnames=("network", "method"))
def _condition(
    network: Network,
    params: Params,
    cond: Arrays,
    uncond: Arrays | None,
    shared: Arrays,
    method: str = "condition",
) -> tuple[PyTree, PyTree]:
    exchanged = uncond is not None and exchanges_guidance(network.mesh)

    def local(params: Params, cond: Arrays, uncond: Arrays | None, shared: Arrays) -> tuple[PyTree, PyTree]:
        compute = getattr(network.bind(params), method)
        with matmul_precision(params):
            if uncond is None:
                return compute(**cond, **shared), None
            if exchanged:  # each device computes the one that it will evaluate
                both = jax.lax.all_gather(compute(**own_condition(cond, uncond), **shared), GUIDANCE_AXIS)
                return jax.tree.map(lambda x: x[1], both), jax.tree.map(lambda x: x[0], both)
            joined = jax.tree.map(lambda *x: jnp.concatenate(x), uncond, cond)
            both = compute(**joined, **shared)  # [2B, ...]
        images = len(next(iter(cond.values())))
        return jax.tree.map(lambda x: x[images:], both), jax.tree.map(lambda x: x[:images], both)

    each = [batch_specs(network.mesh, tree) for tree in (cond, uncond, shared)]
    out = batch_specs(network.mesh, next(iter(cond.values())))
    return sharded(network.mesh, local, (REPLICATED, *each), out)(params, cond, uncond, shared)


def exchanges_guidance(mesh: jax.sharding.Mesh | None) -> bool:
    """Whether cond and uncond are evaluated on a device each, which exchange their predictions."""
    return mesh is not None and mesh.shape[GUIDANCE_AXIS] == 2


def own_condition(cond: PyTree, uncond: PyTree) -> PyTree:
    """Choose what a device of the `guidance` axis evaluates, within `sharded`: the first one uncond, the other cond."""
    first = jax.lax.axis_index(GUIDANCE_AXIS) == 0
    return jax.tree.map(lambda x, y: jnp.where(first, y, x), cond, uncond)
