"""Layers whose weights stay sharded: results and gradients are those of whole weights, and what is chosen pays."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from kandinsky_jax.models.convolution import Conv
from kandinsky_jax.models.layers import Linear
from kandinsky_jax.parallel.sharding import REPLICATED
from kandinsky_jax.parallel.stationary import FSDP_AXIS, InOut, Product, products, stays, to_gather

DEVICES = 4
LAYERS = {
    "linear": (Linear(16, 24, bias=True, rngs=nnx.Rngs(0)), "weight", (8, 16)),
    "linear of tokens": (Linear(16, 24, bias=False, rngs=nnx.Rngs(1)), "weight", (8, 3, 16)),
    "convolution": (Conv(16, 24, (3, 3), padding=1, rngs=nnx.Rngs(2)), "kernel", (8, 6, 4, 16)),
}
AXES = {"weight": InOut(inputs=1, outputs=0), "kernel": InOut(inputs=2, outputs=3)}


def loss_of(layer, weight_name):
    """A loss by the weight and the input, whose gradients depend on every output."""

    def loss(weight, x):
        graph, state = nnx.split(layer)
        state[weight_name] = nnx.Param(weight)
        return jnp.sum(jnp.sin(nnx.merge(graph, state)(x) + jnp.arange(24)))

    return loss


@pytest.mark.parametrize("along", ["inputs", "outputs"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_shard_of_the_weight_gives_what_the_whole_one_does(name, along):
    layer, weight_name, shape = LAYERS[name]
    axis = getattr(AXES[weight_name], along)
    weight = getattr(layer, weight_name)[...]
    x = jax.random.normal(jax.random.key(3), shape)
    loss = loss_of(layer, weight_name)
    expected = jax.value_and_grad(loss, (0, 1))(weight, x)

    per_device = jax.vmap(jax.value_and_grad(loss, (0, 1)), (axis, 0), (0, (axis, 0)), axis_name=FSDP_AXIS)
    shards = weight.reshape(*weight.shape[:axis], DEVICES, -1, *weight.shape[axis + 1 :])
    losses, (of_weight, of_x) = per_device(shards, x.reshape(DEVICES, -1, *shape[1:]))

    np.testing.assert_allclose(losses.sum(), expected[0], rtol=1e-5)
    np.testing.assert_allclose(of_weight.reshape(weight.shape), expected[1][0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(of_x.reshape(shape), expected[1][1], rtol=1e-5, atol=1e-5)


def layers_loss(params, x):
    """Two layers, the first of them twice; a third is scaled first."""
    linear, scaled = (Linear(64, 64, bias=False, rngs=nnx.Rngs(0)) for _ in range(2))
    linear.weight = nnx.Param(params["twice"])
    y = linear(linear(x[:, 0]))
    linear.weight = nnx.Param(params["once"])
    scaled.weight = nnx.Param(2 * params["scaled"])
    return jnp.sum(linear(x)) + jnp.sum(scaled(y))


def shapes(rows, tokens):
    params = {name: jax.ShapeDtypeStruct((64, 64), jnp.float32) for name in ("once", "scaled", "twice")}
    return params, jax.ShapeDtypeStruct((rows, tokens, 64), jnp.float32)


def test_products_of_each_weight():
    axes = AXES["weight"]
    once, scaled, twice = products(layers_loss, *shapes(2, 5))
    assert once == [Product(axes, 2 * 5 * 64, 2 * 5 * 64)]
    assert twice == 2 * [Product(axes, 2 * 64, 2 * 64)]
    assert scaled == []  # what is multiplied is another array

    def decayed(params, x):
        return layers_loss(params, x) + jnp.sum(jnp.square(params["once"]))

    assert products(decayed, *shapes(2, 5)) == [[], scaled, twice]  # a shard would give a part of the sum


@pytest.mark.parametrize(
    ("rows", "tokens", "stay"),
    # To gather a weight sends 3/4 of 4096 numbers, half of them are 1536; a product of n rows sends (3 + 3/4) * 64 * n.
    [(3, 1, {"once", "twice"}), (4, 1, {"once"}), (1, 6, {"once", "twice"}), (1, 7, {"twice"}), (7, 1, set())],
)
def test_weights_stay_where_activations_are_fewer(rows, tokens, stay):
    params, x = shapes(rows, tokens)
    specs = dict.fromkeys(params, PartitionSpec(FSDP_AXIS))
    found = to_gather(layers_loss, params, specs, DEVICES, x)
    assert {name for name, spec in found.items() if spec == REPLICATED} == stay
    assert to_gather(layers_loss, params, dict.fromkeys(params, REPLICATED), DEVICES, x) == dict.fromkeys(
        params, REPLICATED
    )


def test_what_stays_is_counted_in_what_is_sent():
    axes = InOut(inputs=2, outputs=3)
    # The official UNet's 1536 x 1536 kernels at 8 x 8, 4 examples a device, on 16 devices.
    size, activations = 9 * 1536 * 1536, 4 * 8 * 8 * 1536
    use = [Product(axes, activations, activations)]
    assert stays(size, axes.inputs, use, 16)
    assert stays(size, axes.outputs, use, 16)
    assert not stays(size, axes.inputs, 2 * use, 16)  # 25 of 40 MB in bfloat16 are more than half
    assert not stays(size, 0, use, 16)  # along the rows of a kernel, which no layer can multiply
    # Concatenated inputs are shuffled, which costs a sixteenth of gathering them.
    joined = [Product(axes, 2 * activations, activations)]
    assert stays(size, axes.inputs, joined, 16)
    assert not stays(size, axes.outputs, joined, 16)
    assert not stays(size, axes.inputs, [], 16)
