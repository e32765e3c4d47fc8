"""Layers whose weights stay sharded while a training step runs.

Within a `shard_map`, each device of the axis `fsdp` has its own examples and a shard of every weight. A layer's weight
can be gathered, or stay where it is, and activations are exchanged: each device then multiplies the activations of all
these examples with its shard ("weight-gathered" and "weight-stationary", Pope et al. 2022, arXiv 2211.05102, section
3.2). In layers of many channels and few pixels the activations are smaller, and the gradient of the weight is complete
without another exchange.
"""

from __future__ import annotations

import collections
import contextvars
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from kandinsky_jax.common.types import PyTree
from kandinsky_jax.parallel.sharding import REPLICATED

FSDP_AXIS = "fsdp"
# Of what the forward pass has exchanged, for policies of `jax.checkpoint`: what is stored is not exchanged again.
EXCHANGED = "exchanged"


class InOut(NamedTuple):
    """The axes of a weight, or their sizes."""

    inputs: int
    outputs: int


class Product(NamedTuple):
    """What a layer multiplies with its weight, and the result: numbers of elements."""

    axes: InOut
    inputs: int
    outputs: int


_note: contextvars.ContextVar[Callable[[jax.Array, Product], None] | None] = contextvars.ContextVar(
    "note", default=None
)


def multiply(
    function: Callable[[jax.Array, jax.Array], jax.Array],
    x: jax.Array,
    weight: jax.Array,
    axes: InOut,
    features: InOut,
) -> jax.Array:
    """Return `function(x, weight)` for a whole weight, and for this device's shard of it.

    Args:
        function: (x `[B, ..., in]`, weight) -> `[B, ..., out]`, linear in both; each example by itself.
        x: of this device's examples, `[B, ..., in]`.
        weight: whole, or a shard along its inputs or its outputs.
        features: sizes of the whole weight.
    """
    last = x.ndim - 1
    if weight.shape[axes.inputs] < features.inputs:
        mine = _exchanged(jax.lax.all_to_all(x, FSDP_AXIS, last, 0, tiled=True))  # [N, ..., shard of in], N of all
        return _exchanged(jax.lax.psum_scatter(function(mine, weight), FSDP_AXIS, scatter_dimension=0, tiled=True))
    if weight.shape[axes.outputs] < features.outputs:
        every = _exchanged(jax.lax.all_gather(x, FSDP_AXIS, axis=0, tiled=True))  # [N, ..., in]
        return _exchanged(jax.lax.all_to_all(function(every, weight), FSDP_AXIS, 0, last, tiled=True))
    y = function(x, weight)
    if (note := _note.get()) is not None:
        note(weight, Product(axes, x.size, y.size))
    return y


def _exchanged(x: jax.Array) -> jax.Array:
    return checkpoint_name(x, EXCHANGED)


def products(loss: Callable[..., jax.Array], params: PyTree, *args: PyTree) -> list[list[Product]]:
    """Return what is multiplied with each parameter of a loss by `multiply`, in the order of `jax.tree.leaves`.

    Nothing for parameters that the loss uses in other ways too, which need them whole.

    Args:
        loss: (params, *args) -> scalar.
        params, args: arrays or their shapes; nothing is computed.
    """
    found: list[list[Product]] = [[] for _ in jax.tree.leaves(params)]

    def noting(params: PyTree, *args: PyTree) -> jax.Array:
        places = {id(leaf): place for leaf, place in zip(jax.tree.leaves(params), found, strict=True)}

        def note(weight: jax.Array, product: Product) -> None:
            if id(weight) in places:
                places[id(weight)].append(product)

        token = _note.set(note)
        try:
            return loss(params, *args)
        finally:
            _note.reset(token)

    traced = jax.make_jaxpr(noting)(params, *args).jaxpr
    uses = collections.Counter(id(operand) for equation in traced.eqns for operand in equation.invars)
    operands = traced.invars[: len(found)]
    return [mine if uses[id(operand)] == len(mine) else [] for operand, mine in zip(operands, found, strict=True)]


def stays(size: int, axis: int, uses: Sequence[Product], shards: int) -> bool:
    """Whether a weight stays sharded: whether a device then sends less than half of what gathering it would send.

    Both for the forward and the backward pass; by ring algorithms, in elements. Half, because there are twice as many
    exchanges.

    Args:
        size: of the whole weight.
        axis: that is sharded.
        uses: of the weight, for one device's examples.
        shards: of the weight.
    """
    sent = 0.0
    for axes, inputs, outputs in uses:
        if axis not in axes:
            return False
        whole, shuffled = (outputs, inputs) if axis == axes.inputs else (inputs, outputs)
        sent += (shards - 1) * whole + (shards - 1) / shards * shuffled
    return bool(uses) and sent < (shards - 1) / shards * size / 2


def to_gather(loss: Callable[..., jax.Array], params: PyTree, specs: PyTree, shards: int, *args: PyTree) -> PyTree:
    """Return the specs of the weights that have to be gathered; those that stay sharded get an empty one.

    Args:
        loss: (params, *args) -> scalar, of one device's examples.
        params: whole arrays, or their shapes.
        specs: PartitionSpecs of the parameters, with one sharded axis at most.
        shards: of a weight.
        args: arrays or their shapes.
    """
    uses = iter(products(loss, params, *args))

    def of(leaf: jax.Array, spec: PartitionSpec) -> PartitionSpec:
        mine = next(uses)
        sharded = [axis for axis, part in enumerate(spec) if part is not None]
        return REPLICATED if sharded and stays(leaf.size, sharded[0], mine, shards) else spec

    return jax.tree.map(of, params, specs)
